"""A folder for each worker: several on one host never share a file."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from wicore.tiers.page_file import unusable


class Claim:
    """A folder that is ours until `close`, or until the process ends; also a context manager."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    def close(self) -> None:
        """Let others have the folder. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def claim(folder: Path) -> Claim:
    """Take the first of folder/0, folder/1, ... that no living process has, and make it if need be.

    A worker that starts again so finds what it, or another one, left there. Raises ConfigError when the
    folder cannot be made or written.
    """
    number = 0
    while True:
        path = folder / str(number)
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)  # a cache holds what users wrote
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise unusable(path, err) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Claim(path, lock)
        except BlockingIOError:
            os.close(lock)
            number += 1
        except OSError as err:
            os.close(lock)
            raise unusable(path, err) from None
