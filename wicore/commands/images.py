"""Image files on the command line, as parts of chat messages."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def image_part(path: Path) -> dict[str, Any]:
    """Raises OSError when the file cannot be read."""
    data = base64.b64encode(path.read_bytes()).decode()
    kind = mimetypes.guess_type(path.name)[0] or ""
    # The service goes by the content; here it must be of some kind.
    kind = kind if kind.startswith("image/") else "image/png"
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def question(text: str, images: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A user's message, its images first."""
    shown = list(images)
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}] if shown else text}
