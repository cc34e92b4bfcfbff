"""SLRU: segmented LRU."""

from __future__ import annotations

from wicore.hmt.policies.base import Clock, Heat
from wicore.hmt.policies.ranked import Ranked
from wicore.hmt.policies.ranking import Ranking

_PROTECTED = 1 << 60
"""Added to the key of a protected block."""
_SHARE = 0.8
"""Of the blocks that may be protected."""


class SLRU(Ranked):
    """Segmented LRU (Karedla, Love and Wherry, "Caching strategies to improve disk system performance",
    IEEE Computer 1994).

    A content starts on probation and is protected from its second access on. Victims are the least
    recently used on probation, and protected ones only when those run out. When the protected outgrow
    their share, the least recently used of them starts a new probation.
    """

    __slots__ = ("_limit", "_protected")

    def __init__(self, blocks: int, clock: Clock) -> None:
        super().__init__(blocks, clock)
        self._limit = max(1, int(_SHARE * blocks))
        self._protected = Ranking(blocks)
        """The protected, evictable or not."""

    def insert(self, block: int, content: bytes, heat: Heat | None = None) -> None:
        self._accesses += 1
        self._ranking.move(block, self._accesses)
        self._last[block] = self._clock()
        if heat is not None:
            self._last[block] = heat.last
            if heat.frequency > 1:
                self._protect(block)

    def touch(self, block: int) -> None:
        self._accesses += 1
        self._last[block] = self._clock()
        self._protect(block)

    def drop(self, block: int, *, evicted: bool) -> None:
        super().drop(block, evicted=evicted)
        self._protected.remove(block)

    def heat(self, block: int) -> Heat:
        """Frequency 1 says once, 2 more than once; more is not known."""
        return Heat(frequency=1.0 + self._protected.members[block], last=self._last[block])

    def _protect(self, block: int) -> None:
        self._ranking.move(block, _PROTECTED + self._accesses)
        self._protected.move(block, self._accesses)
        self._protected.add(block)
        if len(self._protected) > self._limit:
            demoted = self._protected.lowest()
            self._protected.remove(demoted)
            self._accesses += 1
            self._ranking.move(demoted, self._accesses)
