"""A file of fixed size, read and written by vectors of buffers and past the page cache where that works."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from wicore.errors import ConfigError
from wicore.tiers.slot import PAGE, Bytes

Call = Callable[[int, list[memoryview], int], int]
"""`os.preadv` or `os.pwritev`."""

MAX_VECTORS = 1024
"""The kernel's bound (IOV_MAX) on the buffers of one call."""
_TOO_LARGE = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})


def pages(count: int, size: int) -> Bytes:
    """Memory for direct access: uint8 [count, size], page-aligned; what is not touched takes none."""
    return np.frombuffer(mmap.mmap(-1, max(1, count * size)), np.uint8)[: count * size].reshape(count, size)


class PageFile:
    """A preallocated file. Thread-safe, `close` apart."""

    def __init__(self, path: Path, size: int) -> None:
        """Open or make the file and bring it to `size` bytes, which the disk then has set aside.

        Raises ConfigError when the disk has no room for it, or the file cannot be made here.
        """
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise unusable(path, err) from None
        try:
            self.kept = min(os.fstat(self._fd).st_size, size)
            """Bytes that were in the file before; the rest reads as zeros."""
            _allocate(self._fd, path, size)
            direct = _open_direct(path)
        except BaseException:
            self.close()
            raise
        self.direct = direct is not None
        """Whether the page cache is bypassed: offsets, lengths and addresses are then multiples of PAGE."""
        if direct is not None:
            self.close()
            self._fd = direct

    def move(self, call: Call, buffers: list[Bytes], offset: int) -> int:
        """Read into the buffers, or write them, from `offset` on.

        Returns the bytes moved: fewer than asked for where the file ends. Raises OSError.
        """
        left = [buffer.data for buffer in buffers]
        moved = 0
        while left:
            count = call(self._fd, left[:MAX_VECTORS], offset + moved)
            if count == 0:
                break
            moved += count
            left = _after(left, count)
        return moved

    def close(self) -> None:
        """Idempotent; calls after it fail as on a broken disk."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def unusable(path: Path, err: OSError) -> ConfigError:
    """The error of a file or folder that the system refuses."""
    return ConfigError(
        f"hmt.nvme_path: {path} cannot be used ({err.strerror}); let this user write there, or choose another"
        " folder",
        param="hmt.nvme_path",
    )


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the buffers after their first `count` bytes."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []


def _allocate(fd: int, path: Path, size: int) -> None:
    """Set `size` bytes of disk aside, so that no later write runs out of room."""
    before = os.fstat(fd)
    disk = os.fstatvfs(fd)
    free = disk.f_bavail * disk.f_frsize
    missing = size - before.st_blocks * 512
    try:
        # Asked first, because a disk filled to the brim by the attempt would hurt others.
        if missing > free:
            raise OSError(errno.ENOSPC, f"{missing:,} bytes more are needed and {free:,} are free")
        if before.st_size > size:
            os.ftruncate(fd, size)
        if not hasattr(os, "posix_fallocate"):
            raise OSError(errno.ENOTSUP, "it has no posix_fallocate")
        os.posix_fallocate(fd, 0, size)
    except OSError as err:
        os.ftruncate(fd, min(before.st_size, size))
        raise _not_allocated(path, size, err) from None


def _not_allocated(path: Path, size: int, err: OSError) -> ConfigError:
    if err.errno in _TOO_LARGE:
        return ConfigError(
            f"hmt.nvme_bytes: no room for {path} of {size:,} bytes ({err.strerror}); lower it, or choose"
            " another disk by hmt.nvme_path",
            param="hmt.nvme_bytes",
        )
    return ConfigError(
        f"hmt.nvme_bytes: {path} cannot be preallocated on this system ({err.strerror}); set hmt.nvme_bytes"
        " to 0, or choose another disk by hmt.nvme_path",
        param="hmt.nvme_bytes",
    )


def _open_direct(path: Path) -> int | None:
    """The file, opened past the page cache; None when a page cannot be read and written that way."""
    flag: int = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flag)
    except OSError:
        return None
    page = pages(1, PAGE)[0]
    try:
        # Writing back what is there changes nothing, even if it is the last thing this process does.
        if os.preadv(fd, [page.data], 0) == PAGE and os.pwritev(fd, [page.data], 0) == PAGE:
            return fd
    except OSError:
        pass
    os.close(fd)
    return None
