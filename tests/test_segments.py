"""Building and running segments through both dialects of TensorRT, against a fake that records."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.emulation import EmulatedDevice
from tests.fake_tensorrt import FakeTensorRT, Severity
from tests.gpu.segment_trial import SegmentTrial
from tests.numpy_segments import NumpySegments
from tests.reference import random_inputs, relative_error, segment
from wicore.engine.tensorrt.networks import KINDS, Kind, SegmentShape, bindings, define
from wicore.engine.tensorrt.plans import PlanCache, plan_keys
from wicore.engine.tensorrt.segments import Segments
from wicore.engine.tensorrt.trt_api import Backend, BuildOptions, build
from wicore.errors import EngineError

SHAPE = SegmentShape(hidden=64, inner=96, attention=48, qkv=80, vocab=300, eps=1e-6)
BUCKETS = (16, 64)
VERSIONS = ["8.6.0", "11.4.0"]


class FakeDevice:
    """Memory that is only numbered."""

    capability = (9, 0)

    def __init__(self) -> None:
        self.allocated: list[tuple[int, str]] = []
        self.freed = 0

    def allocate(self, size: int, what: str) -> Any:
        self.allocated.append((size, what))
        return SimpleNamespace(address=4096, size=size, free=self._free)

    def _free(self) -> None:
        self.freed += 1


def backend_of(version: str) -> Backend:
    return Backend("tensorrt", FakeTensorRT(version))


def built(backend: Backend, kind: Kind, rows: int = 64, **options: Any) -> bytes:
    return build(
        backend,
        lambda ops: define(kind, SHAPE, ops),
        half="float16",
        rows=rows,
        capability="9.0",
        options=BuildOptions(**options),
    )


def filled(folder: Path, backend: Backend, capability: str = "9.0") -> PlanCache:
    cache = PlanCache(folder)
    for key in plan_keys(backend, capability, SHAPE, BUCKETS):
        cache.store(key, built(backend, key.kind, key.rows))
    return cache


def opened(folder: Path, version: str = "8.6.0") -> tuple[Segments, FakeTensorRT, FakeDevice]:
    backend, device = backend_of(version), FakeDevice()
    segments = Segments(device, filled(folder, backend), SHAPE, BUCKETS, backend=backend)
    return segments, backend.module, device


def addresses(kind: Kind, base: int = 0x10000) -> dict[str, int]:
    return {b.name: base + 256 * i for i, b in enumerate(bindings(kind, SHAPE))}


STREAM: Any = SimpleNamespace(handle=7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weakly_typed_network_says_of_every_layer_what_it_computes_in(kind: Kind) -> None:
    backend = backend_of("8.6.0")
    built(backend, kind)
    types = backend.module.DataType
    for layer in backend.module.builders[-1].network.layers:
        if layer.what == "cast":
            assert layer.inputs[1] in (types.FLOAT, types.HALF)
        elif layer.what == "constant":
            assert layer.output_type == types.FLOAT
        else:
            narrow = layer.what in ("matrix_multiply", "gather")
            assert layer.precision == layer.output_type == (types.HALF if narrow else types.FLOAT)


def test_a_strongly_typed_network_leaves_types_to_its_inputs_and_casts() -> None:
    backend = backend_of("11.4.0")
    built(backend, "middle")
    builder = backend.module.builders[-1]
    assert builder.network.flags == 1 << 1
    assert {layer.precision for layer in builder.network.layers} == {None}
    assert builder.config.flags == {backend.module.BuilderFlag.REQUIRE_USER_ALLOCATION}


def test_a_plan_is_for_one_row_to_its_bucket_and_best_at_the_bucket() -> None:
    backend = backend_of("8.6.0")
    built(backend, "middle", 512, workspace_bytes=1 << 20)
    config = backend.module.builders[-1].config
    assert [profile.shapes for profile in config.profiles] == [
        {
            "attention": ((1, 48), (512, 48), (512, 48)),
            "residual": ((1, 64), (512, 64), (512, 64)),
        }
    ]
    assert config.tactic_sources == 0
    assert config.workspace == 1 << 20


def test_a_build_that_fails_gives_tensorrts_reason() -> None:
    backend = backend_of("8.6.0")
    backend.module.failure = "Could not find any implementation for node"
    with pytest.raises(EngineError, match=r"could not build a plan for 64 rows: Could not find any impl"):
        built(backend, "last")


def test_bfloat16_is_refused_where_there_is_none() -> None:
    with pytest.raises(EngineError, match=r"tensorrt 8\.6\.0 has no bfloat16; use float16"):
        backend_of("8.6.0").element("bfloat16")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_binds_every_tensor_and_uses_the_smallest_bucket_that_holds_it(
    tmp_path: Path, version: str
) -> None:
    segments, module, _ = opened(tmp_path, version)
    segments.run(STREAM, "middle", 17, addresses("middle"))
    (used,) = [context for context in module.contexts if context.runs]
    assert used.runs == [(7, addresses("middle"))]
    assert used.shapes == [("attention", (17, 48)), ("residual", (17, 64))]
    assert segments.bucket("middle", 16) == 16
    assert segments.bucket("middle", 17) == segments.max_rows("middle") == 64


def test_another_layer_needs_new_addresses_only(tmp_path: Path) -> None:
    segments, module, _ = opened(tmp_path)
    for base in (0x10000, 0x20000):
        segments.run(STREAM, "middle", 5, addresses("middle", base))
    (used,) = [context for context in module.contexts if context.runs]
    assert len(used.shapes) == 2
    assert [run[1]["o"] for run in used.runs] == [
        addresses("middle", base)["o"] for base in (0x10000, 0x20000)
    ]
    segments.run(STREAM, "middle", 6, addresses("middle"))
    assert used.shapes[2:] == [("attention", (6, 48)), ("residual", (6, 64))]


@pytest.mark.parametrize("version", VERSIONS)
def test_all_plans_share_one_piece_of_memory_as_large_as_the_largest_needs(
    tmp_path: Path, version: str
) -> None:
    segments, module, device = opened(tmp_path, version)
    most = 1000 * len(bindings("middle", SHAPE))
    assert device.allocated == [(most, "the TensorRT segments' scratch memory")]
    assert segments.memory_bytes == most
    assert {context.device_memory for context in module.contexts} == {4096}
    segments.close()
    segments.close()
    assert device.freed == 1


def test_a_run_that_fails_gives_tensorrts_reason_once(tmp_path: Path) -> None:
    segments, module, _ = opened(tmp_path)
    module.failure = "Cuda error 700"
    with pytest.raises(
        EngineError, match=r"head segment, 16 rows: the run of 3 rows failed: Cuda error 700$"
    ):
        segments.run(STREAM, "head", 3, addresses("head"))
    module.failure = ""
    segments.run(STREAM, "head", 3, addresses("head"))


def test_a_tensor_that_nothing_is_bound_to_is_named(tmp_path: Path) -> None:
    segments, _, _ = opened(tmp_path)
    bound = addresses("last")
    del bound["post_mlp"]
    with pytest.raises(EngineError, match=r"last segment, 16 rows: nothing is bound to 'post_mlp'"):
        segments.run(STREAM, "last", 3, bound)


@pytest.mark.parametrize("rows", [0, 65])
def test_rows_that_no_plan_holds_are_refused(tmp_path: Path, rows: int) -> None:
    segments, _, _ = opened(tmp_path)
    with pytest.raises(EngineError, match=f"no middle segment for {rows} rows"):
        segments.run(STREAM, "middle", rows, addresses("middle"))


def test_a_missing_plan_names_the_command_that_builds_it(tmp_path: Path) -> None:
    backend = backend_of("8.6.0")
    with pytest.raises(EngineError, match=r"no plan of the first segment, 16 rows.*run `wicore plan build`"):
        Segments(FakeDevice(), PlanCache(tmp_path), SHAPE, BUCKETS, backend=backend)


def test_plans_of_another_version_or_card_are_told_of(tmp_path: Path) -> None:
    filled(tmp_path, backend_of("8.5.3"))
    filled(tmp_path, backend_of("8.6.0"), "8.9")
    with pytest.raises(EngineError) as caught:
        Segments(FakeDevice(), PlanCache(tmp_path), SHAPE, BUCKETS, backend=backend_of("8.6.0"))
    told = "plans for tensorrt 8.5.3 on compute capability 9.0, tensorrt 8.6.0 on compute capability 8.9"
    assert told in caught.value.message


def test_a_plan_that_tensorrt_refuses_says_how_to_build_it_again(tmp_path: Path) -> None:
    backend = backend_of("8.6.0")
    cache = filled(tmp_path, backend)
    cache.store(plan_keys(backend, "9.0", SHAPE, BUCKETS)[0], b"of another build")
    with pytest.raises(EngineError, match=r"`wicore plan build --rebuild`: Serialization assertion"):
        Segments(FakeDevice(), cache, SHAPE, BUCKETS, backend=backend)


def test_what_tensorrt_logs_is_logged_at_its_level(caplog: pytest.LogCaptureFixture) -> None:
    backend = backend_of("8.6.0")
    with caplog.at_level(logging.DEBUG, "wicore"):
        for severity in Severity:
            backend.logger.log(severity, f" {severity.name} ")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "INTERNAL_ERROR"),
        ("ERROR", "ERROR"),
        ("WARNING", "WARNING"),
        ("DEBUG", "INFO"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_segments_on_the_emulated_device_compute_what_float64_does(kind: Kind) -> None:
    device, segments = EmulatedDevice(), NumpySegments(SHAPE, BUCKETS)
    given = random_inputs(kind, SHAPE, 16)
    expected = segment(kind, SHAPE, given)
    trial: Any = SegmentTrial(device, kind, SHAPE, given)
    for name, found in trial.run(segments, 5).items():
        assert relative_error(found, expected[name][:5]) < 1.5e-3
    trial.milliseconds(segments, 5, budget_ms=0)
    assert len(segments.runs) == 1 + 1 + 10 + 3 + 3  # a graph replays runs, capturing it makes none
    assert set(segments.runs) == {(kind, 5)}
    trial.close()
    device.close()
