"""The vision tower's networks: what they compute, that TensorRT builds them, and the tower they make."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from tests.fake_tensorrt import FakeTensorRT
from tests.numpy_ops import evaluate
from tests.reference import relative_error
from tests.vision_reference import network, random_inputs
from wicore.engine.tensorrt.networks import HALF_MAX, HalfType
from wicore.engine.tensorrt.trt_api import Backend, BuildOptions, TensorRTOps, build, load_backend
from wicore.engine.tensorrt.vision_networks import (
    VISION_KINDS,
    VisionKind,
    VisionShape,
    bindings,
    define,
    flops,
)

SMALL = VisionShape(hidden=24, inner=40, heads=2, patches=36, patch=12, tokens=9, out=32, eps=1e-6)
PUBLISHED = VisionShape(
    hidden=1152, inner=4304, heads=16, patches=4096, patch=588, tokens=256, out=5376, eps=1e-6
)
SCRATCH_OF_SCORES = 200 << 20


@pytest.fixture(scope="session")
def rtx() -> Backend:
    """TensorRT for RTX, which builds without a GPU."""
    if not os.environ.get("CI"):
        pytest.importorskip("tensorrt_rtx")
    return load_backend("tensorrt_rtx")


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_a_network_is_the_mathematics_of_its_part(kind: VisionKind) -> None:
    given = random_inputs(kind, SMALL, half=np.float64)
    found = evaluate(kind, SMALL, given, wide=np.float64, narrow=np.float64)
    expected = network(kind, SMALL, given)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_sixteen_bits_cost_a_thousandth(kind: VisionKind) -> None:
    given = random_inputs(kind, SMALL, seed=1)
    expected = network(kind, SMALL, given)
    for name, values in evaluate(kind, SMALL, given).items():
        assert relative_error(values, expected[name]) < 1.5e-3, name


def test_activations_beyond_half_reach_the_residual_stream_whole() -> None:
    given = random_inputs("vision_middle", SMALL, seed=2)
    given["attended"] = given["attended"] * np.float16(4000)
    given["out"], given["fc2"] = given["out"] * np.float16(60), given["fc2"] * np.float16(2000)
    given["fc1_bias"] = given["fc1_bias"] + np.float32(300)
    expected = network("vision_middle", SMALL, given)
    delta = np.abs(expected["residual_out"] - given["residual"])
    assert delta.max() > HALF_MAX  # or the test would prove nothing
    found = evaluate("vision_middle", SMALL, given)
    for name, values in expected.items():
        assert relative_error(found[name], values) < 2e-3, name


@pytest.mark.parametrize("kind", ["vision_middle", "vision_last"])
def test_what_no_scale_could_hold_is_clipped_and_stays_finite(kind: VisionKind) -> None:
    given = random_inputs(kind, SMALL, seed=3)
    for name in ("attended", "out", "fc1", "fc2"):
        given[name] = np.clip(given[name].astype(np.float32) * 1e5, -HALF_MAX, HALF_MAX).astype(np.float16)
    for name, values in evaluate(kind, SMALL, given).items():
        assert np.isfinite(values.astype(np.float32)).all(), name


def test_blocks_of_attention_divide_the_patches_and_keep_scores_small() -> None:
    assert PUBLISHED.block == 256
    assert 4 * PUBLISHED.heads * PUBLISHED.block * PUBLISHED.patches < SCRATCH_OF_SCORES
    assert SMALL.block == 36
    assert replace(SMALL, patches=27 * 27).block == 243


def test_operations_of_an_image_are_counted_from_its_products() -> None:
    weights = 4 * 1152**2 + 2 * 1152 * 4304
    layer = 2 * 4096 * weights + 4 * 4096 * 4096 * 1152
    ends = 2 * 4096 * 588 * 1152 + 2 * 256 * 1152 * 5376
    assert flops(PUBLISHED, 27) == 27 * layer + ends


@pytest.mark.parametrize("half", get_args(HalfType))
@pytest.mark.parametrize("kind", VISION_KINDS)
@pytest.mark.parametrize("shape", [SMALL, PUBLISHED], ids=["small", "published"])
def test_every_network_builds_ahead_of_time(
    rtx: Backend, shape: VisionShape, kind: VisionKind, half: HalfType
) -> None:
    plan = build(
        rtx,
        lambda ops: define(kind, shape, ops),
        half=half,
        rows=shape.rows(kind),
        capability="8.9",
        options=BuildOptions(),
    )
    assert 1_000 < len(plan) < 2_000_000  # no weight is in it


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_a_built_network_has_the_bindings_that_are_documented(rtx: Backend, kind: VisionKind) -> None:
    ops = TensorRTOps(rtx, rtx.module.Builder(rtx.logger), "float16")
    define(kind, PUBLISHED, ops)
    built = ops.network
    found = [built.get_input(i) for i in range(built.num_inputs)]
    found += [built.get_output(i) for i in range(built.num_outputs)]
    types = {"half": "float16", "float32": "float32"}
    assert [(t.name, t.dtype, tuple(t.shape)) for t in found] == [
        (b.name, rtx.element(types[b.dtype]), b.shape) for b in bindings(kind, PUBLISHED)
    ]


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_tensorrt_8_is_told_what_to_compute_every_layer_in(kind: VisionKind) -> None:
    backend = Backend("tensorrt", FakeTensorRT("8.6.0"))
    options = BuildOptions()
    build(
        backend,
        lambda ops: define(kind, SMALL, ops),
        half="float16",
        rows=1,
        capability="9.0",
        options=options,
    )
    network = backend.module.builders[-1].network
    types = backend.module.DataType
    wide = {"softmax", "reduce", "unary", "activation", "elementwise"}
    assert len(network.layers) > 5
    for layer in network.layers:
        if layer.what in wide:
            assert (layer.precision, layer.output_type) == (types.FLOAT, types.FLOAT), layer.what
        elif layer.what not in ("constant", "cast"):
            assert layer.output_type in (types.FLOAT, types.HALF), layer.what
            assert layer.precision == layer.output_type
    assert not backend.module.builders[-1].config.profiles  # every shape is fixed
