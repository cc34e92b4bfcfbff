"""Which cached block goes first.

A policy ranks the blocks of one pool in one tier by what it is told of them. The pool tells it what each
block holds, of every access and of the attention it received, and which blocks are evictable at the
moment (cached, and no cached block continues them); it asks for a victim when it must reuse one.

Time is whatever the clock given to a policy counts; in the service it is tokens, so that an idle night
ages nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Heat:
    """What is known of a content's use; it travels with the content from tier to tier."""

    attention: float = 0.0
    """Attention it drew, relative to an even spread: 1 is a block that drew as much as the mean one."""
    frequency: float = 0.0
    """Decayed number of accesses, as of `last`."""
    last: float = 0.0
    """Time of the last access."""


class EvictionPolicy(Protocol):
    """Ranking of the blocks of one pool. Every call is O(log n) or better, amortised, for a block.

    Made by `Policy(blocks, clock)` for block ids 0 .. blocks - 1.
    """

    def insert(self, block: int, content: bytes, heat: Heat | None = None) -> None:
        """`block` holds `content` (a hash) from now on, which counts as an access unless `heat` says what
        is known of it from another tier."""

    def touch(self, block: int) -> None:
        """A sequence started to use `block`: one more access, now."""

    def record(self, blocks: NDArray[np.int32], mass: NDArray[np.float32]) -> None:
        """A step's queries gave `mass[i]` of their attention to `blocks[i]`, distinct and inserted or not."""

    def add(self, block: int) -> None:
        """`block` has become evictable. Its last access may be long ago."""

    def remove(self, block: int) -> None:
        """`block` is no longer evictable; a no-op when it was not."""

    def victim(self) -> int:
        """The evictable block to evict next. Changes nothing. Raises LookupError when there is none."""

    def drop(self, block: int, *, evicted: bool) -> None:
        """`block` holds nothing any more: it was `evicted` as a victim, or its content became unwanted."""

    def heat(self, block: int) -> Heat:
        """What is known of the block's content."""


class LRU:
    """Least recently used first, by a heap of access times with lazy deletion."""

    def __init__(self, blocks: int, clock: Clock) -> None:
        self._clock = clock
        self._count = 0
        self._last = [0] * blocks
        """Order of the last accesses: the clock may stand still between two."""
        self._time = np.zeros(blocks)
        self._evictable: set[int] = set()
        self._heap: list[tuple[int, int]] = []

    def insert(self, block: int, content: bytes, heat: Heat | None = None) -> None:
        self.touch(block)
        if heat is not None:
            self._time[block] = heat.last

    def touch(self, block: int) -> None:
        self._count += 1
        self._last[block] = self._count
        self._time[block] = self._clock()
        if block in self._evictable:
            self._push(block)

    def record(self, blocks: NDArray[np.int32], mass: NDArray[np.float32]) -> None:
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

    def drop(self, block: int, *, evicted: bool) -> None:
        self._evictable.discard(block)

    def heat(self, block: int) -> Heat:
        return Heat(last=float(self._time[block]))

    def _push(self, block: int) -> None:
        heapq.heappush(self._heap, (self._last[block], block))
        if len(self._heap) > 64 + 4 * len(self._evictable):
            self._heap = [(self._last[evictable], evictable) for evictable in self._evictable]
            heapq.heapify(self._heap)


POLICIES: dict[str, Callable[[int, Clock], EvictionPolicy]] = {"lru": LRU, "a2cr": LRU}
