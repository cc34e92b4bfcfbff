"""Images to be sent, and chats with them."""

from __future__ import annotations

import base64
from functools import cache
from typing import Any

import cv2
import numpy as np


@cache
def png(width: int = 8, height: int = 8, seed: int = 0) -> bytes:
    """An image in one colour, which `seed` says."""
    colour = np.random.default_rng(seed).integers(0, 256, 3, np.uint8)
    done, data = cv2.imencode(".png", np.broadcast_to(colour, (height, width, 3)).copy())
    assert done
    return data.tobytes()


def damaged_png() -> bytes:
    """That it is one comes out where it is decoded: its header and its chunks are in order."""
    data = bytearray(png(64, 64))
    data[data.index(b"IDAT") + 4] ^= 0xFF
    return bytes(data)


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes | None = None, **fields: Any) -> dict[str, Any]:
    """As chat completions take it."""
    url = data_url(png() if data is None else data)
    return {"type": "image_url", "image_url": {"url": url} | fields}


def asked(*parts: Any) -> list[dict[str, Any]]:
    """A chat of one question; bytes are an image, and a text is one."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else image_part(part)
        if isinstance(part, bytes)
        else part
        for part in parts
    ]
    return [{"role": "user", "content": content}]
