"""Where the processes of an API count, to be added up when Prometheus asks: a folder for as long as it runs.

An API that is killed leaves its folder behind, for the next one that starts on this machine to take away. Who
lives holds a lock on a file in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX, _LOCK = "wicore-counts-", "lock"


def counts_folder() -> tuple[str, int]:
    """A new folder, and the descriptor of its lock: the folder may go when no process has it open."""
    _sweep(Path(tempfile.gettempdir()))
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    made = os.path.join(folder, f".{_LOCK}")
    lock = os.open(made, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(made, os.path.join(folder, _LOCK))  # never seen by others without being held
    return folder, lock


def _sweep(parent: Path) -> None:
    """Take away what killed processes have left."""
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), lock.open("r+b") as file:  # OSError: held, or another user's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
