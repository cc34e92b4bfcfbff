"""What the engine needs of a CUDA device, as a protocol: kept by `CudaDevice` on the card, and by the CPU
emulation in tests.

Addresses are plain integers. Work is enqueued on streams and done in their order; nothing else is ordered.
Every failure is an EngineError. This module imports no CUDA library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

KERNELS = Path(__file__).parent / "kernels"
"""The folder of the kernels' sources."""

DEFAULT_SHARED_BYTES = 48 << 10
"""Dynamic shared memory that a block may have without asking for more (`Module.function`)."""


@runtime_checkable
class TensorMap(Protocol):
    """A matrix of which the copy engine moves boxes to shared memory; passed to kernels by value.

    In the kernel: `const __grid_constant__ CUtensorMap map`, 128 bytes, aligned to 64.
    """

    @property
    def bytes(self) -> bytes:
        """The 128 bytes."""


Argument: TypeAlias = "int | np.generic | TensorMap"
"""A kernel's argument: `int` is a 64-bit address, a numpy scalar is passed as its own type."""

Dimensions: TypeAlias = "int | Sequence[int]"
"""x, or (x, y), or (x, y, z)."""


class Buffer(Protocol):
    """Device memory; its first contents are undefined."""

    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...
    def free(self) -> None:
        """Give the memory back; the second call does nothing. Work that uses it must be done."""


class HostBuffer(Protocol):
    """Pinned host memory that kernels can read at `address`."""

    @property
    def array(self) -> NDArray[np.uint8]: ...
    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def pinned(self) -> int:
        """So many first bytes are pinned by now; the device may not be given an address of the others."""

    @property
    def piece(self) -> int:
        """Pieces of so many bytes are pinned apart: a copy may not be of two."""

    def wait(self, size: int | None = None) -> None:
        """Block until so many first bytes are pinned; None: all. Raises EngineError where that failed."""

    def free(self) -> None:
        """Give the memory back; the second call does nothing. `array` must not be used afterwards."""


class Event(Protocol):
    """A point in a stream's work."""

    def record(self, stream: Any) -> None: ...
    def done(self) -> bool:
        """Whether the work before the point has ended; true for an event never recorded."""

    def wait(self) -> None:
        """Block this thread until it has."""

    def elapsed_ms(self, start: Any) -> float:
        """Milliseconds from `start` to here; both were made with timing, recorded and are done."""


class Stream(Protocol):
    """A queue of work."""

    @property
    def handle(self) -> int:
        """The CUstream, for libraries that take one."""

    def wait(self, event: Any) -> None:
        """Work enqueued from now on starts when `event`, as last recorded, is done."""

    def synchronize(self) -> None:
        """Block this thread until everything enqueued is done; raises what went wrong in it."""


class Function(Protocol):
    """A kernel."""

    def __call__(
        self,
        stream: Any,
        grid: Dimensions,
        block: Dimensions,
        args: Sequence[Argument],
        dynamic_shared: int = 0,
        dependent: bool = True,
    ) -> None:
        """Enqueue a launch.

        `dynamic_shared` is in bytes. With `dependent` the grid may start before the one ahead of it in the
        stream has ended (programmatic dependent launch): the kernel must call pdl_wait() first thing.
        """


class Module(Protocol):
    """A compiled source."""

    def function(self, name: str, shared_bytes: int = 0) -> Function:
        """The `extern "C" __global__` kernel of that name, allowed `shared_bytes` of dynamic shared memory
        (needed above DEFAULT_SHARED_BYTES)."""


class Graph(Protocol):
    """Captured work, with the arguments it was captured with."""

    def launch(self, stream: Any) -> None: ...
    def close(self) -> None: ...


class Device(Protocol):
    """A GPU, or what stands in for one. Threads may share it."""

    @property
    def name(self) -> str: ...
    @property
    def sms(self) -> int:
        """Streaming multiprocessors."""

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, e.g. (9, 0)."""

    @property
    def clock_hz(self) -> float:
        """The multiprocessors' top clock; 0: unknown."""

    @property
    def memory_total(self) -> int:
        """Bytes of the card."""

    @property
    def memory_free(self) -> int:
        """Bytes that can still be allocated, within the budget."""

    def compile(self, source: str, defines: Mapping[str, int | str]) -> Module:
        """The module of `kernels/<source>` with these macros; compiled once, then from the cache.

        Raises EngineError with the compiler's log. Not during a capture.
        """

    def allocate(self, size: int, what: str) -> Buffer:
        """Device memory, aligned to 256 bytes; EngineError names `what`, the bytes needed and free, and the
        fix. Not during a capture."""

    def allocate_host(self, size: int, step: int = 0) -> HostBuffer:
        """Pinned host memory that begins at a page. With a `step` it may be pinned in the background, in
        pieces of a multiple of so many bytes."""

    def stream(self) -> Stream: ...
    def event(self, timing: bool = False) -> Event: ...
    def copy(self, dst: int, src: int, size: int, stream: Any) -> None:
        """Copy bytes between any two of device and host memory. Host memory that is not pinned must stay
        until the stream has passed the copy."""

    def copy_many(
        self, targets: NDArray[np.uint64], sources: NDArray[np.uint64], size: int, stream: Any
    ) -> None:
        """As many copies of `size` bytes each between device and pinned memory, in any order among them."""

    def fill(self, dst: int, byte: int, size: int, stream: Any) -> None: ...
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
    ) -> TensorMap:
        """A row-major matrix to copy boxes of; what a box has outside of the matrix is read as zero.

        address: aligned to 16 bytes; row_stride_bytes: a multiple of 16; boxes: at most 256 x 256;
        element: float16, bfloat16, float32, int8 or int32; swizzle: 0, 32, 64 or 128 bytes, at least a
        box's row.
        """

    def capture(self, stream: Any, work: Callable[[], None], overlapping: bool = True) -> Graph:
        """What `work` enqueues on `stream`, as a graph; nothing of it runs now.

        overlapping: False takes no launch as dependent, whatever it says: each then starts when the one
        ahead has ended.
        """

    def synchronize(self) -> None:
        """Block this thread until all work of all streams is done; raises what went wrong in it."""

    def report(self) -> Mapping[str, int]:
        """Bytes of device memory in use by what they are for."""

    def close(self) -> None:
        """Wait for all work and give everything back."""


def dimensions(value: Dimensions) -> tuple[int, int, int]:
    """All three of a grid's or block's sizes."""
    if isinstance(value, int | np.integer):
        return int(value), 1, 1
    x, y, z = (*value, 1, 1)[:3]
    return int(x), int(y), int(z)
