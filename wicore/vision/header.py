"""The header of an image file: how large the image is, and which way up. Pure.

Sizes are read from where decoders read them, so that what is decoded is as large as was said. Orientations
are read here for every format: which of them a decoder applies differs between OpenCV's versions.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from wicore.errors import InvalidRequest
from wicore.vision import png

_MARKER = re.compile(rb"\xff([^\x00\xff])", re.DOTALL)
_PARAMETERLESS = {0x01, *range(0xD0, 0xD8)}
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG's start-of-frame markers; the three are tables and the like."""
_MOST_PARTS = 10_000
"""Segments or chunks that are looked at, so that a file of empty ones holds up no door; files have few."""
_EXIF_ORIENTATION = 0x0112
_OTHERS = (
    (0, b"II*\0", "a TIFF"),
    (0, b"MM\0*", "a TIFF"),
    (4, b"ftypavi", "an AVIF"),
    (4, b"ftyphei", "a HEIC"),
    (4, b"ftypmif1", "a HEIC"),
    (4, b"ftyp", "a video"),
    (4, b"jP  ", "a JPEG 2000"),
    (4, b"JXL ", "a JPEG XL"),
    (0, b"\xff\x0a", "a JPEG XL"),
    (0, b"\0\0\1\0", "an icon"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"%PDF", "a PDF"),
    (0, b"<svg", "an SVG"),
    (0, b"<?xml", "an SVG or another XML"),
)
"""Files that are sent for images: where which bytes stand, and what they are."""


class Header(NamedTuple):
    """Of an image as it is stored."""

    width: int
    height: int
    """In pixels."""
    orientation: int = 1
    """EXIF's, from 1 to 8: how to turn it to see it upright."""

    @property
    def transposed(self) -> bool:
        """Whether what is stored as rows are columns of the upright image."""
        return self.orientation > 4

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright image."""
        return (self.height, self.width) if self.transposed else (self.width, self.height)


def read_header(data: bytes) -> Header:
    """Of a PNG, JPEG, WebP, GIF or BMP file. What follows the header may still be damaged.

    Raises InvalidRequest for other formats, by name if they are known, for a damaged header, and for a PNG
    that is cut off.
    """
    found = next(((name, read) for at, magic, name, read in _READERS if data.startswith(magic, at)), None)
    if found is None:
        raise InvalidRequest(f"{_other(data)}: send a PNG, JPEG, WebP, GIF or BMP")
    name, read = found
    try:
        header = read(data)
    except (struct.error, LookupError):
        raise InvalidRequest(f"a {name} that is damaged or cut off: send the whole file") from None
    if header.width < 1 or header.height < 1:
        raise InvalidRequest(
            f"a {name} of {header.width} x {header.height} pixels: send one that shows something"
        )
    return header


def _other(data: bytes) -> str:
    names = (name for at, magic, name in _OTHERS if data.startswith(magic, at))
    return next(names, "not an image that can be read")


def _png(data: bytes) -> Header:
    if data[12:16] != b"IHDR":
        raise LookupError
    width, height = struct.unpack_from(">II", data, 16)
    exif = [data[content] for name, content in png.chunks(data) if name == b"eXIf"]
    return Header(width, height, _orientation(exif[0] if exif else b""))


def _jpeg(data: bytes) -> Header:
    """Frame and EXIF stand before the first scan, in any order; of several EXIF segments the first counts."""
    at, size, exif = 2, None, None
    for _ in range(_MOST_PARTS):
        if (found := _MARKER.search(data, at)) is None:
            raise LookupError
        marker, at = data[found.end() - 1], found.end()
        if marker in _PARAMETERLESS:
            continue
        if marker in (0xD9, 0xDA):
            break
        (length,) = struct.unpack_from(">H", data, at)
        if marker in _FRAMES and size is None:
            height, width = struct.unpack_from(">HH", data, at + 3)
            size = width, height
        if marker == 0xE1 and exif is None and data.startswith(b"Exif\0\0", at + 2):
            exif = data[at + 2 : at + length]
        at += length
    if size is None:
        raise LookupError
    return Header(*size, _orientation(exif or b""))


def _webp(data: bytes) -> Header:
    """The size is that of the canvas, if there is one ("VP8X"), or of the one frame."""
    if data[:4] != b"RIFF":
        raise LookupError
    match data[12:16]:
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            # The upper two bits are a scale, which no decoder applies.
            return Header(width & 0x3FFF, height & 0x3FFF)
        case b"VP8L":
            (bits,) = struct.unpack_from("<I", data, 21)
            return Header(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
        case b"VP8X":
            low, high = struct.unpack_from("<IH", data, 24)
            width, height = 1 + (low & 0xFFFFFF), 1 + (high << 8 | low >> 24)
            return Header(width, height, _orientation(_riff_chunk(data, b"EXIF")))
        case _:
            raise LookupError


def _riff_chunk(data: bytes, wanted: bytes) -> bytes:
    """Empty if there is none."""
    at = 12
    for _ in range(_MOST_PARTS):
        if at + 8 > len(data):
            break
        name, size = struct.unpack_from("<4sI", data, at)
        if name == wanted:
            return data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
    return b""


def _gif(data: bytes) -> Header:
    """The size is that of the canvas, which a frame does not exceed."""
    return Header(*struct.unpack_from("<HH", data, 6))


def _bmp(data: bytes) -> Header:
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    if header_bytes == 12:
        return Header(*struct.unpack_from("<HH", data, 18))
    width, height = struct.unpack_from("<ii", data, 18)
    return Header(width, abs(height))  # below zero: the rows stand from top to bottom


def _orientation(exif: bytes) -> int:
    """1, as it stands, where EXIF says nothing that can be understood."""
    tiff = exif.removeprefix(b"Exif\0\0")
    if tiff[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    order = "<" if tiff[:1] == b"I" else ">"
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == _EXIF_ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


_READERS = (
    (0, png.SIGNATURE, "PNG", _png),
    (0, b"\xff\xd8\xff", "JPEG", _jpeg),
    (0, b"GIF8", "GIF", _gif),
    (0, b"BM", "BMP", _bmp),
    (8, b"WEBP", "WebP", _webp),
)
