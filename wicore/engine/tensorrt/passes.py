"""How a step is cut into passes over the layers.

A pass is of one of two kinds. `decode` passes have few rows, each of which goes through the kernels made for
single rows, and are replayed as CUDA graphs, one a bucket of row counts. The others take whole prompt chunks,
and whatever holds an image: its rows see each other, so one pass has all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import ImageRows, SequenceInput

SLICE = 64
"""Most rows of one sequence that go through the decode kernels together: a tile of the matrix product."""


@dataclass(slots=True)
class Piece:
    """New tokens `first .. first + count - 1` of a sequence; not to be changed (see `wicore.engine.base`)."""

    sequence: SequenceInput
    first: int
    count: int

    @property
    def last(self) -> bool:
        """Whether it ends with the sequence's last new token."""
        return self.first + self.count == len(self.sequence.tokens)

    @property
    def samples(self) -> bool:
        return self.last and self.sequence.sampling is not None

    @property
    def start(self) -> int:
        """Position of its first token."""
        return self.sequence.start + self.first

    @property
    def images(self) -> list[ImageRows]:
        """Those that have some of its positions."""
        end = self.start + self.count
        return [image for image in self.sequence.images if image.start < end and image.end > self.start]


@dataclass(frozen=True, slots=True)
class Pass:
    pieces: tuple[Piece, ...]
    decode: bool
    """Whether a graph does it."""
    by_row: bool = False
    """Of a pass that no graph does: whether its rows go through the kernels for single rows all the same."""

    @property
    def rows(self) -> int:
        return sum(piece.count for piece in self.pieces)

    @property
    def singles(self) -> int:
        """Pieces of one token that come before all others."""
        return sum(1 for _ in takewhile(lambda piece: piece.count == 1, self.pieces))

    def images(self) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Stretches of rows that are of one image: (first row, position where the image ends, what enters the
        first layer there: float32 [rows, hidden])."""
        at = 0
        for piece in self.pieces:
            start, end = piece.start, piece.start + piece.count
            for image in piece.images:
                first = max(image.start, start)
                yield at + first - start, image.end, image.rows[first - image.start : end - image.start]
            at += piece.count


def cut(
    sequences: Sequence[SequenceInput], *, capacity: int, decode_capacity: int, invariant: bool
) -> Iterator[Pass]:
    """The passes of a step, in the order they must run: at most `capacity` rows each, `decode_capacity` of a
    decode pass, and never more pieces than that. With `invariant` every row goes through the kernels for
    single rows: a pass is a decode pass, unless it has an image.

    A sequence's slices then begin at fixed rows of its chunk, whoever shares the pass, so that whatever is
    summed over a slice is summed alike. Raises ValueError for an image that no pass holds.
    """
    singles = [Piece(s, 0, 1) for s in sequences if len(s.tokens) == 1 and not s.images]
    chunks = [s for s in sequences if len(s.tokens) > 1 or s.images]
    for s in chunks:
        for image in s.images:
            if len(image.rows) > capacity:
                raise ValueError(
                    f"sequence {s.key}: an image of {len(image.rows)} tokens, and a pass has {capacity} rows"
                )
    if invariant or not chunks:
        size = min(SLICE, decode_capacity)
        slices = [piece for s in chunks for piece in _slices(s, size)]
        for pieces in _packed([*singles, *slices], decode_capacity):
            images = any(piece.images for piece in pieces)
            yield Pass(pieces, decode=not images, by_row=images)
        return
    while len(singles) >= decode_capacity:
        yield Pass(tuple(singles[:decode_capacity]), decode=True)
        del singles[:decode_capacity]
    for pieces in _filled(singles, chunks, capacity, decode_capacity):
        yield Pass(pieces, decode=all(piece.count == 1 and not piece.images for piece in pieces))


def _slices(sequence: SequenceInput, size: int) -> Iterator[Piece]:
    """A chunk by `size` rows, fewer before an image that would be cut, more where one is larger."""
    first, count = 0, len(sequence.tokens)
    while first < count:
        end = min(first + size, count)
        if (image := _image_within(sequence, end)) is not None:
            begin = image.start - sequence.start
            end = begin if begin > first else image.end - sequence.start
        yield Piece(sequence, first, end - first)
        first = end


def _packed(pieces: Sequence[Piece], capacity: int) -> Iterator[tuple[Piece, ...]]:
    """Whole pieces, in order."""
    together: list[Piece] = []
    rows = 0
    for piece in pieces:
        if together and rows + piece.count > capacity:
            yield tuple(together)
            together, rows = [], 0
        together.append(piece)
        rows += piece.count
    if together:
        yield tuple(together)


def _filled(
    singles: Sequence[Piece], chunks: Sequence[SequenceInput], capacity: int, most: int
) -> Iterator[tuple[Piece, ...]]:
    """Chunks cut wherever a pass is full, of rows or of `most` pieces, or has no room for a whole image."""
    together, room = list(singles), capacity - len(singles)
    for sequence in chunks:
        first = 0
        while first < len(sequence.tokens):
            count, full = min(room, len(sequence.tokens) - first), False
            if (image := _image_within(sequence, first + count)) is not None:
                count, full = max(0, image.start - sequence.start - first), True
            if count:
                together.append(Piece(sequence, first, count))
            first += count
            room -= count
            if full or not room or len(together) == most:
                yield tuple(together)
                together, room = [], capacity
    if together:
        yield tuple(together)


def _image_within(sequence: SequenceInput, end: int) -> ImageRows | None:
    """The image that a piece which ends with so many of the new tokens would be cut by."""
    position = sequence.start + end
    return next((image for image in sequence.images if image.start < position < image.end), None)
