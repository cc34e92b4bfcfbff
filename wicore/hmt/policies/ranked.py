"""What policies have in common that keep one ranking and take no heed of attention."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from wicore.hmt.policies.base import Clock
from wicore.hmt.policies.ranking import Ranking


class Ranked:
    """The half of `EvictionPolicy` that passes on to the ranking; the other half decides the keys."""

    __slots__ = ("_accesses", "_clock", "_last", "_ranking")

    def __init__(self, blocks: int, clock: Clock) -> None:
        self._clock = clock
        self._accesses = 0
        """Orders accesses between which the clock stood still."""
        self._last = array("d", [0.0]) * blocks
        """Time of each block's last access."""
        self._ranking = Ranking(blocks)

    def record(self, blocks: NDArray[np.int32], mass: NDArray[np.float32], steps: int = 1) -> None:
        """Attention does not matter."""

    def add(self, block: int) -> None:
        self._ranking.add(block)

    def remove(self, block: int) -> None:
        self._ranking.remove(block)

    def victim(self) -> int:
        return self._ranking.lowest()

    def drop(self, block: int, *, evicted: bool) -> None:
        self._ranking.remove(block)
