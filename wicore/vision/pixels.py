"""Image files to the pixels that a vision tower takes. Pure."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import imagesize  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from wicore.errors import InvalidRequest, TooLarge

_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF")
_UNREADABLE = "not an image that can be read; send a PNG, JPEG, WebP, GIF or BMP"
_MIN_CROP, _MAX_CROPS, _MIN_RATIO = 256, 4, 1.2
"""Gemma's pan-and-scan: least side of a crop in pixels, most crops, least ratio of the sides."""


class Crop(NamedTuple):
    """A part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file, or a part of what it shows."""

    data: bytes
    crop: Crop | None = None

    @property
    def digest(self) -> bytes:
        """Of all that its pixels depend on."""
        return hashlib.sha256(repr(self.crop).encode() + b"\n" + self.data).digest()


def size_of(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Width and height of an image file as it is shown, from its header alone.

    Raises InvalidRequest for what is no image that is read here, TooLarge over `max_pixels`.
    """
    if not data.startswith(_SIGNATURES):
        raise InvalidRequest(_UNREADABLE)
    try:
        width, height = imagesize.get(io.BytesIO(data), exif_rotation=True)
    except Exception:  # whatever a header that is none leads to
        raise InvalidRequest(_UNREADABLE) from None
    if width < 1 or height < 1:
        raise InvalidRequest(_UNREADABLE)
    if width * height > max_pixels:
        raise TooLarge(f"{width} x {height} are {width * height} pixels, over the {max_pixels} allowed")
    return width, height


def pixels(picture: Picture, side: int) -> NDArray[np.uint8]:
    """RGB, uint8 [side, side, 3]. Raises InvalidRequest for data that cannot be decoded."""
    try:
        found = cv2.imdecode(np.frombuffer(picture.data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        found = None
    if found is None:
        raise InvalidRequest(_UNREADABLE)
    if (crop := picture.crop) is not None:
        found = found[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    shrinks = min(found.shape[:2]) > side
    resized = cv2.resize(found, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.ascontiguousarray(resized[..., ::-1], np.uint8)


def crops(width: int, height: int) -> list[Crop]:
    """Gemma's pan-and-scan of an image: parts of a long or wide one, side by side; none of another."""
    long, short = max(width, height), min(width, height)
    if long / short < _MIN_RATIO:
        return []
    count = min(_MAX_CROPS, max(2, min(long // _MIN_CROP, math.floor(long / short + 0.5))))
    across, down = (count, 1) if width >= height else (1, count)
    crop_width, crop_height = math.ceil(width / across), math.ceil(height / down)
    if min(crop_width, crop_height) < _MIN_CROP:
        return []
    return [
        Crop(left, top, min(crop_width, width - left), min(crop_height, height - top))
        for top, left in itertools.product(range(0, height, crop_height), range(0, width, crop_width))
    ]
