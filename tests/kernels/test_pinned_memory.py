"""Pinned memory is the host's and the device's alike, however it came to be pinned."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.memory import Memory
from wicore.engine.tensorrt import pinned
from wicore.engine.tensorrt.device import Device

MIB = 1 << 20
ROW = 3 * 4096 + 512


@pytest.fixture
def memory(device: Device) -> Memory:
    return Memory(device)


@pytest.mark.parametrize(("size", "step"), [(4096, 0), (5 * MIB, 0), (9 * MIB, ROW)])
def test_copies_both_ways_and_kernels_see_the_same(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, size: int, step: int
) -> None:
    """Of the driver, in huge pages, and in huge pages by pieces."""
    monkeypatch.setattr(pinned, "_PIECE_BYTES", 2 * MIB)
    device, stream = memory.device, memory.stream
    host = device.allocate_host(size, step)
    values = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    host.array[:] = values  # some of it before its page is pinned
    host.wait()
    assert host.pinned == size
    pieces = [(at, min(host.piece, size - at)) for at in range(0, size, host.piece)]
    copied, many, read = (memory.room((size,), np.uint8) for _ in range(3))
    words = device.compile("copy.cu", {}).function("copy_words")
    for at, length in pieces:
        device.copy(copied.address + at, host.address + at, length, stream)
    starts = np.arange(0, size, 512, dtype=np.uint64)
    device.copy_many(np.uint64(many.address) + starts, np.uint64(host.address) + starts, 512, stream)
    words(stream, 4, 512, (host.address, read.address, np.int64(size // 16)))
    for room in (copied, many, read):
        np.testing.assert_array_equal(room.read(), values)

    device.fill(copied.address, 7, size, stream)
    for at, length in pieces:
        device.copy(host.address + at, copied.address + at, length, stream)
    stream.synchronize()
    assert (host.array == 7).all()
    host.free()
    memory.free()
