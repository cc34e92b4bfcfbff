"""What a pass needs to know besides weights and KV, as int32 arrays that travel to the device in one copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import KVLayout, SequenceInput
from wicore.engine.tensorrt.device import Device, Stream
from wicore.engine.tensorrt.passes import Pass

Ints = NDArray[np.int32]

_ALIGNMENT = 256


@dataclass(frozen=True)
class TableEntries:
    """Where a sequence's tables are in a step's concatenated ones."""

    global_offset: int
    blocks: int
    """Entries of its global table: as many as its positions need."""
    window_offset: int
    window_first: int


class BlockTables:
    """The block tables of a step's sequences, cut to what the step reads, in one array: first all global
    tables, then all window tables."""

    def __init__(self, sequences: Sequence[SequenceInput], layout: KVLayout) -> None:
        size = layout.block_tokens
        self.by_key: dict[int, TableEntries] = {}
        parts: list[Ints] = []
        at = 0
        ends = [-(-(s.start + len(s.tokens)) // size) for s in sequences]
        offsets = []
        for sequence, end in zip(sequences, ends, strict=True):
            parts.append(sequence.global_table[:end])
            offsets.append(at)
            at += end
        self.global_entries = at
        for sequence, end, offset in zip(sequences, ends, offsets, strict=True):
            first = max(0, sequence.start - layout.window + 1) // size
            parts.append(sequence.window_table[first - sequence.window_first : end - sequence.window_first])
            self.by_key[sequence.key] = TableEntries(offset, end, at, first)
            at += end - first
        self.entries: Ints = (
            np.concatenate(parts).astype(np.int32, copy=False) if parts else np.zeros(0, np.int32)
        )


def entry_capacity(layout: KVLayout, sequences: int, max_context: int, step_tokens: int) -> int:
    """The most entries that the tables of so many sequences have."""
    size = layout.block_tokens
    windows = min(max_context, layout.window + step_tokens)
    return sequences * (-(-max_context // size) + -(-windows // size) + 1)


@dataclass(frozen=True)
class PassArrays:
    """Rows and sequences of a pass. Padding rows have token 0 at position -1 of the first sequence."""

    ids: Ints
    """[rows]"""
    positions: Ints
    row_sequence: Ints
    sequences: Ints
    """[4, sequences]: global offset, window offset, first window block, streamed blocks."""


def pass_arrays(work: Pass, tables: Mapping[int, TableEntries], rows: int, sequences: int) -> PassArrays:
    """The arrays of a pass, padded to `rows` and `sequences`."""
    ids, positions = np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
    row_sequence, by_sequence = np.zeros(rows, np.int32), np.zeros((4, sequences), np.int32)
    singles, pieces = work.singles, work.pieces
    ids[:singles] = [piece.sequence.tokens[piece.first] for piece in pieces[:singles]]
    positions[:singles] = [piece.start for piece in pieces[:singles]]
    row_sequence[:singles] = np.arange(singles)
    at = singles
    for index, piece in enumerate(pieces[singles:], singles):
        part = slice(at, at + piece.count)
        ids[part] = piece.sequence.tokens[piece.first : piece.first + piece.count]
        positions[part] = np.arange(piece.start, piece.start + piece.count)
        row_sequence[part] = index
        at += piece.count
    entries = [tables[piece.sequence.key] for piece in pieces]
    by_sequence[:, : len(pieces)] = [
        [entry.global_offset for entry in entries],
        [entry.window_offset for entry in entries],
        [entry.window_first for entry in entries],
        [piece.sequence.streamed for piece in pieces],
    ]
    return PassArrays(ids, positions, row_sequence, by_sequence)


class Upload:
    """A device buffer that a pass's arrays are written to, through pinned memory.

    There are two pinned buffers, so that the next pass's arrays can be written while the last one's are
    still being copied. Arrays of the same sizes get the same addresses each time: a graph holds them.
    """

    def __init__(self, device: Device, capacity: int) -> None:
        """`capacity` is in bytes, without padding."""
        capacity += 32 * _ALIGNMENT
        self._device = device
        self._target = device.allocate(capacity, "the arrays of a step")
        self._pinned = [device.allocate_host(capacity) for _ in range(2)]
        self._sent = [device.event() for _ in self._pinned]
        self._used = [False] * len(self._pinned)
        self._next = 0

    def send(self, stream: Stream, arrays: Sequence[NDArray[Any]]) -> list[int]:
        """Copy the arrays to the device, behind what `stream` holds; their addresses there."""
        turn = self._next
        self._next = (turn + 1) % len(self._pinned)
        if self._used[turn]:
            self._sent[turn].wait()
        pinned, at, addresses = self._pinned[turn].array, 0, []
        for array in arrays:
            end = at + array.nbytes
            pinned[at:end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            addresses.append(self._target.address + at)
            at = -(-end // _ALIGNMENT) * _ALIGNMENT
        self._device.copy(self._target.address, pinned.ctypes.data, at, stream)
        self._sent[turn].record(stream)
        self._used[turn] = True
        return addresses
