"""The vision tower of the TensorRT engine on an emulated device, its networks evaluated by numpy."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.device_arrays import download
from tests.emulation import EmulatedDevice
from tests.engines import FIXTURES, rows
from tests.numpy_segments import NumpySegments
from tests.reference import relative_error
from tests.test_gpu_engine import settings
from tests.vision_reference import network
from wicore.engine.base import StepPlan
from wicore.engine.tensorrt.build import build_engine
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.vision import (
    TensorrtVision,
    TowerNetworks,
    create_tensorrt_vision,
    open_vision_networks,
    vision_bytes,
)
from wicore.engine.tensorrt.vision_networks import VISION_KINDS, VisionShape, bindings
from wicore.engine.tensorrt.vision_weights import VisionWeights, load_vision, vision_weight_bytes
from wicore.engine.tensorrt.weights import RandomWeights
from wicore.errors import EngineError
from wicore.gemma3.checkpoint import open_checkpoint
from wicore.gemma3.config import Gemma3Config, VisionConfig

VISION = VisionConfig(
    hidden_size=24,
    layers=3,
    heads=2,
    intermediate_size=40,
    image_size=56,
    patch_size=7,
    tokens=4,
    layer_norm_eps=1e-6,
    start_token_id=509,
    end_token_id=510,
    soft_token_id=511,
)


def config() -> Gemma3Config:
    return replace(open_checkpoint(FIXTURES / "tiny").config, vision=VISION)


def segments() -> NumpySegments:
    return NumpySegments(VisionShape.of(config()), (), kinds=VISION_KINDS)


def tower(device: Device, networks: TowerNetworks | None = None) -> TensorrtVision:
    weights = load_vision(device, RandomWeights(config(), seed=3))
    return TensorrtVision(device, config(), weights, networks or segments())


@pytest.fixture(scope="module", params=["networks", "networks and attention's kernel", "kernels"])
def vision(request: pytest.FixtureRequest) -> Iterator[TensorrtVision]:
    """By TensorRT alone, with Hopper's kernel for attention, and by our kernels alone."""
    device = EmulatedDevice(capability=(8, 0) if request.param == "networks" else (9, 0))
    networks = open_vision_networks(config(), device) if request.param == "kernels" else None
    found = tower(device, networks)
    yield found
    found.close()
    device.close()


def pixels(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (56, 56, 3), np.uint8)


# --- what it computes -------------------------------------------------------------------------------


def in_float64(device: Device, weights: VisionWeights, image: NDArray[np.uint8]) -> NDArray[Any]:
    """An image's rows from the weights that lie on the device."""
    shape, side = VisionShape.of(config()), VISION.patch_size
    sizes = {b.name: b for kind in VISION_KINDS for b in bindings(kind, shape)}

    def values(bound: Any) -> dict[str, NDArray[Any]]:
        types = {name: np.float16 if sizes[name].dtype == "half" else np.float32 for name in bound}
        return {
            name: download(device, address, types[name], sizes[name].shape) for name, address in bound.items()
        }

    across = VISION.image_size // side
    scaled = (image.astype(np.float64) / 255 - 0.5) / 0.5
    patches = scaled.reshape(across, side, across, side, 3).transpose(0, 2, 4, 1, 3).reshape(across**2, -1)
    given = {"patches": patches, **values(weights.embedding), **values(weights.entries[0])}
    state = network("vision_first", shape, given)
    for i, layer in enumerate(weights.layers):
        qkv = state["qkv"]
        attended = network("vision_attention", shape, {"queries": qkv, "qkv": qkv})["attended"]
        last = i == len(weights.layers) - 1
        given = {"attended": attended, "residual": state["residual_out"], **values(layer)}
        given |= values(weights.projector if last else weights.entries[i + 1])
        state = network("vision_last" if last else "vision_middle", shape, given)
    return state["rows"]


def test_rows_are_those_of_the_mathematics(vision) -> None:
    for seed in range(2):
        image = pixels(seed)
        expected = in_float64(vision._device, vision._weights, image)
        assert relative_error(vision.encode(image), expected) < 2e-3


def test_equal_pixels_give_equal_rows_whatever_came_between(vision) -> None:
    first = vision.encode(pixels(1))
    other = vision.encode(pixels(2))
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(vision.encode(pixels(1)), first)
    np.testing.assert_array_equal(vision.encode(pixels(2)), other)


def test_threads_may_encode_at_once(vision) -> None:
    expected, found = [vision.encode(pixels(i)) for i in range(4)], {}

    def work(i: int) -> None:
        found[i] = vision.encode(pixels(i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, rows_ in enumerate(expected):
        np.testing.assert_array_equal(found[i], rows_)


def test_attention_of_more_patches_than_a_block_is_the_same(monkeypatch) -> None:
    device = EmulatedDevice(capability=(8, 0))
    image = pixels(5)
    expected = tower(device).encode(image)
    monkeypatch.setattr("wicore.engine.tensorrt.vision_networks._BLOCK", 20)
    assert VisionShape.of(config()).block == 16
    cut = tower(device)
    assert relative_error(cut.encode(image), expected) < 1e-3
    assert [kind for kind, _ in cut._networks.runs].count("vision_attention") == 2 * 3 * 4


# --- its edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [np.zeros((56, 55, 3), np.uint8), np.zeros((56, 56), np.uint8), np.zeros((56, 56, 3), np.float32)],
    ids=["not square", "grey", "floats"],
)
def test_other_pixels_are_refused_with_what_is_expected(vision, bad) -> None:
    with pytest.raises(ValueError, match=r"pixels: expected uint8 \(56, 56, 3\), found"):
        vision.encode(bad)


def test_rows_that_are_no_numbers_are_an_error() -> None:
    device = EmulatedDevice()
    found = tower(device)
    address = found._weights.layers[1]["fc2"]
    device.fill(address, 0xFF, 2, device.stream())
    with pytest.raises(EngineError, match="rows are not finite"):
        found.encode(pixels())


def test_a_closed_tower_gives_its_memory_back_and_says_so() -> None:
    device = EmulatedDevice()
    found = tower(device)
    assert sum(device.report().values()) == vision_bytes(config(), device)
    found.close()
    found.close()
    assert not device.report()
    with pytest.raises(EngineError, match="was closed"):
        found.encode(pixels())


# --- in an engine -----------------------------------------------------------------------------------


def engine(memory_bytes: int = 64 << 20, *, open_vision: Any = None, **given: Any):
    options = {"open_vision": open_vision} if open_vision else {}
    return build_engine(
        settings(**given),
        config(),
        EmulatedDevice(memory_bytes=memory_bytes),
        RandomWeights(config()),
        context=512,
        content=lambda: "random",
        **options,
    )


def test_an_engine_has_its_tower_within_the_budget_and_names_its_memory() -> None:
    with_tower, without = engine(open_vision=segments), engine()
    memory = with_tower.info.memory
    assert memory["the vision tower's weights"] == vision_weight_bytes(config())
    assert "the vision tower's activations" in memory
    assert sum(memory.values()) <= 0.92 * (64 << 20)
    assert with_tower.info.global_blocks < without.info.global_blocks
    encoder = create_tensorrt_vision(settings(), None, with_tower)
    assert encoder.encode(pixels()).shape == (4, config().hidden_size)
    assert create_tensorrt_vision(settings(), None, without) is None
    with_tower.close()
    with pytest.raises(EngineError, match="was closed"):
        encoder.encode(pixels())


def test_a_tower_that_does_not_fit_is_told_before_weights_are_read(monkeypatch) -> None:
    monkeypatch.setattr("wicore.engine.tensorrt.build.load_weights", None)
    large = replace(VISION, hidden_size=2400, heads=4, intermediate_size=9600)
    monkeypatch.setattr("tests.test_gpu_vision.VISION", large)
    says = r"GPU memory: .* needed \(weights .*; .*model.max_images: 0 leaves out the vision tower \(.* MB\)"
    with pytest.raises(EngineError, match=says):
        engine(open_vision=segments)


def test_where_no_images_are_served_the_tower_is_left_out() -> None:
    found = engine(open_vision=segments, model__max_images=0)
    assert found.vision is None
    assert not any("vision" in name for name in found.info.memory)
    found.close()


def test_encoding_between_steps_leaves_their_results_alone() -> None:
    found = engine(open_vision=segments)
    [row] = rows(found, 1, 60)
    plan = StepPlan((row.input([5, 6, 7], sample=True),))
    before = found.step(plan).outputs[row.key].token
    found.vision.encode(pixels())
    assert found.step(plan).outputs[row.key].token == before
    found.close()
