"""What a policy is: the interface between a pool and its ranking of blocks."""

from __future__ import annotations

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

    def record(self, blocks: NDArray[np.int32], mass: NDArray[np.float32], steps: int = 1) -> None:
        """A step's queries gave `mass[i]` of their attention to `blocks[i]`, distinct and inserted or not; it
        speaks for so many steps."""

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
