"""The segment networks: what they compute, and that TensorRT builds them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from tests.numpy_ops import evaluate
from tests.reference import inflate, products_before_norms, random_inputs, relative_error, segment
from wicore.engine.tensorrt import networks, trt_api
from wicore.engine.tensorrt.networks import (
    HALF_MAX,
    KINDS,
    HalfType,
    Kind,
    SegmentShape,
    bindings,
    define,
    flops,
    rows_of,
)
from wicore.engine.tensorrt.trt_api import Backend, BuildOptions, TensorRTOps, build, load_backend
from wicore.errors import EngineError
from wicore.gemma3.config import PUBLISHED
from wicore.gemma3.hf_config import config_of_folder

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = SegmentShape(hidden=64, inner=96, attention=48, qkv=80, vocab=300, eps=1e-6)
SHAPES = {name: SegmentShape.of(PUBLISHED[name]) for name in ("gemma-3-270m", "gemma-3-27b")} | {
    name: SegmentShape.of(config_of_folder(FIXTURES / name)) for name in ("tiny", "tiny-mqa", "tiny-image")
}


@pytest.fixture(scope="session")
def rtx() -> Backend:
    """TensorRT for RTX, which builds without a GPU."""
    if not os.environ.get("CI"):
        pytest.importorskip("tensorrt_rtx")
    return load_backend("tensorrt_rtx")


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_the_mathematics_of_its_segment(kind: Kind) -> None:
    given = random_inputs(kind, SMALL, 5, half=np.float64)
    found = evaluate(kind, SMALL, given, wide=np.float64, narrow=np.float64)
    expected = segment(kind, SMALL, given)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits_cost_a_thousandth(kind: Kind) -> None:
    given = random_inputs(kind, SMALL, 7, seed=1)
    expected = segment(kind, SMALL, given)
    for name, values in evaluate(kind, SMALL, given).items():
        assert relative_error(values, expected[name]) < 1.5e-3, name


@pytest.mark.parametrize("kind", ["middle", "last"])
def test_weights_inflated_64_times_overflow_nothing(kind: Kind) -> None:
    shape = SHAPES["gemma-3-270m"]
    given = inflate(random_inputs(kind, shape, 4, seed=2))
    for name, product in products_before_norms(shape, given).items():
        assert np.abs(product).max() > HALF_MAX, name  # or the test would prove nothing
    expected = segment(kind, shape, given)
    for name, values in evaluate(kind, shape, given).items():
        assert relative_error(values, expected[name]) < 2e-3, name


@pytest.mark.parametrize("kind", ["middle", "last"])
def test_what_no_scale_could_hold_is_clipped_and_stays_finite(kind: Kind) -> None:
    given = inflate(random_inputs(kind, SMALL, 3))
    for name in ("attention", "o", "down", "gate", "up"):
        given[name] = np.clip(given[name].astype(np.float32) * 1000, -HALF_MAX, HALF_MAX).astype(np.float16)
    for name, values in evaluate(kind, SMALL, given).items():
        assert np.isfinite(values.astype(np.float32)).all(), name


def test_the_halves_of_the_fused_matrix_are_two_bindings() -> None:
    named = {binding.name: binding for binding in bindings("middle", SMALL)}
    assert named["gate"].nbytes(1) == SMALL.inner * SMALL.hidden * 2
    assert named["up"].shape == named["gate"].shape == (SMALL.inner, SMALL.hidden)


def test_the_residual_stream_is_float32_and_products_are_not() -> None:
    types = {binding.name: binding.dtype for kind in KINDS for binding in bindings(kind, SMALL)}
    assert {types[name] for name in ("residual", "residual_out", "norm", "logits")} == {"float32"}
    assert {types[name] for name in ("attention", "qkv", "hidden", "o", "gate", "up", "down")} == {"half"}


def test_operations_of_a_segment_are_counted_from_its_matrices() -> None:
    shape = SHAPES["gemma-3-27b"]
    per_row = 4096 * 5376 + 3 * 5376 * 21_504 + 5376 * 8192
    assert flops("middle", shape, 2048) == 2 * 2048 * per_row
    assert flops("first", shape, 1) == 2 * 5376 * 8192


def test_the_head_is_built_for_few_rows_only() -> None:
    assert rows_of("middle", (512, 64, 8192)) == (64, 512, 8192)
    assert rows_of("head", (512, 64, 8192)) == (64,)
    assert rows_of("head", (2048, 512)) == (512,)


def test_every_kind_has_a_definition() -> None:
    assert get_args(networks.Kind) == KINDS == ("first", "middle", "last", "head")


@pytest.mark.parametrize("half", get_args(HalfType))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_network_builds_ahead_of_time(rtx: Backend, name: str, kind: Kind, half: HalfType) -> None:
    plan = build(
        rtx,
        lambda ops: define(kind, SHAPES[name], ops),
        half=half,
        rows=64,
        capability="8.9",
        options=BuildOptions(),
    )
    assert 1_000 < len(plan) < 2_000_000  # no weight is in it


@pytest.mark.parametrize("kind", KINDS)
def test_a_built_network_has_the_bindings_that_are_documented(rtx: Backend, kind: Kind) -> None:
    shape = SHAPES["gemma-3-27b"]
    ops = TensorRTOps(rtx, rtx.module.Builder(rtx.logger), "bfloat16")
    define(kind, shape, ops)
    network = ops.network
    found = [network.get_input(i) for i in range(network.num_inputs)]
    found += [network.get_output(i) for i in range(network.num_outputs)]
    types = {"half": "bfloat16", "float32": "float32", "int32": "int32"}
    assert [(t.name, t.dtype, tuple(t.shape)) for t in found] == [
        (b.name, rtx.element(types[b.dtype]), b.shape) for b in bindings(kind, shape)
    ]


def test_a_card_that_the_library_does_not_know_is_refused_with_those_it_does(rtx: Backend) -> None:
    with pytest.raises(EngineError, match=r"builds for compute capability .*8\.9.*; not 9\.0"):
        build(
            rtx,
            lambda ops: define("head", SMALL, ops),
            half="float16",
            rows=1,
            capability="9.0",
            options=BuildOptions(),
        )


def test_a_library_that_is_not_there_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(trt_api.importlib, "import_module", absent)
    with pytest.raises(EngineError, match=r"No module named 'tensorrt'.*pip install 'wicore\[gpu\]'"):
        trt_api.load_backend.__wrapped__("tensorrt")
    with pytest.raises(EngineError, match=r"pip install 'wicore\[rtx\]'"):
        trt_api.load_backend.__wrapped__("tensorrt_rtx")
