"""The file tier: blocks of one pool in the slots of one preallocated file.

Every block that is read is verified: that its bytes are those that were written, and that they are the block
asked for, of this model. So the order in which a slot, its trailer and the journal reach the disk decides
only what is missed, never what is right. A write overwrites the slot first and notes it in the journal after:
a crash in between leaves a journal that promises the old block, and a read of that finds another one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wicore.errors import ConfigError
from wicore.hmt.moves import Fault
from wicore.tiers.journal import Journal
from wicore.tiers.page_file import MAX_VECTORS, Call, PageFile, pages
from wicore.tiers.slot import PAGE, TRAILER_BYTES, Bytes, Entry, SlotFormat, digest

__all__ = ["BlockFile", "Entry"]

_RUN_BYTES = 16 << 20
"""Most that one call moves: enough to keep a disk busy, and bounds the memory of a copy."""
_SCAN_SLOTS = 512
"""Trailers that are on their way from the disk together, when the index is rebuilt."""


@dataclass(frozen=True, slots=True)
class _Lane:
    """One block on its way between a row and its slot."""

    index: int
    """In the arguments of the call."""
    slot: int
    row: Bytes
    stage: Bytes
    """As long as a slot, page-aligned: what is not moved straight from or to the row, and the trailer."""
    straight: int
    """Leading bytes of the row that are moved without a copy."""

    def vector(self) -> list[Bytes]:
        """The slot's bytes, in order."""
        if not self.straight:
            return [self.stage]
        return [self.row[: self.straight], self.stage[self.straight :]]


class BlockFile:
    """Blocks by slot. One thread may write and discard while others read, never the same slot."""

    def __init__(self, folder: Path, name: str, slots: int, block_bytes: int, fingerprint: bytes) -> None:
        """Open or make `name.blocks` and `name.journal` in the folder, which nobody else uses (`claim`).

        Blocks are found again under the same fingerprint, slots and block_bytes only. Raises ConfigError
        when there is no room for the file or it cannot be made.
        """
        self._format = SlotFormat(block_bytes, digest(fingerprint))
        if slots < 1:
            raise ConfigError(
                f"hmt.nvme_bytes: has no room for a block of {self._format.stride:,} bytes; raise it,"
                " or set 0",
                param="hmt.nvme_bytes",
            )
        self.slots = slots
        self.block_bytes = block_bytes
        path = folder / f"{name}.blocks"
        self._file = PageFile(path, slots * self._format.stride)
        kept = self._file.kept // self._format.stride
        try:
            self._journal = Journal(
                folder / f"{name}.journal", self._format, slots, kept, lambda: _scan(path, self._format, kept)
            )
        except BaseException:
            self._file.close()
            raise

    @property
    def direct(self) -> bool:
        """Whether the file is read and written past the page cache."""
        return self._file.direct

    def entries(self) -> list[Entry]:
        """The blocks that the file is thought to hold, oldest first; after opening, one of each content."""
        return self._journal.entries()

    def write(
        self,
        slots: Sequence[int],
        contents: Sequence[bytes],
        parents: Sequence[bytes],
        rows: Sequence[Bytes],
    ) -> dict[int, Fault]:
        """Put blocks into slots, in place of what was there; the i-th of each argument belong together.

        Rows are contiguous uint8 [block_bytes] and must not change meanwhile; page-aligned ones are not
        copied. Neighbouring slots are written by one call. Returns Fault.IO by index for those that failed,
        whose slots then hold no entry; never raises OSError. Raises ValueError for other shapes.
        """
        self._check(slots, contents, rows)
        self._check(slots, parents, rows)
        entries = [
            Entry(slot, content, parent, self._journal.next_sequence())
            for slot, content, parent in zip(slots, contents, parents, strict=True)
        ]
        failed: dict[int, Fault] = {}
        for run in self._runs(slots, rows):
            for lane in run:
                lane.stage[lane.straight : lane.row.size] = lane.row[lane.straight :]
                trailer = self._format.trailer(lane.row, entries[lane.index])
                lane.stage[-TRAILER_BYTES:].data[: len(trailer)] = trailer
            failed |= dict.fromkeys(self._move(os.pwritev, run), Fault.IO)
        self._journal.record(
            puts=[entry for index, entry in enumerate(entries) if index not in failed],
            discards=[slots[index] for index in failed],
        )
        return failed

    def read(
        self, slots: Sequence[int], contents: Sequence[bytes], rows: Sequence[Bytes]
    ) -> dict[int, Fault]:
        """Fill rows with the blocks of these contents from the slots that are thought to hold them.

        Rows are as for `write`. Returns by index why a block could not be brought; its row then holds any
        bytes, and every other row holds its block. Never raises OSError. Raises ValueError for other shapes.
        """
        self._check(slots, contents, rows)
        faults: dict[int, Fault] = {}
        for run in self._runs(slots, rows):
            faults |= self._move(os.preadv, run)
            for lane in run:
                if lane.index in faults:
                    continue
                lane.row[lane.straight :] = lane.stage[lane.straight : lane.row.size]
                trailer = lane.stage[-TRAILER_BYTES:].tobytes()
                fault = self._format.fault(lane.row, trailer, contents[lane.index])
                if fault:
                    faults[lane.index] = fault
        return faults

    def discard(self, slots: Sequence[int]) -> None:
        """The slots hold no block any more. May wait for the disk, rarely; never raises OSError."""
        self._journal.record(discards=slots)

    def close(self) -> None:
        """Idempotent; not while a call is under way. Reads and writes after it give Fault.IO."""
        self._file.close()
        self._journal.close()

    def _check(self, slots: Sequence[int], hashes: Sequence[bytes], rows: Sequence[Bytes]) -> None:
        for slot, hashed, row in zip(slots, hashes, rows, strict=True):
            if not 0 <= slot < self.slots:
                raise ValueError(f"slot {slot} of {self.slots}")
            if len(hashed) != 16:
                raise ValueError(f"a hash of {len(hashed)} bytes instead of 16")
            if row.shape != (self.block_bytes,) or row.dtype != np.uint8 or not row.flags.c_contiguous:
                raise ValueError(
                    f"a row of {row.dtype} {row.shape} instead of contiguous uint8 ({self.block_bytes},)"
                )

    def _runs(self, slots: Sequence[int], rows: Sequence[Bytes]) -> Iterator[list[_Lane]]:
        """The slots in runs of such that neighbour each other in the file."""
        longest = max(1, min(MAX_VECTORS // 2, _RUN_BYTES // self._format.stride))
        run: list[int] = []
        for index in sorted(range(len(slots)), key=slots.__getitem__):
            if run and (slots[index] != slots[run[-1]] + 1 or len(run) == longest):
                yield self._lanes(run, slots, rows)
                run = []
            run.append(index)
        if run:
            yield self._lanes(run, slots, rows)

    def _lanes(self, run: list[int], slots: Sequence[int], rows: Sequence[Bytes]) -> list[_Lane]:
        stages = pages(len(run), self._format.stride)
        return [
            _Lane(index, slots[index], rows[index], stage, self._straight(rows[index]))
            for index, stage in zip(run, stages, strict=True)
        ]

    def _straight(self, row: Bytes) -> int:
        """Bytes of a row that need no copy. Direct access is from aligned memory, by whole pages."""
        return 0 if self.direct and row.ctypes.data % PAGE else self._format.whole_pages

    def _move(self, call: Call, run: list[_Lane]) -> dict[int, Fault]:
        """Read or write neighbouring slots; the faults by index."""
        stride = self._format.stride
        try:
            moved = self._file.move(
                call, [part for lane in run for part in lane.vector()], run[0].slot * stride
            )
        except OSError:
            if len(run) == 1:
                return {run[0].index: Fault.IO}
            # One by one, so that a bad sector costs its own block only.
            return {index: fault for lane in run for index, fault in self._move(call, [lane]).items()}
        return {lane.index: Fault.TRUNCATED for lane in run[moved // stride :]}


def _scan(path: Path, slot_format: SlotFormat, slots: int) -> Iterator[Entry]:
    """The entries that the trailers of the first `slots` slots tell of. Raises OSError.

    Through the page cache, with many reads under way at once: they are short and far apart.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for first in range(0, slots, _SCAN_SLOTS):
            batch = range(first, min(first + _SCAN_SLOTS, slots))
            for slot in batch:
                os.posix_fadvise(fd, slot_format.trailer_offset(slot), TRAILER_BYTES, os.POSIX_FADV_WILLNEED)
            for slot in batch:
                entry = slot_format.entry(slot, _trailer(fd, slot_format.trailer_offset(slot)))
                if entry:
                    yield entry
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _trailer(fd: int, offset: int) -> bytes:
    try:
        return os.pread(fd, TRAILER_BYTES, offset)
    except OSError:  # a bad sector: there is no entry there
        return b""
