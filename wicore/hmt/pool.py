"""The blocks of one pool in one tier: free, used or cached.

    free     no content anyone could want
    used     a sequence refers to it, or a move has it pinned
    cached   nobody refers to it; its content can be found by its hash until it is evicted

A block is registered once its content is final (all positions computed, or all bytes arrived), and from
then on only read. Registered content is worth

    nothing  (expendable) it may serve by luck, and goes before everything else; never moved to a tier below
    keeping  but is not saved yet: no tier below has had it. It is evicted only when nothing else is left
    keeping  and saved: evicted in the policy's order, without loss
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from wicore.errors import EngineError
from wicore.hmt.histogram import Histogram
from wicore.hmt.policy import Clock, EvictionPolicy, Heat

PolicyFactory = Callable[[int, Clock], EvictionPolicy]

_EXPENDABLE, _UNSAVED, _SAVED = 1, 2, 3
_AGES = tuple(float(4**n) for n in range(4, 14))
"""Bounds of the victim-age histogram, in tokens served since the block's last access: 256 to 67 million."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Blocks by state, and blocks evicted since the start."""

    total: int
    free: int
    used: int
    cached: int
    evicted: int
    lost: int
    """Of the evicted, those that were worth keeping and that no tier below had."""


class BlockPool:
    """Counts and content addresses of `blocks` physical blocks, ids 0 .. blocks - 1.

    With `leaves_first` a cached block is not evicted while a cached block continues it: a prefix cache
    whose middle is gone has lost its end as well. A window pool is made without, because there the old
    blocks of a chain lose their use first.
    """

    def __init__(
        self,
        name: str,
        blocks: int,
        policy: PolicyFactory,
        clock: Clock,
        *,
        leaves_first: bool,
    ) -> None:
        self.name = name
        self.total = blocks
        self.policy = policy(blocks, clock)
        self.victim_ages = Histogram(_AGES)
        self._clock = clock
        self._leaves_first = leaves_first
        self._free = list(range(blocks - 1, -1, -1))
        self._refs = [0] * blocks
        self._worth = bytearray(blocks)
        """0 where nothing is registered."""
        self._cached = 0
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, tuple[bytes, bytes]] = {}
        """Registered block -> (its hash, its parent's)."""
        self._cached_children: dict[bytes, int] = {}
        """Hash -> number of cached blocks that continue it."""
        self._expendable: dict[int, None] = {}
        self._unsaved: dict[int, None] = {}
        """Cached blocks by worth, oldest first; the saved ones are the policy's."""
        self._evicted = self._lost = 0
        self.on_change: Callable[[bytes], None] = lambda hash: None
        """Called with every hash that can be found here from now on, or no longer."""

    # --- looking ----------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + self._cached

    @property
    def ready(self) -> int:
        """Blocks that `allocate` can give without losing anything worth keeping."""
        return len(self._free) + self._cached - len(self._unsaved)

    def references(self, block: int) -> int:
        return self._refs[block]

    def lookup(self, hash: bytes) -> int | None:
        """The block, used or cached, that holds the content of this hash."""
        return self._block_of.get(hash)

    def content(self, block: int) -> tuple[bytes, bytes]:
        """(hash, its parent's) of a registered block. Raises KeyError for another."""
        return self._name_of[block]

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of these registered blocks nobody refers to, and could be evicted without loss."""
        refs, worth = self._refs, self._worth
        return sum(not refs[block] and worth[block] != _UNSAVED for block in blocks)

    def is_saved(self, block: int) -> bool:
        """Whether evicting this registered block loses nothing."""
        return self._worth[block] != _UNSAVED

    # --- references -------------------------------------------------------------------------------

    def allocate(self) -> int:
        """Take a block with one reference and no content, evicting a cached one when none is free.

        Raises LookupError when no block is available.
        """
        if not self._free:
            self._evict()
        block = self._free.pop()
        self._refs[block] = 1
        return block

    def acquire(self, block: int) -> None:
        """One more sequence reads this registered block: an access."""
        self.hold(block)
        self.touch(block)

    def hold(self, block: int) -> None:
        """One more reference to a registered or used block, which is no access."""
        if not self._refs[block]:
            self._leave_cache(block)
        self._refs[block] += 1

    def touch(self, block: int) -> None:
        """The content of this registered block was used, here or in another tier."""
        if self._worth[block] != _EXPENDABLE:
            self.policy.touch(block)

    def release(self, block: int) -> None:
        """One reference less; after the last the block is cached if registered, else free."""
        self._refs[block] -= 1
        if self._refs[block]:
            return
        if block in self._name_of:
            self._enter_cache(block)
        else:
            self.policy.drop(block, evicted=False)  # what it knew of content that never was to be found
            self._free.append(block)

    # --- contents ---------------------------------------------------------------------------------

    def register(
        self,
        block: int,
        hash: bytes,
        parent: bytes,
        *,
        saved: bool = True,
        expendable: bool = False,
        heat: Heat | None = None,
    ) -> bool:
        """Make a used block's content findable; `heat` is what another tier knows of it.

        False when another block holds the same: that one stays the one to find, and this one goes free
        after its last use.
        """
        if hash in self._block_of or block in self._name_of:
            return False
        self._block_of[hash] = block
        self._name_of[block] = (hash, parent)
        self._worth[block] = _EXPENDABLE if expendable else _SAVED if saved else _UNSAVED
        if not expendable:
            self.policy.insert(block, hash, heat)
        self.on_change(hash)
        return True

    def heat(self, block: int) -> Heat | None:
        """What the policy knows of this registered block's content; None when it is expendable."""
        return None if self._worth[block] == _EXPENDABLE else self.policy.heat(block)

    def keep(self, block: int, *, saved: bool) -> bool:
        """Registered content is worth keeping after all; False when it was so already."""
        if self._worth[block] != _EXPENDABLE:
            return False
        cached = not self._refs[block]
        if cached:
            self._leave_cache(block)
        self._worth[block] = _SAVED if saved else _UNSAVED
        self.policy.insert(block, self._name_of[block][0])
        if cached:
            self._enter_cache(block)
        return True

    def saved(self, block: int) -> None:
        """A tier below has the content of this registered block, or will never have it."""
        if self._worth[block] != _UNSAVED:
            return
        self._worth[block] = _SAVED
        if not self._refs[block]:
            del self._unsaved[block]
            if self._is_leaf(block):
                self.policy.add(block)

    def preload(self, contents: Iterable[tuple[int, bytes, bytes]]) -> None:
        """Blocks of an empty pool that hold (block, hash, parent) from earlier, oldest first: cached."""
        found = list(contents)
        taken = {block for block, _, _ in found}
        self._free = [block for block in self._free if block not in taken]
        for block, hash, parent in found:
            self._refs[block] = 1
            self.register(block, hash, parent)
            self.release(block)

    def discard(self, hash: bytes) -> None:
        """Make the content of this hash unfindable, if it is here; a cached block goes free."""
        block = self._block_of.get(hash)
        if block is None:
            return
        if not self._refs[block]:
            self._leave_cache(block)
            self._free.append(block)
        self._forget(block, evicted=False)

    # --- accounts ---------------------------------------------------------------------------------

    def stats(self) -> PoolStats:
        free = len(self._free)
        used = self.total - free - self._cached
        return PoolStats(self.total, free, used, self._cached, self._evicted, self._lost)

    def check(self, references: Mapping[int, int]) -> None:
        """Raise EngineError unless every block is in exactly one state and referred to as `references`
        (block -> number of sequences and pins) says. O(blocks): for idle moments and tests."""
        used = sum(1 for count in self._refs if count > 0)
        free, cached = len(self._free), self._cached
        if free + used + cached != self.total or len(set(self._free)) != free:
            raise EngineError(
                f"{self.name} pool: free {free} + used {used} + cached {cached} != total {self.total}"
            )
        for block, count in enumerate(self._refs):
            if count != references.get(block, 0):
                raise EngineError(
                    f"{self.name} pool: block {block} has {count} references, {references.get(block, 0)} held"
                )
        idle = set(self._free)
        strays = [b for b in range(self.total) if not self._refs[b] and (b in self._name_of) == (b in idle)]
        strays += [b for b in (*self._expendable, *self._unsaved) if self._refs[b] or b not in self._name_of]
        strays += [b for b in self._name_of if not self._worth[b] or self._block_of[self._name_of[b][0]] != b]
        if strays or len(self._block_of) != len(self._name_of):
            raise EngineError(
                f"{self.name} pool: content addresses disagree with states, at blocks {strays[:8]}"
            )

    # --- eviction ---------------------------------------------------------------------------------

    def _evict(self) -> None:
        block = self._victim()
        worth = self._worth[block]
        if worth != _EXPENDABLE:
            self.victim_ages.add(self._clock() - self.policy.heat(block).last)
        self._leave_cache(block)
        self._forget(block, evicted=True)
        self._free.append(block)
        self._evicted += 1
        self._lost += worth == _UNSAVED

    def _victim(self) -> int:
        if self._expendable:
            return next(iter(self._expendable))
        try:
            return self.policy.victim()
        except LookupError:
            # Rare: all that is left waits to be saved, and the caller cannot wait.
            leaf = next(filter(self._is_leaf, self._unsaved), None)
            if leaf is None:
                raise
            return leaf

    def _forget(self, block: int, *, evicted: bool) -> None:
        hash, _ = self._name_of.pop(block)
        del self._block_of[hash]
        if self._worth[block] != _EXPENDABLE:
            self.policy.drop(block, evicted=evicted)
        self._worth[block] = 0
        self.on_change(hash)

    def _is_leaf(self, block: int) -> bool:
        return not self._leaves_first or self._name_of[block][0] not in self._cached_children

    def _enter_cache(self, block: int) -> None:
        self._cached += 1
        worth = self._worth[block]
        if worth == _EXPENDABLE:
            self._expendable[block] = None
        elif worth == _UNSAVED:
            self._unsaved[block] = None
        if self._leaves_first:
            parent = self._name_of[block][1]
            self._cached_children[parent] = self._cached_children.get(parent, 0) + 1
            above = self._block_of.get(parent)
            if above is not None:
                self.policy.remove(above)
        if worth == _SAVED and self._is_leaf(block):
            self.policy.add(block)

    def _leave_cache(self, block: int) -> None:
        self._cached -= 1
        worth = self._worth[block]
        if worth == _EXPENDABLE:
            del self._expendable[block]
        elif worth == _UNSAVED:
            del self._unsaved[block]
        else:
            self.policy.remove(block)
        if not self._leaves_first:
            return
        parent = self._name_of[block][1]
        self._cached_children[parent] -= 1
        if not self._cached_children[parent]:
            del self._cached_children[parent]
            above = self._block_of.get(parent)
            if above is not None and not self._refs[above] and self._worth[above] == _SAVED:
                self.policy.add(above)
