"""What the vision tower is made of: patches, attention, and its networks by our own kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engines import FIXTURES
from tests.kernels.memory import Memory
from tests.reference import relative_error
from tests.vision_reference import network, random_inputs
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.vision_attention import PURPOSE, attention_bytes, tower_attention
from wicore.engine.tensorrt.vision_kernels import VisionKernels, vision_kinds
from wicore.engine.tensorrt.vision_networks import VISION_KINDS, VisionKind, VisionShape, bindings
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


SMALL = VisionShape(24, 40, 2, 36, 3 * 7**2, 4, 64, 1e-6)
WIDE = VisionShape(1152, 136, 16, 64, 588, 16, 72, 1e-6)
"""Of the published width: more pairs than a block has threads, by an odd number of turns."""


def by_kernels(
    device: Device, kind: VisionKind, shape: VisionShape, given: dict[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """The outputs of a network; it is run twice."""
    if device.capability != (9, 0):
        pytest.skip("other cards have TensorRT's networks")
    kernels, memory = VisionKernels(device, shape, "test"), Memory(device)
    types = {"half": np.float16, "float32": np.float32}
    rooms = {b.name: memory.room(b.shape, types[b.dtype]) for b in bindings(kind, shape) if b.output}
    addresses = {name: memory.put(values) for name, values in given.items()}
    addresses |= {name: room.address for name, room in rooms.items()}
    for _ in range(2):
        kernels.run(memory.stream, kind, shape.patches, addresses)
    outputs = {name: room.read() for name, room in rooms.items()}
    kernels.close()
    memory.free()
    return outputs


@pytest.mark.parametrize("shape", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("kind", ["vision_first", "vision_middle", "vision_last"])
def test_a_network_by_our_kernels_is_that_of_float64(
    device: Device, kind: VisionKind, shape: VisionShape
) -> None:
    given = random_inputs(kind, shape)
    found = by_kernels(device, kind, shape, given)
    for name, expected in network(kind, shape, given).items():
        assert relative_error(found[name], expected) < 2e-3, name


def test_an_activation_too_large_for_half_is_scaled(device: Device) -> None:
    given = random_inputs("vision_middle", SMALL)
    given["fc1_bias"] = np.full_like(given["fc1_bias"], 1e6)
    given["fc2"] = (given["fc2"] / 100).astype(np.float16)
    expected = network("vision_middle", SMALL, given)["residual_out"]
    found = by_kernels(device, "vision_middle", SMALL, given)["residual_out"]
    assert relative_error(found, expected) < 2e-3


def test_only_cards_without_the_kernels_need_plans() -> None:
    assert vision_kinds((9, 0), WIDE) == ()
    assert vision_kinds((8, 9), WIDE) == VISION_KINDS
    odd = replace(WIDE, inner=4301)  # rows of which the copy engine cannot take
    assert vision_kinds((9, 0), odd) == ("vision_first", "vision_middle", "vision_last")
    assert vision_kinds((9, 0), replace(WIDE, heads=2)) == VISION_KINDS


class NoNetworks:
    def run(self, *given: Any) -> None:
        raise AssertionError("a network was asked for")
