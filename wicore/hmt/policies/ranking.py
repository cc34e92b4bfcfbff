"""Blocks in the order of their keys, lowest first: the heap that the policies share."""

from __future__ import annotations

from array import array
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np
from numpy.typing import NDArray

_NONE = -(2**63)
"""The queued key of a block without an entry. No block may have it as its key."""


class Ranking:
    """Integer keys of the blocks 0 .. blocks - 1, and the lowest of those that are members.

    The heap is lazy. A block's entry may lie lower than its key and may outlive its membership; both are
    put right when the entry comes to the top. So a rising key, the common case, costs nothing, and a block
    that comes and goes keeps one entry. An entry is one number, key * blocks + block: a tuple would take
    twice the memory and compare slower. Ties go to the lowest block.
    """

    __slots__ = ("_blocks", "_heap", "_members", "_queued", "keys", "members")

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._heap: list[int] = []
        self._queued = array("q", [_NONE]) * blocks
        """Key in a block's entry; entries with another are dead."""
        self._members = 0
        self.keys = array("q", [0]) * blocks
        """To read; `move` writes."""
        self.members = bytearray(blocks)
        """To read: 1 for a member."""

    def __len__(self) -> int:
        return self._members

    def move(self, block: int, key: int) -> None:
        """Give the block, member or not, this key (64 bits, signed)."""
        self.keys[block] = key
        # A block without an entry needs none before it is a member: its queued key is the lowest.
        if key < self._queued[block]:
            self._push(block, key)

    def add(self, block: int) -> None:
        """Make the block a member; a no-op when it is one."""
        if self.members[block]:
            return
        self.members[block] = 1
        self._members += 1
        if self._queued[block] == _NONE:
            self._push(block, self.keys[block])

    def remove(self, block: int) -> None:
        """Make the block no member; a no-op when it is none."""
        if self.members[block]:
            self.members[block] = 0
            self._members -= 1

    def lowest(self) -> int:
        """The member with the lowest key. Raises LookupError when there is none."""
        heap, blocks, keys, queued = self._heap, self._blocks, self.keys, self._queued
        while heap:
            key, block = divmod(heap[0], blocks)
            if key != queued[block]:
                heappop(heap)
            elif not self.members[block]:
                heappop(heap)
                queued[block] = _NONE
            elif key == keys[block]:
                return block
            else:
                queued[block] = keys[block]
                heapreplace(heap, keys[block] * blocks + block)
        raise LookupError("no block is evictable")

    def renew(self, keys: NDArray[np.int64]) -> None:
        """Give all blocks new keys at once, small enough that key * blocks has 63 bits. Takes a tenth of a
        second for a million blocks."""
        members = np.flatnonzero(np.frombuffer(self.members, np.uint8))
        queued = np.full(self._blocks, _NONE, np.int64)
        queued[members] = keys[members]
        np.frombuffer(self.keys, np.int64)[:] = keys
        np.frombuffer(self._queued, np.int64)[:] = queued
        self._heap = np.sort(keys[members] * self._blocks + members).tolist()

    def _push(self, block: int, key: int) -> None:
        self._queued[block] = key
        heappush(self._heap, key * self._blocks + block)
        if len(self._heap) > 64 + 2 * self._blocks:
            self._sweep()

    def _sweep(self) -> None:
        """Leave one entry a member: falling keys leave dead ones behind."""
        for entry in self._heap:
            self._queued[entry % self._blocks] = _NONE
        members = [block for block, member in enumerate(self.members) if member]
        for block in members:
            self._queued[block] = self.keys[block]
        self._heap = [self.keys[block] * self._blocks + block for block in members]
        heapify(self._heap)
