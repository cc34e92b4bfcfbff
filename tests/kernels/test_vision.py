"""Patches are cut as a convolution takes them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.memory import Memory
from wicore.engine.tensorrt.device import Device


@pytest.mark.parametrize(("size", "side"), [(56, 14), (12, 3), (896, 14)])
def test_patches_are_cut_row_by_row_and_scaled_to_one(device: Device, size: int, side: int) -> None:
    memory = Memory(device)
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    across = size // side
    patches = memory.room((across**2, 3 * side**2), np.float16)
    cut = device.compile("vision.cu", {}).function("cut_patches")
    args = (memory.put(pixels), patches.address, np.int32(size), np.int32(side))
    cut(memory.stream, across**2, 128, args)
    scaled = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
    grid = scaled.reshape(across, side, across, side, 3).transpose(0, 2, 4, 1, 3)
    expected = grid.reshape(across**2, -1).astype(np.float16)
    np.testing.assert_allclose(patches.read(), expected, rtol=1e-3, atol=1e-6)
    memory.free()
