"""Arrays to a device and back, for tests of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from wicore.engine.tensorrt.device import Buffer, Device


def upload(device: Device, array: NDArray[Any], what: str = "test") -> Buffer:
    """A new buffer with the array's bytes."""
    raw = np.ascontiguousarray(array)
    buffer, stream = device.allocate(max(1, raw.nbytes), what), device.stream()
    device.copy(buffer.address, raw.ctypes.data, raw.nbytes, stream)
    stream.synchronize()
    return buffer


def download(device: Device, address: int, dtype: DTypeLike, shape: int | Sequence[int]) -> NDArray[Any]:
    """What is at a device address once everything enqueued so far on any stream is done."""
    array, stream = np.empty(shape, dtype), device.stream()
    device.synchronize()
    device.copy(array.ctypes.data, address, array.nbytes, stream)
    stream.synchronize()
    return array
