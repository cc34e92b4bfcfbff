"""Image files to the pixels that a vision tower takes. Pure."""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from wicore.errors import InvalidRequest, TooLarge
from wicore.vision import png
from wicore.vision.header import read_header
from wicore.vision.resize import to_square

# Of a file that cannot be decoded its sender is told; in the log it would be noise that strangers make.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

_COLOUR = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
_FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}
"""By EXIF's orientation, what is flipped once rows are rows, for cv2.flip: 1 columns, 0 rows, -1 both."""
_REVISION = 1
"""Of how files become pixels: another one makes other pictures of the same files, whose KV is never found."""
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
    file_digest: bytes = b""
    """Of `data`; reckoned where it is not given."""
    digest: bytes = field(init=False)
    """Of all that its pixels depend on. Reckoned here, once: files are large, and the engine thread asks."""

    def __post_init__(self) -> None:
        file_digest = self.file_digest or hashlib.sha256(self.data).digest()
        object.__setattr__(self, "file_digest", file_digest)
        digest = hashlib.sha256(f"{_REVISION} {self.crop}\n".encode() + file_digest)
        object.__setattr__(self, "digest", digest.digest())

    def part(self, crop: Crop) -> Picture:
        """A crop of the same file, which is not hashed again."""
        return Picture(self.data, crop, self.file_digest)


def size_of(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Width and height in pixels of an image file as it is shown (EXIF turns it), from its header alone.

    Raises InvalidRequest for what is no PNG, JPEG, WebP, GIF or BMP, TooLarge over `max_pixels`.
    """
    width, height = read_header(data).size
    if width * height > max_pixels:
        raise TooLarge(f"{width} x {height} are {width * height} pixels, over the {max_pixels} allowed")
    return width, height


def pixels(picture: Picture, side: int) -> NDArray[np.uint8]:
    """RGB, uint8 [side, side, 3], as transformers' load_image and Gemma 3's image processor give them.

    Of an animation the first frame; of 16 bits a channel the upper 8. Transparency is dropped, not blended:
    what is under it shows (in a GIF, its background). An image of side x side keeps its levels.

    Raises InvalidRequest for data that cannot be decoded: damaged or cut off, as far as a decoder can tell.
    """
    return view(upright(picture.data), picture.crop, side)


def view(image: NDArray[np.uint8], crop: Crop | None, side: int) -> NDArray[np.uint8]:
    """`pixels` of a part of what `upright` gives; None: of the whole."""
    if crop is not None:
        image = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    return np.asarray(cv2.cvtColor(to_square(image, side), cv2.COLOR_BGR2RGB), np.uint8)


def upright(data: bytes) -> NDArray[np.uint8]:
    """BGR, uint8 [height, width, 3], of the size that `size_of` says. Raises as `pixels` does."""
    header = read_header(data)
    file = png.still(data) if data.startswith(png.SIGNATURE) else data
    try:
        image = cv2.imdecode(np.frombuffer(file, np.uint8), _COLOUR)
    except cv2.error:
        image = None
    if image is None or image.shape != (header.height, header.width, 3):
        raise InvalidRequest("an image that cannot be decoded: it is damaged or cut off; send the whole file")
    if header.transposed:
        image = cv2.transpose(image)
    if (flip := _FLIPS.get(header.orientation)) is not None:
        image = cv2.flip(image, flip)
    return np.asarray(image, np.uint8)


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
