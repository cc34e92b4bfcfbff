"""Device memory for kernel tests, the same for the card and its emulation."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from wicore.engine.tensorrt.device import Buffer, Device

_GUARD = 4096
_POISON = 0xFF  # NaN as half and as float


class Room:
    """Memory for an array that begins as NaN, with bytes around it that nobody may write."""

    def __init__(self, memory: Memory, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._memory, self._shape, self._dtype = memory, shape, np.dtype(dtype)
        self._size = int(np.prod(shape)) * self._dtype.itemsize
        self._buffer: Buffer = memory.device.allocate(self._size + 2 * _GUARD, "test")
        memory.device.fill(self._buffer.address, _POISON, self._buffer.size, memory.stream)
        self.address = self._buffer.address + _GUARD

    def read(self) -> NDArray[Any]:
        """The array, after all work; fails where a kernel wrote beside it."""
        raw = np.empty(self._buffer.size, np.uint8)
        self._memory.device.copy(raw.ctypes.data, self._buffer.address, raw.nbytes, self._memory.stream)
        self._memory.stream.synchronize()
        assert (raw[:_GUARD] == _POISON).all(), "written before the start of the memory"
        assert (raw[_GUARD + self._size :] == _POISON).all(), "written past the end of the memory"
        return raw[_GUARD : _GUARD + self._size].view(self._dtype).reshape(self._shape)


class Memory:
    """Allocates on a device; everything is given back by `free`."""

    def __init__(self, device: Device) -> None:
        self.device, self.stream = device, device.stream()
        self._buffers: list[Buffer] = []

    def put(self, array: NDArray[Any]) -> int:
        """The address of a copy; the memory ends where the array does."""
        array = np.ascontiguousarray(array)
        buffer = self.device.allocate(array.nbytes, "test")
        self.device.copy(buffer.address, array.ctypes.data, array.nbytes, self.stream)
        self.stream.synchronize()
        self._buffers.append(buffer)
        return buffer.address

    def room(self, shape: tuple[int, ...], dtype: DTypeLike) -> Room:
        room = Room(self, shape, dtype)
        self._buffers.append(room._buffer)
        return room

    def free(self) -> None:
        self.stream.synchronize()
        for buffer in self._buffers:
            buffer.free()
        self._buffers.clear()
