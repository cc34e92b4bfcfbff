"""The block tables of a step's sequences, as the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import KVLayout, SequenceInput

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

SPARE = 8
"""Entries that each table of a step that only decodes may grow by before all are laid out anew."""


class BlockTables:
    """The block tables of a step's sequences in one array: first all global tables, then all window tables,
    each from the first block that the step reads on.

    With `spare` each has so many entries more than the step needs: as a sequence grows its table is written
    again (`replace`) where it lies. A table longer than that is cut.
    """

    def __init__(
        self, sequences: Sequence[SequenceInput], layout: KVLayout, memory: Ints, *, spare: int = 0
    ) -> None:
        """`memory` is what the tables are written to, from its beginning on. Raises ValueError when they do
        not fit."""
        self._layout = layout
        size = layout.block_tokens
        ends = [-(-(s.start + len(s.tokens)) // size) for s in sequences]
        firsts = [self._first_window_block(s) for s in sequences]
        rooms = [end + spare for end in ends]
        window_rooms = [end + spare - first for end, first in zip(ends, firsts, strict=True)]
        offsets = list(accumulate((*rooms, *window_rooms), initial=0))
        if offsets[-1] > len(memory):
            raise ValueError(f"plan: {offsets[-1]} table entries, and there is room for {len(memory)}")
        self.entries = memory[: offsets[-1]]
        self.global_entries = offsets[len(rooms)]
        self.global_offset = np.array(offsets[: len(rooms)], np.int32)
        self.window_offset = np.array(offsets[len(rooms) : -1], np.int32)
        self.window_first = np.array(firsts, np.int32)
        self.index = {s.key: i for i, s in enumerate(sequences)}
        self._count, self._offsets, self._rooms = len(ends), offsets, rooms + window_rooms
        self._write_all(sequences, firsts)

    def replace(self, i: int, sequence: SequenceInput) -> bool:
        """Write the tables of the i-th sequence anew, which has grown; False when there is no room."""
        first = self._first_window_block(sequence)
        window = sequence.window_table[first - sequence.window_first :]
        lengths = []
        for at, table in ((i, sequence.global_table), (self._count + i, window)):
            offset, length = self._offsets[at], min(len(table), self._rooms[at])
            self.entries[offset : offset + length] = table[:length]
            lengths.append(length)
        self.window_first[i] = first
        self.covered[i] = covered = min(lengths[0], first + lengths[1]) * self._layout.block_tokens
        return covered > sequence.start

    def shares(self, mass: Floats, sequences: Sequence[SequenceInput]) -> list[Floats]:
        """Attention mass, given by entry of the global tables in any unit, by block of each sequence's whole
        table and summing to 1."""
        if not sequences:
            return []
        count = len(sequences)
        sums = np.add.reduceat(mass, self.global_offset, dtype=np.float64)
        counted = sums > 0
        scales = np.divide(1.0, sums, out=np.zeros(count), where=counted).astype(np.float32)
        scaled = mass * np.repeat(scales, self._rooms[:count])
        for i in np.flatnonzero(~counted).tolist():  # more context in this step than mass is counted for
            sequence, at = sequences[i], self._offsets[i]
            blocks = -(-(sequence.start + len(sequence.tokens)) // self._layout.block_tokens)
            scaled[at : at + blocks] = 1 / blocks
        lengths = [len(s.global_table) for s in sequences]
        found = [scaled[at : at + length] for at, length in zip(self._offsets, lengths, strict=False)]
        for i, (length, room) in enumerate(zip(lengths, self._rooms, strict=False)):
            if length > room:
                found[i] = np.append(found[i][:room], np.zeros(length - room, np.float32))
        return found

    def _write_all(self, sequences: Sequence[SequenceInput], firsts: Sequence[int]) -> None:
        """Write every table, all in one go."""
        count, rooms = self._count, self._rooms
        parts = [s.global_table[:room] for s, room in zip(sequences, rooms, strict=False)]
        for s, first, room in zip(sequences, firsts, rooms[count:], strict=True):
            begin = first - s.window_first
            parts.append(s.window_table[begin : begin + room])
        lengths = np.array([len(part) for part in parts], np.int64)
        ends = lengths.cumsum()
        self.covered = (
            np.minimum(lengths[:count], self.window_first + lengths[count:]) * self._layout.block_tokens
        )
        """By sequence: positions for which the entries suffice."""
        if parts:
            shifts = np.array(self._offsets[:-1]) - (ends - lengths)
            self.entries[np.arange(ends[-1]) + np.repeat(shifts, lengths)] = np.concatenate(parts)

    def _first_window_block(self, sequence: SequenceInput) -> int:
        """Of those that the sequence's new positions see."""
        return max(0, sequence.start - self._layout.window + 1) // self._layout.block_tokens


def entry_capacity(layout: KVLayout, sequences: int, max_context: int, step_tokens: int) -> int:
    """The most entries that the tables of so many sequences have."""
    size = layout.block_tokens
    windows = min(max_context, layout.window + step_tokens)
    return sequences * (-(-max_context // size) + -(-windows // size) + 1 + 2 * SPARE)
