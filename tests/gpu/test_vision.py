"""The vision tower on the card, by the TensorRT of this machine and by our kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.reference import relative_error
from tests.test_gpu_vision import config, in_float64, pixels
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.engine.tensorrt.plans import PlanCache, build_plan, plan_keys
from wicore.engine.tensorrt.segments import Segments
from wicore.engine.tensorrt.trt_api import load_backend
from wicore.engine.tensorrt.vision import SCRATCH, TensorrtVision, open_vision_networks
from wicore.engine.tensorrt.vision_kernels import fits
from wicore.engine.tensorrt.vision_networks import VISION_KINDS, VisionShape
from wicore.engine.tensorrt.vision_weights import load_vision
from wicore.engine.tensorrt.weights import RandomWeights

LIMIT = 1e-2


def opened(shape: VisionShape, device: CudaDevice, folder: Path) -> Segments:
    """Plans of a tower, built now."""
    pytest.importorskip("tensorrt")
    backend, cache = load_backend("tensorrt"), PlanCache(folder)
    for key in plan_keys(backend, "{}.{}".format(*device.capability), shape, (), kinds=VISION_KINDS):
        build_plan(key, cache)
    return Segments(device, cache, shape, (), backend=backend, kinds=VISION_KINDS, scratch=SCRATCH)


@pytest.fixture(scope="module", params=["TensorRT", "kernels"])
def vision(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TensorrtVision]:
    """Of random weights."""
    device, networks = CudaDevice(), None
    if request.param == "TensorRT":
        networks = opened(VisionShape.of(config()), device, tmp_path_factory.mktemp("plans"))
    elif fits(device.capability, VisionShape.of(config())):
        networks = open_vision_networks(config(), device)
    else:
        pytest.skip("this card has no kernels for it")
    assert networks is not None
    weights = load_vision(device, RandomWeights(config(), seed=3))
    found = TensorrtVision(device, config(), weights, networks)
    yield found
    found.close()
    device.close()


def test_rows_are_those_of_the_mathematics(vision) -> None:
    for seed in range(2):
        expected = in_float64(vision._device, vision._weights, pixels(seed))
        assert relative_error(vision.encode(pixels(seed)), expected) < LIMIT


def test_equal_pixels_give_equal_rows_whatever_came_between(vision) -> None:
    first = vision.encode(pixels(1))
    assert not np.array_equal(first, vision.encode(pixels(2)))
    np.testing.assert_array_equal(vision.encode(pixels(1)), first)
