"""A GPU whose work takes no time and does nothing: what is left of an engine's step is the host's part.

Device memory is addresses only, so a model of any size fits. Pinned memory is there, all zeros at first, so
that every token drawn is 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wicore.engine.tensorrt.device import Argument, Device, Dimensions, TensorMap

_ALIGNMENT = 256


@dataclass
class _Buffer:
    address: int
    size: int

    def free(self) -> None: ...


class _Pinned:
    def __init__(self, size: int) -> None:
        pages = np.zeros(size + 4096, np.uint8)
        first = -pages.ctypes.data % 4096
        self.array: NDArray[np.uint8] = pages[first : first + size]
        self.address, self.size = self.array.ctypes.data, size
        self.pinned = self.piece = size

    def wait(self, size: int | None = None) -> None: ...
    def free(self) -> None: ...


class _Event:
    def record(self, stream: Any) -> None: ...
    def done(self) -> bool:
        return True

    def wait(self) -> None: ...
    def elapsed_ms(self, start: Any) -> float:
        return 0.0


class _Stream:
    handle = 0

    def wait(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...


class _Module:
    def function(self, name: str, shared_bytes: int = 0) -> Callable[..., None]:
        def launch(
            stream: Any,
            grid: Dimensions,
            block: Dimensions,
            args: Sequence[Argument],
            dynamic_shared: int = 0,
            dependent: bool = True,
        ) -> None: ...

        return launch


class _Graph:
    def __init__(self, device: IdleDevice) -> None:
        self._device = device

    def launch(self, stream: Any) -> None:
        self._device.launched_s = time.thread_time()

    def close(self) -> None: ...


class _TensorMap:
    bytes = bytes(128)


class IdleDevice:
    """The `Device` protocol, as a card of compute capability 9.0 with 80 GB."""

    name, sms, capability, clock_hz = "idle", 132, (9, 0), 0.0
    memory_total = memory_free = 80_000_000_000

    def __init__(self) -> None:
        self.launched_s = 0.0
        """Seconds of the calling thread on a core, when it launched the last graph."""
        self._end = 1 << 40

    def compile(self, source: str, defines: Mapping[str, int | str]) -> _Module:
        return _Module()

    def allocate(self, size: int, what: str) -> _Buffer:
        address, self._end = self._end, self._end + -(-size // _ALIGNMENT) * _ALIGNMENT
        return _Buffer(address, size)

    def allocate_host(self, size: int, step: int = 0) -> _Pinned:
        return _Pinned(size)

    def stream(self) -> _Stream:
        return _Stream()

    def event(self, timing: bool = False) -> _Event:
        return _Event()

    def copy(self, dst: int, src: int, size: int, stream: Any) -> None: ...
    def copy_many(
        self, targets: NDArray[np.uint64], sources: NDArray[np.uint64], size: int, stream: Any
    ) -> None: ...
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
        return _TensorMap()

    def capture(self, stream: Any, work: Callable[[], None], overlapping: bool = True) -> _Graph:
        return _Graph(self)

    def synchronize(self) -> None: ...
    def report(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None: ...


_: type[Device] = IdleDevice
