"""Which cached block goes first.

A policy ranks blocks by what it is told of them. The pool tells it of every access and of the attention
each block receives, and which blocks are evictable at the moment (cached, and no cached block continues
them); it asks for a victim when it must reuse one.
"""

from __future__ import annotations

import heapq
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class EvictionPolicy(Protocol):
    """Ranking of the blocks of one pool. Every call is O(log n) or better, amortised."""

    def touch(self, block: int) -> None:
        """A sequence started or stopped using `block`: its last access is now."""

    def record(self, blocks: NDArray[np.int32], attention: NDArray[np.float32]) -> None:
        """The decayed mean attention of `blocks` is now `attention`."""

    def add(self, block: int) -> None:
        """`block` has become evictable. Its last access may be long ago."""

    def remove(self, block: int) -> None:
        """`block` is no longer evictable; a no-op when it was not."""

    def victim(self) -> int:
        """The evictable block to evict next. Changes nothing. Raises LookupError when there is none."""


class LRU:
    """Least recently used first, by a heap of access times with lazy deletion."""

    def __init__(self, blocks: int) -> None:
        self._clock = 0
        self._last = [0] * blocks
        self._evictable: set[int] = set()
        self._heap: list[tuple[int, int]] = []

    def touch(self, block: int) -> None:
        self._clock += 1
        self._last[block] = self._clock
        if block in self._evictable:
            self._push(block)

    def record(self, blocks: NDArray[np.int32], attention: NDArray[np.float32]) -> None:
        """Attention does not matter to LRU."""

    def add(self, block: int) -> None:
        self._evictable.add(block)
        self._push(block)

    def remove(self, block: int) -> None:
        self._evictable.discard(block)

    def victim(self) -> int:
        while self._heap:
            last, block = self._heap[0]
            if block in self._evictable and last == self._last[block]:
                return block
            heapq.heappop(self._heap)
        raise LookupError("no block is evictable")

    def _push(self, block: int) -> None:
        heapq.heappush(self._heap, (self._last[block], block))
        if len(self._heap) > 64 + 4 * len(self._evictable):
            self._heap = [(self._last[evictable], evictable) for evictable in self._evictable]
            heapq.heapify(self._heap)
