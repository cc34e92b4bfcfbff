"""Patches are cut as a convolution takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.engines import FIXTURES
from tests.kernels.memory import Memory
from tests.reference import relative_error
from tests.vision_reference import network, random_inputs
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.vision_attention import PURPOSE, attention_bytes, tower_attention
from wicore.engine.tensorrt.vision_networks import VisionShape
from wicore.gemma3.checkpoint import open_checkpoint


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


@pytest.mark.parametrize(("heads", "width", "patches"), [(2, 12, 64), (16, 72, 150), (3, 128, 49)])
def test_attention_of_all_patches_to_all_is_that_of_float64(
    device: Device, heads: int, width: int, patches: int
) -> None:
    """Patches in odd numbers, too, and more than a block of the pool has."""
    if device.capability != (9, 0):
        pytest.skip("other cards have a network for it")
    side = 14
    shape = VisionShape(heads * width, 32, heads, patches, 3 * side**2, 1, 64, 1e-6)
    given = random_inputs("vision_attention", shape)
    text = open_checkpoint(FIXTURES / "tiny").config
    attention = tower_attention(device, text, shape, NoNetworks())
    memory = Memory(device)
    attended = memory.room((patches, heads * width), np.float16)
    for scale in (1, 4):  # what an image leaves changes nothing in the next
        qkv = (given["qkv"] * scale).astype(np.float16)
        attention(memory.stream, memory.put(qkv), attended.address)
        expected = network("vision_attention", shape, {"queries": qkv, "qkv": qkv})["attended"]
        assert relative_error(attended.read(), expected) < 3e-3
    assert attention_bytes(device, shape) == device.report()[PURPOSE]
    attention.free()
    memory.free()


class NoNetworks:
    def run(self, *given: Any) -> None:
        raise AssertionError("a network was asked for")
