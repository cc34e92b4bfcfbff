"""How fast the tiers and the prefill have been lately."""

from __future__ import annotations

from wicore.hmt.moves import Outcome, Tier

_WEIGHT = 0.2
"""Of a new measurement against the mean of those before."""
_LEAST_TOKENS = 16
"""A step of fewer prompt tokens says little of the prefill's speed."""

Route = tuple[Tier, Tier]


class Rates:
    """Decayed means of measured speeds; None until there is a measurement."""

    def __init__(self) -> None:
        self.prefill: float | None = None
        """Prompt tokens a second."""
        self._bytes: dict[Route, float] = {}

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        if tokens >= _LEAST_TOKENS and seconds > 0:
            self.prefill = _mean(self.prefill, tokens / seconds)

    def observe_move(self, outcome: Outcome, moved_bytes: int) -> None:
        route = (outcome.move.source, outcome.move.target)
        if moved_bytes and outcome.seconds > 0:
            self._bytes[route] = _mean(self._bytes.get(route), moved_bytes / outcome.seconds)

    def bytes_per_second(self, route: Route) -> float | None:
        return self._bytes.get(route)

    def seconds_to_raise(self, tier: Tier, size: int) -> float:
        """To bring `size` bytes from `tier` to the device; what was never measured counts as instant, so
        that it gets measured."""
        routes: dict[Tier, tuple[Route, ...]] = {
            "device": (),
            "host": (("host", "device"),),
            "nvme": (("nvme", "host"), ("host", "device")),
        }
        return sum(size / self._bytes[route] for route in routes[tier] if route in self._bytes)


def _mean(before: float | None, now: float) -> float:
    return now if before is None else before + _WEIGHT * (now - before)
