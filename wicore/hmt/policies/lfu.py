"""LFU: least frequently used first."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from wicore.hmt.policies.base import Clock, Heat
from wicore.hmt.policies.ranking import Ranking

_ORDER_BITS = 40
"""Of a key, for the order of accesses; the others count them. A trillion accesses outlast a service."""
_MOST = 2 ** (62 - _ORDER_BITS)


class LFU:
    """Least frequently used first, among equals the least recently used.

    Counts do not age, and start anew with a content that no tier has any more: what the literature calls
    in-cache LFU.
    """

    __slots__ = ("_accesses", "_clock", "_last", "_ranking")

    def __init__(self, blocks: int, clock: Clock) -> None:
        self._clock = clock
        self._accesses = 0
        self._last = array("d", [0.0]) * blocks
        self._ranking = Ranking(blocks)

    def insert(self, block: int, content: bytes, heat: Heat | None = None) -> None:
        if heat is None:
            self._access(block, 1, self._clock())
        else:
            self._access(block, max(1, round(heat.frequency)), heat.last)

    def touch(self, block: int) -> None:
        self._access(block, self._count(block) + 1, self._clock())

    def record(self, blocks: NDArray[np.int32], mass: NDArray[np.float32]) -> None:
        """Attention does not matter."""

    def add(self, block: int) -> None:
        self._ranking.add(block)

    def remove(self, block: int) -> None:
        self._ranking.remove(block)

    def victim(self) -> int:
        return self._ranking.lowest()

    def drop(self, block: int, *, evicted: bool) -> None:
        self._ranking.remove(block)

    def heat(self, block: int) -> Heat:
        return Heat(frequency=float(self._count(block)), last=self._last[block])

    def _count(self, block: int) -> int:
        return self._ranking.keys[block] >> _ORDER_BITS

    def _access(self, block: int, count: int, time: float) -> None:
        self._accesses += 1
        self._last[block] = time
        self._ranking.move(block, min(count, _MOST) << _ORDER_BITS | self._accesses)
