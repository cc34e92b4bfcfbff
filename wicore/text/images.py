"""From the images of a chat to what a prompt shows of them. Pure.

An image is shown whole, on a square; with detail "high" crops of a long or wide one follow, as Gemma's
pan-and-scan has them. Bytes and header are looked at here, pixels only where they are encoded.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wicore.errors import InvalidRequest, TooLarge
from wicore.messages import ImageURL, Message
from wicore.vision.pixels import Picture, crops, size_of


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What a request may hold."""

    count: int = 16
    bytes: int = 10 * 2**20
    """Of one image, as a file."""
    pixels: int = 50_000_000
    """Of one image."""


@dataclass(frozen=True, slots=True)
class Shown:
    """An image of a chat as the model sees it."""

    views: Sequence[Picture]
    """The whole, then crops, if any."""
    field: str
    """Where its URL is in the body."""


def shown_images(messages: Sequence[Message], limits: ImageLimits) -> Mapping[tuple[int, int], Shown]:
    """The images of a chat by number of message and part.

    Raises TooLarge for what is over a limit and InvalidRequest for what is no image that is served, naming
    the field. No image is decoded, so that one may yet turn out to be none.
    """
    found = [(at, part, image) for at, message in enumerate(messages) for part, image in message.images()]
    if len(found) > limits.count:
        raise TooLarge(
            f"messages: {len(found)} images, over the {limits.count} that model.max_images allows;"
            " leave out some",
            param="messages",
        )
    return {
        (at, part): _shown(image, limits, f"messages.{at}.content.{part}.image_url.url")
        for at, part, image in found
    }


def _shown(image: ImageURL, limits: ImageLimits, field: str) -> Shown:
    try:
        data = _decoded(image.url, limits.bytes)
        width, height = _size(data, limits.pixels)
    except InvalidRequest as err:
        raise InvalidRequest(f"{field}: {err.message}", param=field) from None
    except TooLarge as err:
        raise TooLarge(f"{field}: {err.message}; send a smaller image", param=field) from None
    parts = crops(width, height) if image.detail == "high" else []
    whole = Picture(data)
    return Shown([whole, *(whole.part(crop) for crop in parts)], field)


def _decoded(url: str, limit: int) -> bytes:
    start = url.index(",") + 1
    size = (len(url) - start) * 3 // 4 - url.count("=", -2)
    if size > limit:
        raise TooLarge(f"{size} bytes, over the {limit} that model.max_image_bytes allows")
    try:
        return base64.b64decode(url[start:], validate=True)
    except binascii.Error as err:
        raise InvalidRequest(f"not valid base64: {err}") from None


def _size(data: bytes, limit: int) -> tuple[int, int]:
    try:
        return size_of(data, limit)
    except TooLarge as err:
        raise TooLarge(f"{err.message} (model.max_image_pixels)") from None
