"""What a pass needs to know besides weights and KV, as int32 arrays that travel to the device in one copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wicore.engine.tensorrt.attention import MASS_ONLY
from wicore.engine.tensorrt.block_tables import BlockTables, Ints
from wicore.engine.tensorrt.device import Device, Stream
from wicore.engine.tensorrt.limits import MASS_ROWS
from wicore.engine.tensorrt.passes import Pass
from wicore.engine.tensorrt.prompt_attention import prompt_tiles

_ALIGNMENT = 256


@dataclass(frozen=True)
class PassArrays:
    """Rows and sequences of a pass. Padding rows have token 0 at position -1 of the first sequence. Rows of
    an image have token 0 too: their ids are no embedding's."""

    ids: Ints
    """[rows]"""
    positions: Ints
    row_sequence: Ints
    sequences: Ints
    """[4, sequences]: global offset, window offset, first window block, streamed blocks."""
    sampling: Ints
    """[sequences]: rows that sample; the rest is -1."""
    image_end: Ints | None
    """[rows]: the position where the row's image ends, else 0. None: text alone."""


def pass_arrays(work: Pass, tables: BlockTables, rows: int, sequences: int) -> PassArrays:
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
    places = [tables.index[piece.sequence.key] for piece in pieces]
    found = by_sequence[:, : len(pieces)]
    found[0], found[1] = tables.global_offset[places], tables.window_offset[places]
    found[2] = tables.window_first[places]
    found[3] = [piece.sequence.streamed for piece in pieces]
    ends = _image_ends(work, rows)
    if ends is not None:
        ids[ends > 0] = 0
    return PassArrays(ids, positions, row_sequence, by_sequence, _sampling_rows(work, sequences), ends)


def _image_ends(work: Pass, rows: int) -> Ints | None:
    if work.decode:
        return None
    ends = np.zeros(rows, np.int32)
    for first, end, values in work.images():
        ends[first : first + len(values)] = end
    return ends if ends.any() else None


def tiles(work: Pass) -> Ints:
    """The tiles of a pass's chunks."""
    return prompt_tiles([] if work.decode or work.by_row else _chunks(work))


def listed(work: Pass) -> Ints:
    """Rows of a prompt pass that go through the kernels for single rows: single tokens, and a few rows of
    each chunk for their attention mass."""
    if work.decode:
        return np.empty(0, np.int32)
    if work.by_row:
        return np.arange(work.rows, dtype=np.int32)
    rows = [np.arange(work.singles)]
    for first, count, _, _ in _chunks(work):
        ends = np.arange(1, MASS_ROWS + 1) * count // MASS_ROWS
        rows.append(first + np.unique(ends[ends > 0]) - 1 + MASS_ONLY)
    return np.concatenate(rows).astype(np.int32)


def _sampling_rows(work: Pass, room: int) -> Ints:
    """Rows of the pass that sample, int32 [room]; the rest is -1."""
    rows = np.full(room, -1, np.int32)
    ends = np.cumsum([piece.count for piece in work.pieces]) - 1
    found = [end for end, piece in zip(ends.tolist(), work.pieces, strict=True) if piece.samples]
    rows[: len(found)] = found
    return rows


def _chunks(work: Pass) -> Iterator[tuple[int, int, int, int]]:
    """(first row, rows, sequence, position of the first) of every chunk of a prompt pass."""
    at = work.singles
    for index, piece in enumerate(work.pieces[work.singles :], work.singles):
        yield at, piece.count, index, piece.start
        at += piece.count


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
