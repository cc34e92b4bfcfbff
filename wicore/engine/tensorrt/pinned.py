"""Pinned host memory of a card.

The driver's own allocator touches small pages one after the other: 1.6 GB/s on an H100's machine, 40 seconds
for a host tier of 64 GiB. Huge pages come at 6 GB/s, and those that are there already are pinned at 50. So
little memory is the driver's (`DriverMemory`) and much of it huge pages of ours (`HugePages`), pinned at once
or, piece by piece, in the background.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import mmap
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wicore.errors import EngineError

if TYPE_CHECKING:
    from wicore.engine.tensorrt.cuda_memory import CudaMemory

log = logging.getLogger("wicore.engine")

_libc = ctypes.CDLL(None)
_MADV_POPULATE_WRITE = 23
HUGE_PAGE = 2 << 20
_PIECE_BYTES = 64 << 20
"""Pinned in one go in the background: other calls of the driver wait meanwhile, for milliseconds."""


class DriverMemory:
    """Memory that the driver allocates, from `skipped` bytes behind `host` on."""

    def __init__(self, owner: CudaMemory, host: int, address: int, size: int, skipped: int) -> None:
        self._owner = owner
        self.host, self.address, self.size = host, address + skipped, size
        self.pinned = self.piece = size
        there = (ctypes.c_uint8 * size).from_address(host + skipped)
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array(there)

    def wait(self, size: int | None = None) -> None:
        """Nothing is left to be done."""

    def release(self) -> None:
        del self.array
        self._owner.discard("cuMemFreeHost", self.host)

    def free(self) -> None:
        self._owner.release_host(self)


class HugePages:
    """Memory of ours, whose address is the same for the device.

    step: 0: all of it is pinned when the constructor returns; else a first piece is, of a multiple of `step`
    bytes, and a thread goes on. Raises EngineError where the system refuses.
    """

    def __init__(self, owner: CudaMemory, size: int, step: int = 0) -> None:
        self._owner, self.size = owner, size
        try:  # private, as shared memory is mostly given no huge pages
            self._memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as err:
            raise EngineError(
                f"pinned memory: {size / 1e9:.1f} GB of host memory cannot be had ({err}); lower what is kept"
                " in host memory (hmt.host_bytes)"
            ) from None
        # A child's copy of a pinned page would be of no use; where there are no huge pages, small ones do.
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
            with contextlib.suppress(OSError):
                self._memory.madvise(advice)
        whole = np.frombuffer(self._memory, np.uint8)
        start = -whole.ctypes.data % HUGE_PAGE
        self.array: NDArray[np.uint8] = whole[start : start + size]
        self.address = self.array.ctypes.data
        self.pinned, self.piece = 0, _piece(size, step)
        self._error = EngineError("pinned memory: was given back")
        """Why no more of it will be pinned, where that is so."""
        self._wanted, self._progress = True, threading.Condition()
        self._thread: threading.Thread | None = None
        self._pin_piece()
        if self.pinned < size:
            self._thread = threading.Thread(target=self._pin_rest, name="pinning", daemon=True)
            self._thread.start()

    def wait(self, size: int | None = None) -> None:
        wanted = self.size if size is None else size
        with self._progress:
            self._progress.wait_for(lambda: self.pinned >= wanted or not self._wanted)
        if self.pinned < wanted:
            raise self._error

    def release(self) -> None:
        self._stop()
        if self._thread is not None:
            self._thread.join()
        for start in range(0, self.pinned, self.piece):
            self._owner.discard("cuMemHostUnregister", self.address + start)
        self.pinned = 0
        del self.array, self._memory

    def free(self) -> None:
        self._owner.release_host(self)

    def _pin_piece(self) -> None:
        """Pin the next one."""
        start, end = self.pinned, min(self.pinned + self.piece, self.size)
        _populate(self.address + start, end - start)
        self._owner.pin(self.address + start, end - start)
        with self._progress:
            self.pinned = end
            self._progress.notify_all()

    def _stop(self) -> None:
        """Pin no more."""
        with self._progress:
            self._wanted = False
            self._progress.notify_all()

    def _pin_rest(self) -> None:
        try:
            while self._wanted and self.pinned < self.size:
                self._pin_piece()
        except EngineError as err:
            self._error = err
            log.warning(
                "%.1f of %.1f GB of host memory are pinned (%s); copies of the rest take a detour",
                *(self.pinned / 1e9, self.size / 1e9, err),
            )
            self._stop()


def _populate(address: int, size: int) -> None:
    """Have the system give pages, without changing what is in them: the memory may be in use.

    Pinning would do it, but hold up other calls of the driver for as long. Before Linux 5.14 it has to.
    """
    _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_POPULATE_WRITE)


def _piece(size: int, step: int) -> int:
    """Bytes of a piece: whole pages, and a whole number of steps."""
    if not step:
        return size
    unit = math.lcm(step, mmap.PAGESIZE)
    return max(1, _PIECE_BYTES // unit) * unit


def available_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that this process can still have; None: the system does not tell.

    Minds the limits of its control group, as cgroup v2 shows them, and of those around it; inside a container
    the topmost is the container's. Caches of files count as free.
    """
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        found.append(1024 * _field(proc / "meminfo", "MemAvailable:"))
    own = ""
    with contextlib.suppress(OSError, ValueError):
        own = _line(proc / "self" / "cgroup", "0::").strip().strip("/")
    for group in (groups / own, *(groups / parent for parent in Path(own).parents)):
        with contextlib.suppress(OSError, ValueError):
            most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            cached = _field(group / "memory.stat", "file ") - _field(group / "memory.stat", "shmem ")
            found.append(max(0, most - used + cached))
    return min(found, default=None)


def _field(path: Path, start: str) -> int:
    """The number in the line that begins so."""
    return int(_line(path, start).split()[0])


def _line(path: Path, start: str) -> str:
    """The rest of the line that begins so. Raises ValueError where there is none."""
    for line in path.read_text().splitlines():
        if line.startswith(start):
            return line.removeprefix(start)
    raise ValueError(f"{path}: has no {start}")
