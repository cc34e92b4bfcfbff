"""The blocks of the sequences being served: prefix reuse, block tables, growth, sliding, release.

Every change is asked for before it is made: `match` and `room` look, `open` and `reserve` take. Shared
blocks are only ever read: a match is whole blocks, and it always leaves at least one token to compute,
so new positions fall in blocks that the sequence owns alone.

The window pool keeps, of each sequence, the blocks that hold any of the last `window - 1` positions
computed; older ones are released as the sequence advances, and stay cached while there is room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import KVLayout
from wicore.errors import ConfigError, EngineError, TooLarge
from wicore.hmt.chain import Grow, TokenChain
from wicore.hmt.policy import LRU, EvictionPolicy
from wicore.hmt.pool import BlockPool, PoolStats

Table = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest reusable prefix of a chain, as the cache stands now. It holds until a block is taken."""

    tokens: int
    """Positions that need not be computed; a multiple of the block size."""
    global_blocks: tuple[int, ...]
    window_blocks: tuple[int, ...]
    window_first: int
    """Logical index of window_blocks[0]."""
    global_idle: int
    """How many of global_blocks no sequence uses: taking them makes as many fewer available."""
    window_idle: int


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Both pools, and what prefix reuse has saved since the start."""

    global_pool: PoolStats
    window_pool: PoolStats
    opened_tokens: int
    """Tokens of all sequences opened, of which `matched_tokens` were found in the cache."""
    matched_tokens: int


class _Sequence:
    """One open sequence; tables by logical block. Window entries before `window_first` are stale."""

    __slots__ = ("chain", "computed", "global_table", "registered", "tables", "window_first", "window_table")

    def __init__(self, chain: TokenChain, match: PrefixMatch) -> None:
        self.chain = chain
        self.computed = match.tokens
        self.registered = len(match.global_blocks)
        self.global_table = Grow(match.global_blocks)
        self.window_table = Grow((-1,) * match.window_first + match.window_blocks)
        self.window_first = match.window_first
        self.tables: tuple[Table, Table, int] | None = None


class CacheManager:
    """Two block pools and the sequences that use them.

    `salt` is the engine's fingerprint. Raises ConfigError when a pool cannot hold even one sequence's
    window.
    """

    def __init__(
        self,
        layout: KVLayout,
        global_blocks: int,
        window_blocks: int,
        salt: str,
        *,
        prefix_cache: bool = True,
        policy: Callable[[int], EvictionPolicy] = LRU,
    ) -> None:
        self.layout = layout
        self.global_pool = BlockPool("global", global_blocks, policy, leaves_first=True)
        self.window_pool = BlockPool("window", window_blocks, policy, leaves_first=False)
        self._salt = salt.encode()
        self.prefix_cache = prefix_cache
        self._open: dict[int, _Sequence] = {}
        self._opened_tokens = self._matched_tokens = 0
        if global_blocks < 1 or window_blocks < 1:
            raise ConfigError(
                f"hmt.device_tokens: gives {global_blocks} global and {window_blocks} window blocks of"
                f" {layout.block_tokens} tokens; each pool needs at least 1",
                param="hmt.device_tokens",
            )

    # --- looking ----------------------------------------------------------------------------------

    def chain(self, tokens: Sequence[int] | NDArray[np.int32]) -> TokenChain:
        """The chain under which a sequence of these tokens is matched and opened."""
        return TokenChain(self._salt, self.layout.block_tokens, tokens)

    def blocks(self, positions: int) -> int:
        """Blocks that hold this many positions from 0 on."""
        return -(-positions // self.layout.block_tokens)

    def window_span(self, positions: int) -> int:
        """Most window blocks that a sequence of this many positions needs to advance by one token."""
        return min(self.blocks(positions), self.blocks(self.layout.window - 1) + 1)

    def require(self, positions: int) -> None:
        """Raise TooLarge when a sequence of this many positions could not run even alone."""
        for pool, need in (
            (self.global_pool, self.blocks(positions)),
            (self.window_pool, self.window_span(positions)),
        ):
            if need > pool.total:
                raise TooLarge(
                    f"prompt and max_tokens need {positions} positions, which is {need} {pool.name} blocks of"
                    f" {self.layout.block_tokens}; the device pool has {pool.total}. Ask for fewer, or raise"
                    " hmt.device_tokens",
                    param="max_tokens",
                )

    def match(self, chain: TokenChain) -> PrefixMatch:
        """The longest prefix P, in whole blocks and short of the last token, such that the cache holds
        the global blocks of [0, P) and the window blocks of [max(0, P - window + 1), P)."""
        if not self.prefix_cache:
            return PrefixMatch(0, (), (), 0, 0, 0)
        found: list[int] = []
        windows: list[int | None] = []
        runs: list[int] = []
        """Consecutive blocks found in the window pool, ending at each block."""
        for hash in chain.hashes[: (len(chain) - 1) // self.layout.block_tokens]:
            block = self.global_pool.lookup(hash)
            if block is None:
                break
            found.append(block)
            windows.append(self.window_pool.lookup(hash))
            runs.append(0 if windows[-1] is None else (runs[-1] if runs else 0) + 1)
        count = len(found)
        while count and runs[count - 1] < count - self._first_window_block(count * self.layout.block_tokens):
            count -= 1
        first = self._first_window_block(count * self.layout.block_tokens) if count else 0
        global_blocks = tuple(found[:count])
        window_blocks = tuple(block for block in windows[first:count] if block is not None)
        return PrefixMatch(
            count * self.layout.block_tokens,
            global_blocks,
            window_blocks,
            first,
            sum(1 for block in global_blocks if not self.global_pool.references(block)),
            sum(1 for block in window_blocks if not self.window_pool.references(block)),
        )

    def can_open(
        self, match: PrefixMatch, positions: int, *, spare: int = 0, closing: Sequence[int] = ()
    ) -> bool:
        """Whether, taking `match`, blocks for `positions` positions could be had and `spare` more be left.

        Of the window pool as many are asked for as let the sequence advance. `closing` are keys to be
        reckoned as closed first; of their blocks only those count that no other sequence holds.
        """
        global_need = self.blocks(positions) - len(match.global_blocks) + match.global_idle
        window_need = max(0, self.window_span(positions) - len(match.window_blocks)) + match.window_idle
        global_have, window_have = self.global_pool.available, self.window_pool.available
        # What the match takes over from a closing sequence does not become available.
        taken, taken_window = set(match.global_blocks), set(match.window_blocks)
        for key in closing:
            global_table, window_table, _ = self.tables(key)
            global_have += _sole(self.global_pool, global_table, taken)
            window_have += _sole(self.window_pool, window_table, taken_window)
        return global_need + spare <= global_have and window_need + spare <= window_have

    def room(self, key: int) -> int:
        """The most positions that `reserve` could cover for this sequence now."""
        sequence = self._open[key]
        return self.layout.block_tokens * min(
            len(sequence.global_table) + self.global_pool.available,
            len(sequence.window_table) + self.window_pool.available,
        )

    def tables(self, key: int) -> tuple[Table, Table, int]:
        """(global table, window table, logical index of the window table's first block).

        Views without a copy; their contents do not change later, whatever happens to the sequence.
        """
        sequence = self._open[key]
        if sequence.tables is None:
            first = sequence.window_first
            sequence.tables = (sequence.global_table.view(), sequence.window_table.view(first), first)
        return sequence.tables

    # --- taking -----------------------------------------------------------------------------------

    def open(self, key: int, chain: TokenChain, match: PrefixMatch, positions: int) -> int:
        """Start a sequence with `match`, which must still hold, and global blocks for `positions`.

        Returns how many positions are computed already. Call it only after `can_open` said yes. The
        caller appends to `chain` as the sequence grows.
        """
        if key in self._open:
            raise ValueError(f"sequence {key} is open already")
        sequence = _Sequence(chain, match)
        for block in match.global_blocks:
            self.global_pool.acquire(block)
        for block in match.window_blocks:
            self.window_pool.acquire(block)
        self._open[key] = sequence
        self._grow(sequence.global_table, self.global_pool, positions)
        self._opened_tokens += len(chain)
        self._matched_tokens += match.tokens
        return match.tokens

    def reserve(self, key: int, positions: int) -> bool:
        """Make both tables cover positions 0 .. positions - 1 (the window table: those still in sight).

        All or nothing: False, and nothing changed, when `room(key)` is less.
        """
        sequence = self._open[key]
        have = min(len(sequence.global_table), len(sequence.window_table)) * self.layout.block_tokens
        if positions <= have:
            return True
        if positions > self.room(key):
            return False
        self._grow(sequence.global_table, self.global_pool, positions)
        self._grow(sequence.window_table, self.window_pool, positions)
        sequence.tables = None
        return True

    def commit(self, key: int, computed: int) -> None:
        """Positions below `computed` are in the pool now.

        Blocks that became full can be matched by others from here on, and window blocks out of sight of
        the next position are released.
        """
        sequence = self._open[key]
        sequence.computed = computed
        full = computed // self.layout.block_tokens
        if self.prefix_cache:
            for index in range(sequence.registered, full):
                hash, parent = sequence.chain.hashes[index], sequence.chain.parent(index)
                self.global_pool.register(int(sequence.global_table.view()[index]), hash, parent)
                self.window_pool.register(int(sequence.window_table.view()[index]), hash, parent)
        sequence.registered = full
        first = self._first_window_block(computed)
        if first > sequence.window_first:
            for block in sequence.window_table.view(sequence.window_first, first).tolist():
                self.window_pool.release(block)
            sequence.window_first = first
            sequence.tables = None

    def record(self, key: int, mass: NDArray[np.float32]) -> None:
        """A step of this sequence gave `mass[i]` of its attention to logical block i."""
        self.global_pool.record(self._open[key].global_table.view(0, len(mass)), mass)

    def close(self, key: int, *, cache: bool = True) -> None:
        """End a sequence. Its full blocks stay cached, unless not `cache`: then nothing of its content can
        be matched any more. Idempotent."""
        sequence = self._open.pop(key, None)
        if sequence is None:
            return
        if not cache:
            for hash in sequence.chain.hashes[: sequence.registered]:
                self.global_pool.discard(hash)
                self.window_pool.discard(hash)
        # The end of the chain first, so that among equally old blocks it is the first to be evicted.
        for block in sequence.global_table.view()[::-1].tolist():
            self.global_pool.release(block)
        for block in sequence.window_table.view(sequence.window_first)[::-1].tolist():
            self.window_pool.release(block)

    # --- accounts ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise EngineError unless, in both pools, free + used + cached is the total and every reference
        is an open sequence's. O(blocks)."""
        held: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        for key in self._open:
            global_table, window_table, _ = self.tables(key)
            held[0].update(global_table.tolist())
            held[1].update(window_table.tolist())
        self.global_pool.check(held[0])
        self.window_pool.check(held[1])
        for key, sequence in self._open.items():
            if sequence.computed > len(sequence.global_table) * self.layout.block_tokens:
                blocks = len(sequence.global_table)
                raise EngineError(
                    f"sequence {key}: {sequence.computed} positions computed in {blocks} blocks"
                )

    @property
    def stats(self) -> CacheStats:
        return CacheStats(
            self.global_pool.stats(), self.window_pool.stats(), self._opened_tokens, self._matched_tokens
        )

    def _first_window_block(self, position: int) -> int:
        """The first logical block that a window query at `position` reads."""
        return max(0, position - self.layout.window + 1) // self.layout.block_tokens

    def _grow(self, table: Grow, pool: BlockPool, positions: int) -> None:
        for _ in range(self.blocks(positions) - len(table)):
            table.append(pool.allocate())


def _sole(pool: BlockPool, table: Table, except_for: set[int]) -> int:
    """Blocks of `table` that only one sequence holds."""
    return sum(pool.references(block) == 1 and block not in except_for for block in table.tolist())
