"""The vision tower of the CPU engine, beside transformers and a tower in float64."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engines import FIXTURES
from tests.reference import gelu_tanh, relative_error, rms_norm
from tests.vision_reference import attention, layer_norm, pool
from wicore.config import load_settings
from wicore.engine.cpu import vision as cpu
from wicore.engine.cpu.vision import CpuVision
from wicore.engine.factory import create_vision
from wicore.engine.null import NullVision
from wicore.engine.tensorrt.vision_networks import VisionShape
from wicore.errors import EngineError
from wicore.gemma3.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from wicore.gemma3.config import Gemma3Config, VisionConfig

ROUNDING = 1e-5
"""Relative error of float32 against float64, or another order of sums."""
TOWER = VisionConfig(48, 3, 4, 80, 72, 3, 36, 1e-6, 509, 510, 511)
"""576 patches: more than the MLP takes at a time, and not a multiple of it."""


def random_checkpoint(vision: VisionConfig, seed: int = 0) -> Checkpoint:
    """The tiny text model with a tower whose products keep the size of their input."""
    config = replace(open_checkpoint(FIXTURES / "tiny").config, vision=vision)
    rng = np.random.default_rng(seed)

    def stored(name: str, shape: tuple[int, ...]) -> StoredTensor:
        width = shape[0] if name.endswith("projection_weight") else math.prod(shape[1:])
        values = rng.standard_normal(shape, np.float32) * np.float32(0.3 if len(shape) == 1 else width**-0.5)
        values += np.float32("layer" in name and "norm" in name and name.endswith(".weight"))
        raw = values.reshape(-1, shape[-1]).view(np.uint8)
        return StoredTensor(shape, "F32", raw, lambda rows: rows.view(np.float32).copy())

    shapes = config.tensor_shapes() | config.vision_shapes()
    tensors = {name: stored(name, shape) for name, shape in shapes.items()}
    return Checkpoint(Path("random"), config, tensors, bytes)


def in_float64(checkpoint: Checkpoint, pixels: NDArray[np.uint8]) -> NDArray[Any]:
    """The rows of an image, [tokens, hidden], written apart from the graphs: a convolution, no blocks."""
    vision, shape = checkpoint.config.vision, VisionShape.of(checkpoint.config)
    assert vision is not None

    def read(name: str) -> NDArray[Any]:
        return checkpoint.read(name).astype(np.float64)

    def both(name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        return read(f"{name}.weight"), read(f"{name}.bias")

    def linear(x: NDArray[Any], name: str) -> NDArray[Any]:
        weight, bias = both(name)
        return x @ weight.T + bias

    side, across = vision.patch_size, vision.image_size // vision.patch_size
    values = (pixels / 255 - 0.5) / 0.5
    kernel, bias = both("vision_tower.embeddings.patch_embedding")
    x = np.empty((vision.patches, vision.hidden_size))
    for at in range(vision.patches):
        top, left = side * (at // across), side * (at % across)
        patch = values[top : top + side, left : left + side]
        x[at] = np.einsum("hcyx,yxc->h", kernel, patch) + bias
    x += read("vision_tower.embeddings.position_embedding.weight")
    for i in range(vision.layers):
        layer = f"vision_tower.encoder.layers.{i}."
        normed = layer_norm(x, *both(f"{layer}layer_norm1"), vision.layer_norm_eps)
        q, k, v = (linear(normed, f"{layer}self_attn.{part}_proj") for part in "qkv")
        attended = attention(shape, q, np.concatenate([q, k, v], 1))
        x = x + linear(attended, f"{layer}self_attn.out_proj")
        normed = layer_norm(x, *both(f"{layer}layer_norm2"), vision.layer_norm_eps)
        x = x + linear(gelu_tanh(linear(normed, f"{layer}mlp.fc1")), f"{layer}mlp.fc2")
    normed = layer_norm(x, *both("vision_tower.post_layernorm"), vision.layer_norm_eps)
    factor = 1 + read("multi_modal_projector.mm_soft_emb_norm.weight")
    soft = rms_norm(pool(shape, normed), factor, vision.layer_norm_eps)
    return soft @ read("multi_modal_projector.mm_input_projection_weight")


def image(side: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return random_checkpoint(TOWER)


@pytest.fixture(scope="module")
def exact(checkpoint: Checkpoint) -> Iterator[CpuVision]:
    found = CpuVision(checkpoint, weights="float32", threads=2)
    yield found
    found.close()


# --- what it computes -------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["float32", "half"])
def test_rows_are_those_of_transformers(weights: cpu.TowerFormat) -> None:
    """In half, too: the file holds float16."""
    reference = np.load(FIXTURES / "tiny-image" / "images.npz")
    vision = CpuVision(open_checkpoint(FIXTURES / "tiny-image"), weights=weights)
    for pixels, rows in zip(reference["images"], reference["rows"], strict=True):
        found = vision.encode(pixels)
        assert found.dtype == np.float32
        assert relative_error(found, rows) < ROUNDING


def test_rows_are_those_of_a_tower_in_float64(checkpoint: Checkpoint, exact: CpuVision) -> None:
    for pixels in (image(72), np.zeros((72, 72, 3), np.uint8)):
        assert relative_error(exact.encode(pixels), in_float64(checkpoint, pixels)) < ROUNDING


def test_half_rounds_the_layers_matrices_and_nothing_else(checkpoint: Checkpoint) -> None:
    rounded = random_checkpoint(TOWER)
    matrices = [n for n, s in rounded.config.vision_shapes().items() if ".layers." in n and len(s) == 2]
    tensors = {name: checkpoint.stored(name) for name in checkpoint.names()}
    for name in matrices:
        half = tensors[name].raw.view(np.float32).astype(np.float16)
        tensors[name] = replace(tensors[name], raw=half.astype(np.float32).view(np.uint8))
    rounded = Checkpoint(Path("rounded"), checkpoint.config, tensors, bytes)
    found = CpuVision(checkpoint, weights="half").encode(image(72))
    assert relative_error(found, in_float64(rounded, image(72))) < ROUNDING
    assert ROUNDING < relative_error(found, in_float64(checkpoint, image(72))) < 2e-3


@pytest.mark.parametrize("rows", [9, 100, 576, 1000])
def test_how_many_rows_the_mlp_takes_at_a_time_changes_nothing(
    checkpoint: Checkpoint, exact: CpuVision, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(cpu, "build_layer", lambda *args: build_layer(*args, mlp_rows=rows))
    other = CpuVision(checkpoint, weights="float32", threads=2)
    assert relative_error(other.encode(image(72)), exact.encode(image(72))) < ROUNDING


build_layer = cpu.build_layer


def test_the_same_image_gives_the_same_bits_from_threads_at_once_too(exact: CpuVision) -> None:
    expected = [exact.encode(image(72, seed)) for seed in (0, 1)]
    found: dict[tuple[int, int], NDArray[np.float32]] = {}

    def encode(seed: int) -> None:
        for turn in range(4):
            found[seed, turn] = exact.encode(image(72, seed))

    threads = [threading.Thread(target=encode, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for (seed, _), rows in found.items():
        np.testing.assert_array_equal(rows, expected[seed])
    assert not np.array_equal(*expected)


def test_an_image_with_gaps_between_its_rows_is_read_as_it_is(exact: CpuVision) -> None:
    wide = image(144)
    np.testing.assert_array_equal(exact.encode(wide[::2, ::2]), exact.encode(wide[::2, ::2].copy()))


# --- memory -----------------------------------------------------------------------------------------

PEAK = """
import resource
from dataclasses import replace
from tests.test_cpu_vision import TOWER, image, random_checkpoint
from wicore.engine.cpu.vision import CpuVision

# As many patches and heads as Google published, of little width: the scores of a layer are 1 GB.
tower = replace(TOWER, hidden_size=64, layers=1, heads=16, intermediate_size=64, image_size=192, tokens=256)
assert tower.patches == 4096
vision = CpuVision(random_checkpoint(tower), threads=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
vision.encode(image(192))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is of other units there")
def test_scores_never_stand_in_memory() -> None:
    told = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True).stdout
    assert int(told) < 100 * 1024


# --- what it refuses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((72, 71, 3), np.uint8),
        np.zeros((3, 72, 72), np.uint8),
        np.zeros((72, 72), np.uint8),
        np.zeros((72, 72, 3), np.float32),
    ],
)
def test_other_shapes_and_types_of_pixels_are_refused_by_name(exact: CpuVision, pixels: Any) -> None:
    for vision in (exact, NullVision(TOWER, 64)):
        with pytest.raises(ValueError, match=r"expected uint8 \(72, 72, 3\), found"):
            vision.encode(pixels)


def changed(checkpoint: Checkpoint, name: str, value: float) -> Checkpoint:
    """The same with one weight that has another value."""
    tensors = {key: checkpoint.stored(key) for key in checkpoint.names()}
    values = tensors[name].raw.view(np.float32).copy()
    values.flat[7] = value
    tensors[name] = replace(tensors[name], raw=values.view(np.uint8))
    return Checkpoint(checkpoint.path, checkpoint.config, tensors, bytes)


def test_a_weight_that_half_does_not_hold_is_refused_with_the_setting_that_helps(
    checkpoint: Checkpoint,
) -> None:
    name = "vision_tower.encoder.layers.1.mlp.fc2.weight"
    large = changed(checkpoint, name, -70_000)
    with pytest.raises(
        EngineError, match=r"layers\.1\.mlp\.fc2.*70000.*engine\.weights to float32"
    ) as caught:
        CpuVision(large)
    assert caught.value.param == "engine.weights"
    CpuVision(large, weights="float32").encode(image(72))


def test_rows_that_are_no_numbers_are_an_engine_error(checkpoint: Checkpoint) -> None:
    spoilt = changed(checkpoint, "vision_tower.post_layernorm.bias", np.nan)
    with pytest.raises(EngineError, match="not finite"):
        CpuVision(spoilt).encode(image(72))


def test_a_closed_tower_says_so_and_may_be_closed_again(checkpoint: Checkpoint) -> None:
    vision = CpuVision(checkpoint)
    vision.close()
    vision.close()
    with pytest.raises(EngineError, match="closed"):
        vision.encode(image(72))


def test_a_model_without_a_tower_is_refused() -> None:
    with pytest.raises(ValueError, match="no vision tower"):
        CpuVision(open_checkpoint(FIXTURES / "tiny"))


# --- which encoder a worker gets --------------------------------------------------------------------


def encoder_of(given: Mapping[str, object], name: str = "tiny-image") -> Any:
    model: Any = SimpleNamespace(checkpoint=open_checkpoint(FIXTURES / name))
    return create_vision(load_settings([], {}, given), model, SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["cpu", "null", "tensorrt"])
def test_a_model_without_a_tower_or_without_images_allowed_has_no_encoder(kind: str) -> None:
    assert encoder_of({"engine.kind": kind}, "tiny") is None
    assert encoder_of({"engine.kind": kind, "model.max_images": 0}) is None


@pytest.mark.parametrize(("weights", "form"), [(None, "half"), ("int8", "half"), ("float32", "float32")])
def test_the_cpu_engine_has_a_tower_in_half_unless_weights_are_to_be_exact(
    monkeypatch: pytest.MonkeyPatch, weights: str | None, form: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(cpu, "build_layer", lambda *args: asked.append(args[1]) or build_layer(*args))
    assert isinstance(encoder_of({"engine.kind": "cpu", "engine.weights": weights}), CpuVision)
    assert asked == [form]


def test_the_null_engines_rows_are_as_many_and_as_wide_as_the_models() -> None:
    config: Gemma3Config = open_checkpoint(FIXTURES / "tiny-image").config
    assert config.vision is not None
    vision = encoder_of({"engine.kind": "null"})
    rows = vision.encode(image(config.vision.image_size))
    assert (rows.shape, rows.dtype) == ((config.vision.tokens, config.hidden_size), np.float32)
    vision.close()


def test_the_tensorrt_engine_brings_its_own() -> None:
    """None where what runs is not that engine; tests/test_gpu_vision.py has the rest."""
    assert encoder_of({"engine.kind": "tensorrt"}) is None
