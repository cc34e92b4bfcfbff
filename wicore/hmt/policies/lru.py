"""LRU: least recently used first."""

from __future__ import annotations

from wicore.hmt.policies.base import Heat
from wicore.hmt.policies.ranked import Ranked


class LRU(Ranked):
    """Least recently used first, in the order of the calls: the clock may stand still between two."""

    __slots__ = ()

    def insert(self, block: int, content: bytes, heat: Heat | None = None) -> None:
        self.touch(block)
        if heat is not None:
            self._last[block] = heat.last

    def touch(self, block: int) -> None:
        self._accesses += 1
        self._last[block] = self._clock()
        self._ranking.move(block, self._accesses)

    def heat(self, block: int) -> Heat:
        return Heat(last=self._last[block])
