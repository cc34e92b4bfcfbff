"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$WICORE_CACHE, else $XDG_CACHE_HOME/wicore, else ~/.cache/wicore; it need not exist."""
    if own := os.environ.get("WICORE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "wicore"
