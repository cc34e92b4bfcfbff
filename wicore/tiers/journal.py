"""The index of a block file on disk: what was put where, one record a change.

The journal is a hint. A block is verified against its slot's trailer when it is read, so a record that is
lost, late or wrong costs a miss and never gives wrong bytes. Hence nothing here waits for the disk: a killed
process leaves its records in the page cache, and after a power cut the last of them may be missing.
"""

from __future__ import annotations

import itertools
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import xxhash

from wicore.tiers.page_file import unusable
from wicore.tiers.slot import Entry, SlotFormat

log = logging.getLogger(__name__)

_MAGIC = b"WiCoreJ1"
_HEAD = struct.Struct("<8s16sQQ")
"""Magic and version, fingerprint, slots, bytes a block; then their xxh3_64."""
_RECORD = struct.Struct("<IIQ16s16s")
"""Operation, slot, sequence number, content, parent; then their xxh3_64."""
_RECORD_BYTES = _RECORD.size + 8
_PUT, _DISCARD = 1, 2
_SLACK = 1024
"""Records that a journal may have beyond those it needs, however few these are."""
_GROWTH = 4
"""Records a live entry at which the journal is written anew."""


class Journal:
    """The live entries of one block file, in memory and on disk. Thread-safe, `close` apart."""

    def __init__(
        self, path: Path, slot_format: SlotFormat, slots: int, kept: int, scan: Callable[[], Iterable[Entry]]
    ) -> None:
        """Recover the entries of the first `kept` of `slots` slots, those that the file still had.

        `scan` finds them in the slots themselves, for when the journal is unreadable. A readable journal of
        another fingerprint or geometry means that every block is foreign: none is taken. Raises ConfigError
        when the journal cannot be written.
        """
        self._path = path
        self._head = _sealed(_HEAD.pack(_MAGIC, slot_format.fingerprint, slots, slot_format.block_bytes))
        self._lock = threading.Lock()
        self._live: dict[int, bytes] = {}
        """The put of each live slot, oldest first."""
        self._end = 0
        self._limit = 0
        self._fd = -1
        try:
            if not self._replay(kept):
                entries = sorted(scan(), key=lambda entry: entry.sequence)
                self._live = {entry.slot: _put(entry) for entry in entries}
                if kept:
                    log.info("%s: no readable journal; %d blocks found in their slots", path, len(entries))
            self._keep_newest()
            self._rewrite()
        except OSError as err:
            self.close()
            raise unusable(path, err) from None
        last = max((_entry(record).sequence for record in self._live.values()), default=0)
        self._sequence = itertools.count(last + 1)

    def entries(self) -> list[Entry]:
        """The live entries, oldest first."""
        with self._lock:
            return [_entry(record) for record in self._live.values()]

    def next_sequence(self) -> int:
        return next(self._sequence)

    def record(self, puts: Sequence[Entry] = (), discards: Iterable[int] = ()) -> None:
        """Note that blocks are in their slots, in place of what was there, and that slots hold none.

        Never raises OSError: what cannot be written is missed after the next start. It may wait for a
        journal that is being written anew.
        """
        records = [_put(entry) for entry in puts]
        with self._lock:
            for entry, record in zip(puts, records, strict=True):
                self._live.pop(entry.slot, None)  # so that it goes to the end
                self._live[entry.slot] = record
            for slot in discards:
                if self._live.pop(slot, None):
                    records.append(_sealed(_RECORD.pack(_DISCARD, slot, 0, b"", b"")))
            self._append(b"".join(records))

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _append(self, data: bytes) -> None:
        try:
            # At the end that we know: what a failed write left behind it is overwritten.
            _write_all(self._fd, data, self._end)
            self._end += len(data)
            if self._end > self._limit:
                self._rewrite()
        except OSError as err:
            self._limit = max(self._limit, 2 * self._end)  # not again at once
            log.warning("%s: %s; blocks written now are missed after a restart", self._path, err.strerror)

    def _rewrite(self) -> None:
        """Replace the journal by one of live entries only; at any moment one of the two is in place."""
        data = self._head + b"".join(self._live.values())
        temporary = self._path.with_name(self._path.name + ".new")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, data, 0)
            os.fsync(fd)
            os.rename(temporary, self._path)
        except OSError:
            os.close(fd)
            temporary.unlink(missing_ok=True)
            raise
        self.close()
        self._fd, self._end = fd, len(data)
        self._limit = _GROWTH * len(data) + _SLACK * _RECORD_BYTES

    def _replay(self, kept: int) -> bool:
        """Take the entries from the journal, up to the first torn record; False without a readable head."""
        try:
            data = self._path.read_bytes()
        except OSError:
            return False
        head = data[: len(self._head)]
        if not head.startswith(_MAGIC) or not _intact(head):
            return False
        if head != self._head:
            log.info("%s: its blocks are another model's or of another size; starting empty", self._path)
            return True
        for start in range(len(head), len(data) - _RECORD_BYTES + 1, _RECORD_BYTES):
            record = data[start : start + _RECORD_BYTES]
            if not _intact(record):
                break
            operation, slot, *_ = _RECORD.unpack_from(record)
            self._live.pop(slot, None)
            if operation == _PUT and slot < kept:
                self._live[slot] = record
        return True

    def _keep_newest(self) -> None:
        """Of entries of one content keep the last."""
        slots = {_entry(record).content: slot for slot, record in self._live.items()}
        kept = set(slots.values())
        self._live = {slot: record for slot, record in self._live.items() if slot in kept}


def _put(entry: Entry) -> bytes:
    return _sealed(_RECORD.pack(_PUT, entry.slot, entry.sequence, entry.content, entry.parent))


def _entry(record: bytes) -> Entry:
    _, slot, sequence, content, parent = _RECORD.unpack_from(record)
    return Entry(slot, content, parent, sequence)


def _sealed(fields: bytes) -> bytes:
    return fields + xxhash.xxh3_64_digest(fields)


def _intact(sealed: bytes) -> bool:
    return sealed == _sealed(sealed[:-8])


def _write_all(fd: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        count = os.pwrite(fd, left, offset)
        left, offset = left[count:], offset + count
