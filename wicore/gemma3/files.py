"""Reads of a file at any place, for threads that know where their bytes are."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wicore.errors import CheckpointError

Bytes = NDArray[np.uint8]


class OpenFile:
    """A file, open for as long as anything refers to it. Thread-safe: reads have no common position."""

    @classmethod
    def of(cls, path: Path) -> OpenFile | None:
        """None where the system has no such reads (Windows). Raises OSError."""
        return cls(path) if hasattr(os, "preadv") else None

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)

    def read_into(self, target: Bytes, at: int) -> None:
        """Fill `target`, contiguous, with the bytes from `at` on; lets go of the interpreter.

        Raises CheckpointError where the file ends before, or cannot be read.
        """
        done = 0
        while done < target.size:
            try:
                count = os.preadv(self._fd, [target[done:].data], at + done)
            except OSError as err:
                raise CheckpointError(f"{self._path}: expected a readable file, found: {err}") from err
            if not count:
                raise CheckpointError(
                    f"{self._path}: expected {target.size} bytes at {at}, found {done}: the file is truncated"
                )
            done += count


@dataclass(frozen=True, slots=True)
class Place:
    """Where something begins in a file."""

    file: OpenFile
    at: int
