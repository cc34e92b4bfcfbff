"""Steps with images on the card: what rows of an image see and give, however the engine computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest

from tests.gpu_engines import engine_on
from tests.test_gpu_image_steps import *  # noqa: F403  all of it, on the engines below
from tests.test_gpu_image_steps import checkpoint
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.engine.tensorrt.engine import TensorrtEngine

MODES: Mapping[str, Callable[[], TensorrtEngine]] = {
    "by rule": lambda: engine_on(CudaDevice(), checkpoint()),
    "as measured": lambda: engine_on(CudaDevice(), checkpoint(), tune=lambda measure: measure()),
    "invariant": lambda: engine_on(CudaDevice(), checkpoint(), invariant=True),
}


@pytest.fixture(scope="module", params=MODES)
def engine(request: pytest.FixtureRequest) -> Iterator[TensorrtEngine]:
    found = MODES[request.param]()
    yield found
    found.close()
