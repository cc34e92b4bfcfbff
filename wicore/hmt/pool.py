"""The blocks of one pool: free, used or cached.

    free     no content anyone could want
    used     at least one sequence refers to it
    cached   no sequence refers to it; its content can be found by its hash until it is evicted

A block is registered once its content is final (all positions computed), and from then on only read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wicore.errors import EngineError
from wicore.hmt.policy import EvictionPolicy

_MASS_DECAY = 0.9
"""Weight of the past in a block's mean attention, for each step that reads the block."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Blocks by state, and blocks evicted since the start."""

    total: int
    free: int
    used: int
    cached: int
    evicted: int


class BlockPool:
    """Counts and content addresses of `blocks` physical blocks, ids 0 .. blocks - 1.

    With `leaves_first` a cached block is not evicted while a cached block continues it: a prefix cache
    whose middle is gone has lost its end as well. A window pool is made without, because there the old
    blocks of a chain lose their use first.
    """

    def __init__(
        self, name: str, blocks: int, policy: Callable[[int], EvictionPolicy], *, leaves_first: bool
    ) -> None:
        self.name = name
        self.total = blocks
        self.policy = policy(blocks)
        self.attention = np.zeros(blocks, np.float32)
        """Decayed mean of the attention mass that steps gave each block since it was allocated."""
        self._leaves_first = leaves_first
        self._free = list(range(blocks - 1, -1, -1))
        self._refs = [0] * blocks
        self._cached: set[int] = set()
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, tuple[bytes, bytes]] = {}
        """Registered block -> (its hash, its parent's)."""
        self._cached_children: dict[bytes, int] = {}
        """Hash -> number of cached blocks that continue it."""
        self._evicted = 0

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._cached)

    def references(self, block: int) -> int:
        return self._refs[block]

    def lookup(self, hash: bytes) -> int | None:
        """The block, used or cached, that holds the content of this hash."""
        return self._block_of.get(hash)

    def allocate(self) -> int:
        """Take a block with one reference and no content, evicting a cached one when none is free.

        Raises LookupError when no block is available.
        """
        if not self._free:
            self._evict()
        block = self._free.pop()
        self._refs[block] = 1
        self.attention[block] = 0.0
        return block

    def acquire(self, block: int) -> None:
        """One more sequence reads this registered block."""
        if block in self._cached:
            self._leave_cache(block)
        self._refs[block] += 1
        self.policy.touch(block)

    def release(self, block: int) -> None:
        """One sequence less refers to the block; after the last it is cached if registered, else free."""
        self._refs[block] -= 1
        if self._refs[block]:
            return
        if block in self._name_of:
            self.policy.touch(block)
            self._enter_cache(block)
        else:
            self._free.append(block)

    def register(self, block: int, hash: bytes, parent: bytes) -> None:
        """Make a used block's content findable. When another block holds the same, that one stays the
        one to find, and this one goes free after its last use."""
        if hash not in self._block_of:
            self._block_of[hash] = block
            self._name_of[block] = (hash, parent)

    def discard(self, hash: bytes) -> None:
        """Make the content of this hash unfindable, if it is here; a cached block goes free."""
        block = self._block_of.get(hash)
        if block is None:
            return
        if block in self._cached:
            self._leave_cache(block)
            self._free.append(block)
        self._forget(block)

    def record(self, blocks: NDArray[np.int32], mass: NDArray[np.float32]) -> None:
        """A step gave `mass[i]` of its attention to `blocks[i]`; blocks are distinct."""
        mean = _MASS_DECAY * self.attention[blocks] + np.float32(1 - _MASS_DECAY) * mass
        self.attention[blocks] = mean
        self.policy.record(blocks, mean)

    def stats(self) -> PoolStats:
        cached, free = len(self._cached), len(self._free)
        return PoolStats(self.total, free, self.total - free - cached, cached, self._evicted)

    def check(self, references: Mapping[int, int]) -> None:
        """Raise EngineError unless every block is in exactly one state and referred to as `references`
        (block -> number of sequences) says. O(blocks): for idle moments and tests."""
        used = sum(1 for count in self._refs if count > 0)
        free, cached = len(self._free), len(self._cached)
        if free + used + cached != self.total or len(set(self._free)) != free:
            raise EngineError(
                f"{self.name} pool: free {free} + used {used} + cached {cached} != total {self.total}"
            )
        for block, count in enumerate(self._refs):
            if count != references.get(block, 0):
                raise EngineError(
                    f"{self.name} pool: block {block} has {count} references, {references.get(block, 0)} held"
                )
        strays = [
            b
            for b in (*self._free, *self._cached)
            if self._refs[b] or (b in self._name_of) != (b in self._cached)
        ]
        if strays or any(self._block_of[name[0]] != block for block, name in self._name_of.items()):
            raise EngineError(
                f"{self.name} pool: content addresses disagree with states, at blocks {strays[:8]}"
            )

    def _evict(self) -> None:
        block = self.policy.victim()
        self._leave_cache(block)
        self._forget(block)
        self._free.append(block)
        self._evicted += 1

    def _forget(self, block: int) -> None:
        hash, _ = self._name_of.pop(block)
        del self._block_of[hash]

    def _enter_cache(self, block: int) -> None:
        self._cached.add(block)
        hash, parent = self._name_of[block]
        if not self._leaves_first:
            self.policy.add(block)
            return
        self._cached_children[parent] = self._cached_children.get(parent, 0) + 1
        above = self._block_of.get(parent)
        if above is not None:
            self.policy.remove(above)
        if hash not in self._cached_children:
            self.policy.add(block)

    def _leave_cache(self, block: int) -> None:
        self._cached.remove(block)
        self.policy.remove(block)
        if not self._leaves_first:
            return
        parent = self._name_of[block][1]
        self._cached_children[parent] -= 1
        if not self._cached_children[parent]:
            del self._cached_children[parent]
            above = self._block_of.get(parent)
            if above is not None and above in self._cached:
                self.policy.add(above)
