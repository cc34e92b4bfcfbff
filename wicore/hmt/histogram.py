"""Counts of values by size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """How many values were at most each of `bounds`, ascending, and how many above the last."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def as_dict(self) -> dict[str, object]:
        """{"bounds", "counts" (one more, each of its own bucket), "sum"}"""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.sum}
