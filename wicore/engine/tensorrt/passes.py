"""How a step is cut into passes over the layers.

A pass is of one of two kinds. `decode` passes have few rows, each of which goes through the kernels made for
single rows, and are replayed as CUDA graphs, one a bucket of row counts. The others take whole prompt chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from wicore.engine.base import SequenceInput

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


@dataclass(frozen=True, slots=True)
class Pass:
    pieces: tuple[Piece, ...]
    decode: bool

    @property
    def rows(self) -> int:
        return sum(piece.count for piece in self.pieces)

    @property
    def singles(self) -> int:
        """Pieces of one token that come before all others."""
        return sum(1 for _ in takewhile(lambda piece: piece.count == 1, self.pieces))


def cut(
    sequences: Sequence[SequenceInput], *, capacity: int, decode_capacity: int, invariant: bool
) -> Iterator[Pass]:
    """The passes of a step, in the order they must run: at most `capacity` rows each, `decode_capacity` of a
    decode pass, and never more pieces than that. With `invariant` every pass is a decode pass.

    A sequence's slices then begin at fixed rows of its chunk, whoever shares the pass, so that whatever is
    summed over a slice is summed alike.
    """
    singles = [Piece(s, 0, 1) for s in sequences if len(s.tokens) == 1]
    chunks = [s for s in sequences if len(s.tokens) > 1]
    if invariant or not chunks:
        size = min(SLICE, decode_capacity)
        slices = [
            Piece(s, first, min(size, len(s.tokens) - first))
            for s in chunks
            for first in range(0, len(s.tokens), size)
        ]
        for pieces in _packed([*singles, *slices], decode_capacity):
            yield Pass(pieces, decode=True)
        return
    while len(singles) >= decode_capacity:
        yield Pass(tuple(singles[:decode_capacity]), decode=True)
        del singles[:decode_capacity]
    for pieces in _filled(singles, chunks, capacity, decode_capacity):
        yield Pass(pieces, decode=all(piece.count == 1 for piece in pieces))


def _packed(pieces: Sequence[Piece], capacity: int) -> Iterator[tuple[Piece, ...]]:
    """Whole pieces, in order."""
    together: list[Piece] = []
    rows = 0
    for piece in pieces:
        if rows + piece.count > capacity:
            yield tuple(together)
            together, rows = [], 0
        together.append(piece)
        rows += piece.count
    if together:
        yield tuple(together)


def _filled(
    singles: Sequence[Piece], chunks: Sequence[SequenceInput], capacity: int, most: int
) -> Iterator[tuple[Piece, ...]]:
    """Chunks cut wherever a pass is full, of rows or of `most` pieces."""
    together, room = list(singles), capacity - len(singles)
    for sequence in chunks:
        first = 0
        while first < len(sequence.tokens):
            count = min(room, len(sequence.tokens) - first)
            together.append(Piece(sequence, first, count))
            first += count
            room -= count
            if not room or len(together) == most:
                yield tuple(together)
                together, room = [], capacity
    if together:
        yield tuple(together)
