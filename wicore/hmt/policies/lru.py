"""LRU: least recently used first."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from wicore.hmt.policies.base import Clock, Heat
from wicore.hmt.policies.ranking import Ranking


class LRU:
    """Least recently used first, in the order of the calls: the clock may stand still between two."""

    __slots__ = ("_accesses", "_clock", "_last", "_ranking")

    def __init__(self, blocks: int, clock: Clock) -> None:
        self._clock = clock
        self._accesses = 0
        self._last = array("d", [0.0]) * blocks
        self._ranking = Ranking(blocks)

    def insert(self, block: int, content: bytes, heat: Heat | None = None) -> None:
        self.touch(block)
        if heat is not None:
            self._last[block] = heat.last

    def touch(self, block: int) -> None:
        self._accesses += 1
        self._last[block] = self._clock()
        self._ranking.move(block, self._accesses)

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
        return Heat(last=self._last[block])
