"""One open sequence: its chain, its block tables, and what it waits for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import Pool
from wicore.hmt.chain import Grow, TokenChain
from wicore.hmt.lifts import Restore

Table = NDArray[np.int32]


class Tables(NamedTuple):
    """A sequence's block tables, as an engine's plan wants them."""

    global_table: Table
    """By logical block; the first `streamed` entries are slots of host memory."""
    window_table: Table
    """From logical block `window_first` on."""
    window_first: int
    streamed: int


class OpenSequence:
    """Tables by logical block. Window entries before `window_first` are stale."""

    __slots__ = (
        "chain",
        "computed",
        "covered",
        "global_table",
        "known_tables",
        "long",
        "marks",
        "quiet_until",
        "registered",
        "restore",
        "settled",
        "streamed",
        "window_first",
        "window_table",
    )

    def __init__(
        self, chain: TokenChain, *, blocks: int, streamed: int, window_first: int, long: bool
    ) -> None:
        """`blocks` need not be computed; the first `streamed` of them will lie in host memory."""
        self.chain = chain
        self.computed = blocks * chain.block_tokens
        self.covered = 0
        """Positions for which both tables have blocks."""
        self.quiet_until = 0
        """While fewer positions are computed, no block becomes full and none slides out of sight."""
        self.registered = blocks
        """Leading blocks that can be found by their hash."""
        self.streamed = streamed
        self.long = long
        """Whether it may use only a share of the device pool, and the rest is streamed."""
        self.global_table = Grow((-1,) * streamed)
        self.window_table = Grow((-1,) * window_first)
        self.window_first = window_first
        self.marks = frozenset[int]()
        """Numbers of leading blocks after which a checkpoint is kept."""
        self.restore = Restore()
        self.settled = False
        """Whether the restore's host slots are in the table."""
        self.known_tables: Tables | None = None
        """What `tables` gives, if it has been asked since the last change."""

    @property
    def resident(self) -> int:
        """Global blocks on the device."""
        return len(self.global_table) - self.streamed

    def held(self, pool: Pool) -> list[int]:
        """Device blocks it refers to, by logical block."""
        first, table = (
            (self.streamed, self.global_table) if pool == "global" else (self.window_first, self.window_table)
        )
        blocks: list[int] = table.view(first).tolist()
        return blocks

    def slots(self) -> list[int]:
        """Host slots it refers to."""
        slots: list[int] = self.global_table.view(0, self.streamed).tolist() if self.settled else []
        return slots

    def settle(self, slots: dict[bytes, int]) -> None:
        """The restore is complete: the streamed blocks, by content, lie at these host slots."""
        self.settled = True
        if self.streamed:
            leading = [slots[hash] for hash in self.chain.hashes[: self.streamed]]
            self._replace(leading + self.held("global"))

    def stream(self, slot: int) -> int:
        """From now on the first block on the device is read at host `slot`; returns the block."""
        table = self.global_table.view().tolist()
        block, table[self.streamed] = table[self.streamed], slot
        self.streamed += 1
        self._replace(table)
        return int(block)

    def tables(self) -> Tables:
        """Views whose contents never change."""
        if self.known_tables is None:
            first = self.window_first
            self.known_tables = Tables(
                self.global_table.view(), self.window_table.view(first), first, self.streamed
            )
        return self.known_tables

    def forget_tables(self) -> None:
        """The tables have grown or slid."""
        self.known_tables = None
        self.covered = min(len(self.global_table), len(self.window_table)) * self.chain.block_tokens

    def _replace(self, table: list[int]) -> None:
        # Anew, not in place: a plan may still hold views of the old one.
        self.global_table = Grow(table)
        self.known_tables = None
