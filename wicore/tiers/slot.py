"""How a block lies in a file: its bytes, padding, and a trailer that says what they are.

    | payload, block_bytes | padding | trailer, 128 bytes |      in all a multiple of 4096 bytes

The trailer is the slot's last 128 bytes. It has the padding's room where that is enough, and a page of its
own where it is not. It is self-describing: the file's index can be rebuilt from the trailers alone, and a
block that is read is known to be the one that was asked for, whatever any index said.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from wicore.hmt.moves import Fault

Bytes = NDArray[np.uint8]

PAGE = 4096
"""What direct access aligns memory, offsets and lengths to."""
TRAILER_BYTES = 128

_MAGIC = b"WiCoreK1"
_FIELDS = struct.Struct("<8s16s16s16sQQ")
"""Magic and version, fingerprint, content, parent, payload length, sequence number."""
_SEALED = _FIELDS.size + 16
"""The fields and the xxh3_128 of payload and fields; zeros fill the rest."""


class Entry(NamedTuple):
    """A block in a file."""

    slot: int
    content: bytes
    """Content hash, 16 bytes."""
    parent: bytes
    """The hash of the block that it continues, 16 bytes."""
    sequence: int
    """Later writes have higher numbers."""


def slot_bytes(block_bytes: int) -> int:
    """What a block of `block_bytes` takes of a file."""
    return -(-(block_bytes + TRAILER_BYTES) // PAGE) * PAGE


@dataclass(frozen=True, slots=True)
class SlotFormat:
    """The slots of one file."""

    block_bytes: int
    fingerprint: bytes
    """16 bytes; see `digest`."""

    @property
    def stride(self) -> int:
        """Bytes from slot to slot."""
        return slot_bytes(self.block_bytes)

    @property
    def whole_pages(self) -> int:
        """Bytes of the payload that fill whole pages; what is left of it shares a page with padding."""
        return self.block_bytes // PAGE * PAGE

    def trailer_offset(self, slot: int) -> int:
        """Where in the file the slot's trailer begins."""
        return (slot + 1) * self.stride - TRAILER_BYTES

    def trailer(self, payload: Bytes, entry: Entry) -> bytes:
        """The trailer of a block, without the zeros that fill it up."""
        fields = _FIELDS.pack(
            _MAGIC, self.fingerprint, entry.content, entry.parent, self.block_bytes, entry.sequence
        )
        return fields + _checksum(payload, fields)

    def fault(self, payload: Bytes, trailer: bytes, content: bytes) -> Fault | None:
        """What is wrong with a slot that was read for `content`; None when its bytes are that block's."""
        fields = trailer[: _FIELDS.size]
        if trailer[_FIELDS.size : _SEALED] != _checksum(payload, fields):
            return Fault.CHECKSUM
        entry = self.entry(0, trailer)
        return None if entry and entry.content == content else Fault.FOREIGN

    def entry(self, slot: int, trailer: bytes) -> Entry | None:
        """What a trailer says of its slot, the payload unseen; None when it is not one of this format."""
        if len(trailer) < _SEALED:
            return None
        magic, fingerprint, content, parent, length, sequence = _FIELDS.unpack_from(trailer)
        if (magic, fingerprint, length) != (_MAGIC, self.fingerprint, self.block_bytes):
            return None
        return Entry(slot, content, parent, sequence)


def digest(fingerprint: bytes) -> bytes:
    """A fingerprint of any length in 16 bytes."""
    return hashlib.blake2b(fingerprint, digest_size=16).digest()


def _checksum(payload: Bytes, fields: bytes) -> bytes:
    state = xxhash.xxh3_128(payload.data)
    state.update(fields)
    return state.digest()
