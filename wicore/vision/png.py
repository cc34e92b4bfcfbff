"""The chunks of a PNG. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MOST_CHUNKS = 100_000
"""So that a file of empty chunks holds up no door; real ones have one for every few thousand bytes."""


def chunks(data: bytes) -> Iterator[tuple[bytes, slice]]:
    """Name of each chunk, to IEND, and where its content is in the file.

    Raises LookupError where a chunk does not lie within the file, or IEND does not come.
    """
    at = len(SIGNATURE)
    for _ in range(_MOST_CHUNKS):
        content = at + 8
        if content > len(data):
            raise LookupError("no IEND")
        length, name = struct.unpack_from(">I4s", data, at)
        at = content + length + 4  # a checksum follows
        if at > len(data):
            raise LookupError(f"{name!r} of {length} bytes is cut off")
        yield name, slice(content, content + length)
        if name == b"IEND":
            return
    raise LookupError(f"over {_MOST_CHUNKS} chunks")


def still(data: bytes) -> bytes:
    """The same image as a file of critical chunks alone: what the colours are, and no animation.

    OpenCV is sound with still images; of an animated one whose data is damaged it shows what was in memory.

    Raises LookupError as `chunks` does.
    """
    kept = (data[part.start - 8 : part.stop + 4] for name, part in chunks(data) if name[:1].isupper())
    return SIGNATURE + b"".join(kept)
