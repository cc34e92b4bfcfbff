"""`EmulatedDevice`: the engine's Device protocol on the CPU, for tests without a GPU.

Device memory is host memory. Work is done when it is enqueued, so streams and events order nothing that the
program does not. Memory begins as NaN (bytes 0xFF); the page behind each allocation cannot be touched, and
freed memory neither. A graph replays its launches with the arguments of the capture.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tests.emulation.build import build
from wicore.engine.tensorrt.device import (
    DEFAULT_SHARED_BYTES,
    KERNELS,
    Argument,
    Device,
    Dimensions,
    TensorMap,
    dimensions,
)
from wicore.errors import EngineError

_MAX_SHARED = 227 << 10
_ALIGNMENT = 256
_POISON = 0xFF
_ORDERS = {"ascending": 0, "descending": 1, "alternate": 2}
_ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1, "int32": 4}

_running = threading.Lock()
"""Kernels run one at a time: a library has one set of fibres."""


class EmulationError(EngineError):
    """A kernel or a call did what the card would not, or must not, do."""


class EmulatedBuffer:
    """Memory that ends at a page which cannot be touched; `array` are its bytes."""

    def __init__(self, device: EmulatedDevice, size: int, what: str) -> None:
        if size <= 0:
            raise EmulationError(f"{what}: allocates {size} bytes")
        self._device, self.what, self.size = device, what, size
        page = mmap.PAGESIZE
        room = -(-size // _ALIGNMENT) * _ALIGNMENT
        pages = -(-room // page) * page
        self._memory: mmap.mmap | None = mmap.mmap(-1, pages + page)
        view = np.frombuffer(self._memory, np.uint8)
        start = view.ctypes.data
        view[:pages] = _POISON
        self._slack = view[pages - room + size : pages]
        self.array: NDArray[np.uint8] = view[pages - room : pages - room + size]
        self.address = start + pages - room
        self._mapping = (start, pages + page)
        self.pinned = self.piece = size
        _protect(start + pages, page)

    def wait(self, size: int | None = None) -> None:
        """It is pinned."""

    def check(self) -> None:
        """Raise if something was written behind the end."""
        if (self._slack != _POISON).any():
            raise EmulationError(f"{self.what}: was written to past its {self.size} bytes")

    def free(self) -> None:
        if self._memory is None:
            return
        self._device.forget(self)
        self.check()
        # Unmapped here, unless the program still holds a view of the array.
        del self._slack, self.array
        self._memory = None


class EmulatedEvent:
    """Done as soon as it is recorded, as the work before it is."""

    def __init__(self, timing: bool) -> None:
        self._timing = timing
        self._at: float | None = None

    def record(self, stream: EmulatedStream) -> None:
        stream.submit(self._record)

    def _record(self) -> None:
        self._at = time.perf_counter()

    def done(self) -> bool:
        return True

    def wait(self) -> None: ...

    def elapsed_ms(self, start: EmulatedEvent) -> float:
        if not (self._timing and start._timing):
            raise EmulationError("event: was made without timing")
        if self._at is None or start._at is None:
            raise EmulationError("event: was never recorded")
        return (self._at - start._at) * 1e3


class EmulatedStream:
    """Does work when it is submitted, or notes it down while it is captured."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.captured: list[Callable[[], None]] | None = None

    def submit(self, work: Callable[[], None]) -> None:
        if self.captured is None:
            work()
        else:
            self.captured.append(work)

    def wait(self, event: EmulatedEvent) -> None: ...

    def synchronize(self) -> None:
        if self.captured is not None:
            raise EmulationError("stream: cannot be waited for while it is captured")


class EmulatedGraph:
    """The captured work, done again at each launch."""

    def __init__(self, work: Sequence[Callable[[], None]]) -> None:
        self._work: Sequence[Callable[[], None]] | None = work

    def launch(self, stream: EmulatedStream) -> None:
        if self._work is None:
            raise EmulationError("graph: was closed")
        for work in self._work:
            stream.submit(work)

    def close(self) -> None:
        self._work = None


@dataclass(frozen=True)
class EmulatedTensorMap:
    """The fields of the emulation's CUtensorMap, packed."""

    bytes: bytes


class EmulatedFunction:
    """A kernel of a compiled library."""

    def __init__(self, device: EmulatedDevice, library: ctypes.CDLL, name: str, shared_bytes: int) -> None:
        self._device, self._name, self._shared_bytes = device, name, shared_bytes
        self._launch = library[f"launch_{name}"]
        sizes = (ctypes.c_int * 128)()
        count = library[f"parameters_{name}"](sizes)
        self._sizes = list(sizes[:count])

    def __call__(
        self,
        stream: EmulatedStream,
        grid: Dimensions,
        block: Dimensions,
        args: Sequence[Argument],
        dynamic_shared: int = 0,
        dependent: bool = True,
    ) -> None:
        grid, block = dimensions(grid), dimensions(block)
        self._check(grid, block, dynamic_shared)
        values = [self._pack(i, arg) for i, arg in enumerate(args)]
        if len(values) != len(self._sizes):
            raise EmulationError(f"{self._name}: takes {len(self._sizes)} arguments, given {len(values)}")
        stream.submit(lambda: self._run(grid, block, values, dynamic_shared, dependent))

    def _check(self, grid: Sequence[int], block: Sequence[int], dynamic_shared: int) -> None:
        if min(*grid, *block) < 1 or grid[0] >= 1 << 31 or max(grid[1:]) > 65535:
            raise EmulationError(f"{self._name}: grid {grid}, block {block}: out of range")
        if block[0] * block[1] * block[2] > 1024 or block[2] > 64:
            raise EmulationError(f"{self._name}: block {block}: more than 1024 threads, or more than 64 in z")
        allowed = max(DEFAULT_SHARED_BYTES, self._shared_bytes)
        if not 0 <= dynamic_shared <= allowed:
            raise EmulationError(
                f"{self._name}: {dynamic_shared} bytes of dynamic shared memory, allowed {allowed}"
            )

    def _pack(self, i: int, arg: Argument) -> bytes:
        if isinstance(arg, bool | float):
            raise EmulationError(f"{self._name}: argument {i}: expected int or a numpy scalar, found {arg!r}")
        if isinstance(arg, int):
            data = arg.to_bytes(8, "little")
        elif isinstance(arg, np.generic):
            data = arg.tobytes()
        else:
            data = arg.bytes
        if i < len(self._sizes) and len(data) != self._sizes[i]:
            raise EmulationError(
                f"{self._name}: argument {i} has {self._sizes[i]} bytes, given {len(data)} ({arg!r})"
            )
        return data

    def _run(
        self, grid: Sequence[int], block: Sequence[int], values: Sequence[bytes], shared: int, dependent: bool
    ) -> None:
        cells = [_aligned(value) for value in values]
        pointers = (ctypes.c_void_p * max(1, len(cells)))(*(cell.ctypes.data for cell in cells))
        message = ctypes.create_string_buffer(2048)
        with _running:
            failed = self._launch(
                pointers,
                (ctypes.c_uint * 3)(*grid),
                (ctypes.c_uint * 3)(*block),
                ctypes.c_size_t(shared),
                self._device.next_order(),
                int(dependent),
                message,
                ctypes.c_size_t(len(message)),
            )
        if failed:
            raise EmulationError(f"{self._name}: {message.value.decode(errors='replace')}")


class EmulatedModule:
    """A source compiled for the host."""

    def __init__(self, device: EmulatedDevice, library: ctypes.CDLL, source: str) -> None:
        self._device, self._library, self._source = device, library, source

    def function(self, name: str, shared_bytes: int = 0) -> EmulatedFunction:
        if shared_bytes > _MAX_SHARED:
            raise EmulationError(f"{name}: {shared_bytes} bytes of shared memory, a block has {_MAX_SHARED}")
        try:
            return EmulatedFunction(self._device, self._library, name, shared_bytes)
        except AttributeError:
            raise EmulationError(f"{self._source}: has no kernel {name}") from None


class EmulatedDevice:
    """A small Hopper on the CPU.

    order: of the threads in a block; "alternate" turns it round from one block and launch to the next.
    memory_bytes: how much can be allocated.
    """

    def __init__(
        self,
        sms: int = 4,
        capability: tuple[int, int] = (9, 0),
        memory_bytes: int = 8 << 30,
        order: Literal["ascending", "descending", "alternate"] = "alternate",
        kernels: Path = KERNELS,
    ) -> None:
        self.name = "emulation"
        self.sms, self.capability = sms, capability
        self.clock_hz = 1e9
        self.memory_total = memory_bytes
        self._kernels, self._order, self._launches = kernels, _ORDERS[order], 0
        self._buffers: dict[int, EmulatedBuffer] = {}
        self._streams = 0
        self._capturing = threading.local()

    @property
    def memory_free(self) -> int:
        return self.memory_total - sum(self.report().values())

    def next_order(self) -> int:
        self._launches += 1
        return self._order if self._order < 2 else 2 + self._launches % 2

    def compile(self, source: str, defines: Mapping[str, int | str]) -> EmulatedModule:
        self._not_captured("compile")
        return EmulatedModule(self, _library(build(self._kernels / source, defines)), source)

    def allocate(self, size: int, what: str) -> EmulatedBuffer:
        self._not_captured("allocate")
        if size > self.memory_free:
            raise EmulationError(f"{what} need {size} bytes, {self.memory_free} are free")
        buffer = EmulatedBuffer(self, size, what)
        self._buffers[buffer.address] = buffer
        return buffer

    def allocate_host(self, size: int, step: int = 0) -> EmulatedBuffer:
        self._not_captured("allocate_host")
        buffer = EmulatedBuffer(self, size, "")
        self._buffers[buffer.address] = buffer
        return buffer

    def stream(self) -> EmulatedStream:
        self._streams += 1
        return EmulatedStream(self._streams)

    def event(self, timing: bool = False) -> EmulatedEvent:
        return EmulatedEvent(timing)

    def copy(self, dst: int, src: int, size: int, stream: EmulatedStream) -> None:
        self._inside(dst, size)
        self._inside(src, size)
        stream.submit(partial(_move, dst, src, size))

    def copy_many(
        self, targets: NDArray[np.uint64], sources: NDArray[np.uint64], size: int, stream: EmulatedStream
    ) -> None:
        for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
            self.copy(target, source, size, stream)

    def fill(self, dst: int, byte: int, size: int, stream: EmulatedStream) -> None:
        self._inside(dst, size)
        stream.submit(partial(_set, dst, byte, size))

    def tensor_map_2d(
        self,
        address: int,
        rows: int,
        columns: int,
        row_stride_bytes: int,
        box_rows: int,
        box_columns: int,
        element: str = "float16",
        swizzle: int = 128,
    ) -> EmulatedTensorMap:
        size = _ELEMENT_BYTES[element]
        row = box_columns * size
        if address % 16 or row_stride_bytes % 16 or row % 16 or row_stride_bytes < columns * size:
            raise EmulationError("tensor map: address, row stride and box row must be multiples of 16 bytes")
        if not (1 <= box_rows <= 256 and 1 <= box_columns <= 256) or swizzle not in (0, 32, 64, 128):
            raise EmulationError(
                f"tensor map: box {box_rows} x {box_columns}, swizzle {swizzle}: out of range"
            )
        if swizzle and row > swizzle:
            raise EmulationError(f"tensor map: a box row of {row} bytes is wider than the swizzle")
        self._inside(address, row_stride_bytes * (rows - 1) + columns * size)
        wide = np.array([address, rows, columns, row_stride_bytes], np.uint64)
        narrow = np.array([box_rows, box_columns, size, swizzle], np.uint32)
        return EmulatedTensorMap((wide.tobytes() + narrow.tobytes()).ljust(128, b"\0"))

    def capture(
        self, stream: EmulatedStream, work: Callable[[], None], overlapping: bool = True
    ) -> EmulatedGraph:
        if stream.captured is not None:
            raise EmulationError("stream: is being captured")
        stream.captured = []
        self._capturing.on = True
        try:
            work()
            return EmulatedGraph(stream.captured)
        finally:
            stream.captured = None
            self._capturing.on = False

    def synchronize(self) -> None:
        self._not_captured("synchronize")

    def report(self) -> Mapping[str, int]:
        counts: Counter[str] = Counter()
        for buffer in list(self._buffers.values()):
            if buffer.what:
                counts[buffer.what] += buffer.size
        return counts

    def close(self) -> None:
        """Free everything; raises if something was written behind the end of an allocation."""
        for buffer in list(self._buffers.values()):
            buffer.free()

    def forget(self, buffer: EmulatedBuffer) -> None:
        self._buffers.pop(buffer.address, None)

    # --- for tests ---

    def upload(self, array: NDArray[Any], what: str = "test") -> EmulatedBuffer:
        """A buffer with the array's bytes."""
        raw = np.ascontiguousarray(array)
        buffer = self.allocate(raw.nbytes, what)
        buffer.array[:] = np.frombuffer(raw.tobytes(), np.uint8)
        return buffer

    def _not_captured(self, what: str) -> None:
        if getattr(self._capturing, "on", False):
            raise EmulationError(f"{what}: not allowed during a capture")

    def _inside(self, address: int, size: int) -> None:
        """Raise where the range begins in an allocation and leaves it."""
        for buffer in list(self._buffers.values()):
            offset = address - buffer.address
            if 0 <= offset < buffer.size and offset + size > buffer.size:
                raise EmulationError(f"{size} bytes at offset {offset} of {buffer.what}: has {buffer.size}")


def _aligned(value: bytes) -> NDArray[np.uint8]:
    """The bytes at an address that is a multiple of 64."""
    room = np.empty(len(value) + 64, np.uint8)
    start = -room.ctypes.data % 64
    cell = room[start : start + len(value)]
    cell[:] = np.frombuffer(value, np.uint8)
    return cell


def _move(dst: int, src: int, size: int) -> None:
    ctypes.memmove(dst, src, size)


def _set(dst: int, byte: int, size: int) -> None:
    ctypes.memset(dst, byte, size)


def _protect(address: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0):
        raise EmulationError(f"mprotect: {os.strerror(ctypes.get_errno())}")


@cache
def _library(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


_: type[Device] = EmulatedDevice
_map: type[TensorMap] = EmulatedTensorMap
