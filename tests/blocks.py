"""Blocks to keep in files. Their bytes follow from their content hashes: what is read can be judged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from wicore.hmt.moves import Fault
from wicore.tiers.block_file import BlockFile
from wicore.tiers.page_file import pages
from wicore.tiers.slot import PAGE, Bytes, slot_bytes

BLOCK = 2 * PAGE
SIZES = [BLOCK, BLOCK - 200, BLOCK - 64, 100]
"""Whole pages; the trailer fits into the padding; it does not; less than a page."""


def content(number: int) -> bytes:
    """A content hash that tells its number."""
    return hashlib.blake2b(b"%d" % number, digest_size=8).digest() + number.to_bytes(8, "little")


def number_of(hashed: bytes) -> int:
    return int.from_bytes(hashed[8:], "little")


def block(hashed: bytes, size: int) -> Bytes:
    """The bytes of the block of this content."""
    return np.frombuffer(hashlib.shake_128(hashed).digest(size), np.uint8)


def pages_of(count: int, size: int, aligned: bool = True) -> Bytes:
    """Rows, uint8 [count, size]: each at a page's begin, or none."""
    step = -(-size // PAGE) * PAGE
    start = 0 if aligned else 24
    return pages(count, step + PAGE)[:, start : start + size]


@contextmanager
def opened(
    folder: Path, slots: int = 8, size: int = 2 * PAGE, fingerprint: bytes = b"model"
) -> Iterator[BlockFile]:
    folder.mkdir(exist_ok=True)
    file = BlockFile(folder, "global", slots, size, fingerprint)
    try:
        yield file
    finally:
        file.close()


def write(file: BlockFile, numbers: Mapping[int, int]) -> dict[int, Fault]:
    """Put numbered blocks into slots, each the child of the next number; the faults by slot."""
    size = file.block_bytes
    contents = [content(number) for number in numbers.values()]
    rows = pages_of(len(numbers), size)
    for row, hashed in zip(rows, contents, strict=True):
        row[:] = block(hashed, size)
    parents = [content(number + 1) for number in numbers.values()]
    slots = list(numbers)
    return {slots[index]: fault for index, fault in file.write(slots, contents, parents, rows).items()}


def read_all(file: BlockFile) -> tuple[dict[int, int], dict[int, Fault]]:
    """The numbers of the entries that can be read, and the faults of the others, by slot.

    Fails when bytes are wrong.
    """
    entries = file.entries()
    rows = pages_of(len(entries), file.block_bytes)
    faults = file.read([entry.slot for entry in entries], [entry.content for entry in entries], rows)
    found = {}
    for index, entry in enumerate(entries):
        if index not in faults:
            assert np.array_equal(rows[index], block(entry.content, len(rows[index]))), (
                f"wrong bytes: {entry}"
            )
            found[entry.slot] = number_of(entry.content)
    return found, {entries[index].slot: fault for index, fault in faults.items()}


class Calls:
    """Stands in for os.preadv and os.pwritev: notes each call, and does what `effect` says first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[int, list[memoryview]]] = []
        self.effect: Callable[[list[memoryview], int], list[memoryview]] = lambda buffers, offset: buffers
        for name in ("preadv", "pwritev"):
            monkeypatch.setattr(os, name, self._standing_in(getattr(os, name)))

    def _standing_in(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, buffers: list[memoryview], offset: int) -> int:
            self.made.append((offset, buffers))
            return real(fd, self.effect(buffers, offset), offset)

        return call

    def fail(self, number: int, slots: Sequence[int] = range(8), size: int = BLOCK) -> None:
        """Every access to one of these slots fails."""

        def effect(buffers: list[memoryview], offset: int) -> list[memoryview]:
            first, end = offset // slot_bytes(size), (offset + sum(map(len, buffers))) / slot_bytes(size)
            if any(first <= slot < end for slot in slots):
                raise OSError(number, os.strerror(number))
            return buffers

        self.effect = effect
