"""LFU: least frequently used first."""

from __future__ import annotations

from wicore.hmt.policies.base import Heat
from wicore.hmt.policies.ranked import Ranked

_ORDER_BITS = 40
"""Of a key, for the order of accesses; the others count them. A trillion accesses outlast a service."""
_MOST = 2 ** (62 - _ORDER_BITS)


class LFU(Ranked):
    """Least frequently used first, among equals the least recently used.

    Counts do not age, and start anew with a content that no tier has any more: what the literature calls
    in-cache LFU.
    """

    __slots__ = ()

    def insert(self, block: int, content: bytes, heat: Heat | None = None) -> None:
        if heat is None:
            self._access(block, 1, self._clock())
        else:
            self._access(block, max(1, round(heat.frequency)), heat.last)

    def touch(self, block: int) -> None:
        self._access(block, self._count(block) + 1, self._clock())

    def heat(self, block: int) -> Heat:
        return Heat(frequency=float(self._count(block)), last=self._last[block])

    def _count(self, block: int) -> int:
        return self._ranking.keys[block] >> _ORDER_BITS

    def _access(self, block: int, count: int, time: float) -> None:
        self._accesses += 1
        self._last[block] = time
        self._ranking.move(block, min(count, _MOST) << _ORDER_BITS | self._accesses)
