"""Segments built and run by the TensorRT of this machine, on its card, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.gpu.segment_trial import SegmentTrial
from tests.reference import inflate, random_inputs, relative_error, segment
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.networks import KINDS, Kind, SegmentShape
from wicore.engine.tensorrt.plans import PlanCache, build_plan, plan_keys
from wicore.engine.tensorrt.segments import Segments
from wicore.engine.tensorrt.trt_api import load_backend

SHAPE = SegmentShape(hidden=640, inner=2048, attention=1024, qkv=1536, vocab=2000, eps=1e-6)
BUCKETS = (16, 128)


@pytest.fixture(scope="module")
def segments(card: Device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Segments]:
    """All plans of a small model, built by the tensorrt that is installed."""
    pytest.importorskip("tensorrt")
    backend, cache = load_backend("tensorrt"), PlanCache(Path(tmp_path_factory.mktemp("plans")))
    major, minor = card.capability
    for key in plan_keys(backend, f"{major}.{minor}", SHAPE, BUCKETS):
        build_plan(key, cache)
    opened = Segments(card, cache, SHAPE, BUCKETS, backend=backend)
    yield opened
    opened.close()


@pytest.mark.parametrize("inflated", [False, True], ids=["plain", "inflated"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_computes_what_float64_does(
    card: Device, segments: Segments, kind: Kind, inflated: bool
) -> None:
    most = segments.max_rows(kind)
    given = random_inputs(kind, SHAPE, most)
    given = inflate(given) if inflated else given
    expected = segment(kind, SHAPE, given)
    trial = SegmentTrial(card, kind, SHAPE, given)
    for rows in sorted({1, 5, 16, 17, most}):
        if rows <= most:
            for name, found in trial.run(segments, rows).items():
                assert relative_error(found, expected[name][:rows]) < 5e-3, (name, rows)
    trial.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_run_gives_the_same_bits(card: Device, segments: Segments, kind: Kind) -> None:
    trial = SegmentTrial(card, kind, SHAPE, random_inputs(kind, SHAPE, 16))
    before = trial.run(segments, 9)
    trial.milliseconds(segments, 9, budget_ms=1)
    for name, found in trial.run(segments, 9).items():
        np.testing.assert_array_equal(found, before[name])
    trial.close()
