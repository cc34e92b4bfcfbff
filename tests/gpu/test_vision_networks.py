"""The vision tower's networks built and run by the TensorRT of this machine, on its card, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.gpu.segment_trial import SegmentTrial
from tests.reference import relative_error
from tests.vision_reference import network, random_inputs
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.plans import PlanCache, build_plan, plan_keys
from wicore.engine.tensorrt.segments import Segments
from wicore.engine.tensorrt.trt_api import load_backend
from wicore.engine.tensorrt.vision_networks import VISION_KINDS, VisionKind, VisionShape

SHAPE = VisionShape(hidden=144, inner=304, heads=2, patches=1024, patch=588, tokens=16, out=320, eps=1e-6)
"""With the published heads, of 72, and several blocks of attention."""


@pytest.fixture(scope="module")
def segments(card: Device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Segments]:
    """All plans of a small tower, built by the tensorrt that is installed."""
    pytest.importorskip("tensorrt")
    backend, cache = load_backend("tensorrt"), PlanCache(Path(tmp_path_factory.mktemp("plans")))
    major, minor = card.capability
    for key in plan_keys(backend, f"{major}.{minor}", SHAPE, (), kinds=VISION_KINDS):
        build_plan(key, cache)
    opened = Segments(card, cache, SHAPE, (), backend=backend, kinds=VISION_KINDS)
    yield opened
    opened.close()


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_a_network_computes_what_float64_does(card: Device, segments: Segments, kind: VisionKind) -> None:
    given = random_inputs(kind, SHAPE)
    expected = network(kind, SHAPE, given)
    trial = SegmentTrial(card, kind, SHAPE, given)
    for name, found in trial.run(segments, SHAPE.rows(kind)).items():
        assert relative_error(found, expected[name]) < 5e-3, name
    trial.close()


def test_large_activations_reach_the_residual_stream_whole(card: Device, segments: Segments) -> None:
    given = random_inputs("vision_middle", SHAPE, seed=2)
    given["attended"] = given["attended"] * np.float16(4000)
    given["out"], given["fc2"] = given["out"] * np.float16(60), given["fc2"] * np.float16(1000)
    expected = network("vision_middle", SHAPE, given)
    trial = SegmentTrial(card, "vision_middle", SHAPE, given)
    for name, found in trial.run(segments, SHAPE.patches).items():
        assert relative_error(found, expected[name]) < 5e-3, name
    trial.close()
