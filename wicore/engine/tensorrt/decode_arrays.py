"""The arrays of decode passes, which stay in pinned memory from one step to the next.

The step after one that only decodes differs from it by a token id and a position a sequence, and by a block
of every thirty-second or so: only that is written, while the device waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from wicore.engine.base import KVLayout, SequenceInput
from wicore.engine.tensorrt.attention import StepTables
from wicore.engine.tensorrt.block_tables import SPARE, BlockTables, Ints
from wicore.engine.tensorrt.device import Device, Stream
from wicore.engine.tensorrt.limits import Limits
from wicore.engine.tensorrt.passes import Pass
from wicore.engine.tensorrt.step_arrays import pass_arrays

Check = Callable[[Sequence[SequenceInput]], None]
"""Raises ValueError for sequences that break the contract of a plan."""

_ALIGNMENT = 64  # elements
_FIELDS = 8
_PADDING = np.array([[0], [-1], [0], [0], [0], [0], [0], [-1]], np.int32)


@dataclass(slots=True)
class _Batch:
    """The sequences of the last step, one a row."""

    tables: BlockTables
    keys: list[int]
    starts: list[int]
    """Where they are in the next step."""
    streamed: list[int]
    global_tables: list[Ints]
    window_tables: list[Ints]
    window_firsts: list[int]


class DecodeArrays:
    """Rows, sequences and block tables of decode passes of up to `limits.samples` rows.

    They always lie at the same addresses, which graphs hold. A step of one row a sequence is written by
    `follow`, or `begin`; any other by `tables_of` and, a pass after the other, `fill`. `send` copies it all.
    """

    def __init__(
        self, device: Device, layout: KVLayout, limits: Limits, vocab: int, max_context: int
    ) -> None:
        self._device, self._layout, self._vocab, self._longest = device, layout, vocab, max_context
        rows = -(-limits.samples // _ALIGNMENT) * _ALIGNMENT
        self._header = _FIELDS * rows
        size = 4 * (self._header + limits.entries)
        self._target = device.allocate(size, "the arrays of a step")
        self._pinned = device.allocate_host(size)
        self._sent = device.event()
        memory: Ints = self._pinned.array.view(np.int32)
        memory[:] = 0
        self._fields, self._entries = memory[: self._header].reshape(_FIELDS, rows), memory[self._header :]
        at = [self._target.address + 4 * rows * field for field in range(_FIELDS + 1)]
        # One array of entries: the offsets of windows are counted from its beginning, too.
        self.addresses = StepTables(at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[8], at[8])
        self.sampling = at[7]
        """The address of the rows that sample."""
        self._batch: _Batch | None = None

    def tables_of(self, sequences: Sequence[SequenceInput]) -> BlockTables:
        """A step's tables, written to where they are sent from: what was sent before must be done. Raises
        ValueError when there are too many."""
        self._batch = None
        return BlockTables(sequences, self._layout, self._entries, spare=SPARE)

    def fill(self, work: Pass, tables: BlockTables) -> None:
        """Write a pass of the step with these tables, padded to all rows there are."""
        self._sent.wait()  # the pass before may still be waiting to be copied
        self._batch = None
        rows = self._fields.shape[1]
        arrays = pass_arrays(work, tables, rows, rows)
        self._fields[0], self._fields[1], self._fields[2] = arrays.ids, arrays.positions, arrays.row_sequence
        self._fields[3:7], self._fields[7] = arrays.sequences, arrays.sampling

    def begin(self, sequences: Sequence[SequenceInput]) -> BlockTables:
        """Write a step of one row of each of these sequences, in their order; its tables. What was sent
        before must be done. Raises ValueError when they do not fit."""
        tables = self.tables_of(sequences)
        fields, count = self._fields, len(sequences)
        starts, streamed = [s.start for s in sequences], [s.streamed for s in sequences]
        fields[:, count:] = _PADDING
        fields[0, :count] = [s.tokens.item() for s in sequences]
        fields[1, :count] = starts
        fields[2, :count] = fields[7, :count] = np.arange(count)
        fields[3, :count], fields[4, :count] = tables.global_offset, tables.window_offset
        fields[5, :count], fields[6, :count] = tables.window_first, streamed
        self._batch = _Batch(
            tables,
            [s.key for s in sequences],
            [start + 1 for start in starts],
            streamed,
            [s.global_table for s in sequences],
            [s.window_table for s in sequences],
            [s.window_first for s in sequences],
        )
        return tables

    def follow(self, sequences: Sequence[SequenceInput], check: Check) -> BlockTables | None:
        """Write a step that differs from the one before by a token of each sequence; its tables. None where
        there is more to it, or tables must be laid out anew: the arrays are undefined then.

        `check` is made of what has changed. Raises ValueError as it does.
        """
        batch = self._batch
        if batch is None or len(sequences) != len(batch.keys):
            return None
        if (
            [s.key for s in sequences] != batch.keys
            or [s.start for s in sequences] != batch.starts
            or [s.streamed for s in sequences] != batch.streamed
        ):
            return None
        try:
            ids = [s.tokens.item() for s in sequences]
        except ValueError:  # not one token
            return None
        changed = [
            i
            for i, (s, global_, window, first) in enumerate(
                zip(sequences, batch.global_tables, batch.window_tables, batch.window_firsts, strict=True)
            )
            if s.global_table is not global_ or s.window_table is not window or s.window_first != first
        ]
        if changed:
            check([sequences[i] for i in changed])
        self._batch = None  # until all is written
        if min(ids) < 0 or max(ids) >= self._vocab or max(batch.starts) >= self._longest:
            return None
        positions = self._fields[1, : len(ids)]
        positions += 1
        if not self._replace(batch, changed, sequences) or not (positions < batch.tables.covered).all():
            return None
        self._fields[0, : len(ids)] = ids
        batch.starts = [start + 1 for start in batch.starts]
        self._batch = batch
        return batch.tables

    def send(self, stream: Stream, tables: BlockTables) -> None:
        """Copy what was written to the device, behind what `stream` holds."""
        size = 4 * (self._header + len(tables.entries))
        self._device.copy(self._target.address, self._pinned.address, size, stream)
        self._sent.record(stream)

    def _replace(self, batch: _Batch, changed: Sequence[int], sequences: Sequence[SequenceInput]) -> bool:
        """Take over the tables that have changed; False when there is no room."""
        for i in changed:
            sequence = sequences[i]
            if not batch.tables.replace(i, sequence):
                return False
            self._fields[5, i] = batch.tables.window_first[i]
            batch.global_tables[i], batch.window_tables[i] = sequence.global_table, sequence.window_table
            batch.window_firsts[i] = sequence.window_first
        return True
