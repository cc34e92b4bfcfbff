"""The engine on the card: the contract of every engine, parity in each mode, and a fault of the device.

Needs what the engine needs (pydantic, pyyaml, xxhash and so on) besides what kernel tests need.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.engines import FIXTURES, TINY, rows
from tests.gpu_engines import engine_on
from tests.test_engine_contract import *  # noqa: F403  all of it, on the engines below
from tests.test_gpu_engine import TOLERANCE, outputs
from tests.test_parity import relative_error
from wicore.engine.base import StepPlan
from wicore.engine.tensorrt.autotune import Choices
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.engine.tensorrt.engine import TensorrtEngine
from wicore.engine.tensorrt.networks import Kind, SegmentShape
from wicore.engine.tensorrt.plans import PlanCache, build_plan, plan_keys
from wicore.engine.tensorrt.segments import Segments
from wicore.gemma3.checkpoint import open_checkpoint

INVARIANT: Mapping[str, tuple[str, str]] = {name: (name, "float16") for name in TINY} | {
    "tiny, int8 kv": ("tiny", "int8")
}


@pytest.fixture(scope="module", params=INVARIANT)
def engine(request: pytest.FixtureRequest) -> Iterator[TensorrtEngine]:
    name, kv = INVARIANT[request.param]
    found = engine_on(CudaDevice(), open_checkpoint(FIXTURES / name), kv=kv, invariant=True)
    yield found
    found.close()


# --- parity -----------------------------------------------------------------------------------------


def on_card(name: str, **options: object) -> TensorrtEngine:
    return engine_on(CudaDevice(), open_checkpoint(FIXTURES / name), **options)


def measured(name: str, folder: Path) -> TensorrtEngine:
    """With the kernels that are fastest on this card."""
    return on_card(name, tune=lambda measure: measure())


def with_segments(name: str, folder: Path) -> TensorrtEngine:
    """With TensorRT's plans for every pass of more than 64 rows and none of fewer."""
    pytest.importorskip("tensorrt")
    from wicore.engine.tensorrt.trt_api import load_backend

    device, checkpoint = CudaDevice(), open_checkpoint(FIXTURES / name)
    backend, cache = load_backend("tensorrt"), PlanCache(folder)
    shape, buckets = SegmentShape.of(checkpoint.config), (128,)
    kinds: tuple[Kind, ...] = ("first", "middle", "last")
    capability = "{}.{}".format(*device.capability)
    for key in plan_keys(backend, capability, shape, buckets, kinds=kinds):
        build_plan(key, cache)
    segments = Segments(device, cache, shape, buckets, backend=backend, kinds=kinds)
    always = Choices(segments={64: False, 128: True})
    return engine_on(device, checkpoint, segments=segments, tune=lambda measure: always)


MODES: Mapping[str, Callable[[str, Path], TensorrtEngine]] = {
    "by rule": lambda name, folder: on_card(name),
    "as measured": measured,
    "TensorRT": with_segments,
    "invariant": lambda name, folder: on_card(name, invariant=True),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers_however_the_prompt_is_cut(name, mode, tmp_path) -> None:
    engine, reference = MODES[mode](name, tmp_path), np.load(FIXTURES / name / "reference.npz")
    [row] = rows(engine, 1, 300)
    parts = []
    for size in (200, 70, 1, 1, 28):
        tokens = reference["tokens"][row.start : row.start + size]
        parts.append(engine.logits(StepPlan((row.input(tokens),)))[row.key])
        row.start += size
    logits = np.concatenate(parts)
    engine.close()
    assert relative_error(logits[reference["positions"]], reference["logits"]) <= TOLERANCE
    assert (logits.argmax(-1) == reference["argmax"]).mean() >= 0.98


def test_a_replayed_graph_gives_what_its_launches_give() -> None:
    eager, replayed, prepared = on_card("tiny", graphs=False), on_card("tiny"), on_card("tiny")
    prepared.prepare()
    expected = outputs(eager)
    assert outputs(replayed) == expected
    assert outputs(prepared) == expected
    for engine in (eager, replayed, prepared):
        engine.close()


# --- a fault ----------------------------------------------------------------------------------------

FAULT = """
import numpy as np
from tests.engines import FIXTURES, rows
from tests.gpu_engines import engine_on
from tests.kernels.test_instructions import PROBES
from wicore.engine.base import StepPlan
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.errors import EngineError
from wicore.gemma3.checkpoint import open_checkpoint

device = CudaDevice()
engine = engine_on(device, open_checkpoint(FIXTURES / "tiny"))
[row] = rows(engine, 1, 60)
plan = StepPlan((row.input([5, 6, 7], sample=True),))
engine.step(plan)
host = engine.host_memory("global", 4)
saved = engine.copy_out("global", [0, 1], host[:2])
device.compile(str(PROBES), {}).function("sum_rows")(engine._runner.stream, 1, 32, (8, 8, np.int32(4)))
for call in (
    lambda: engine.step(plan),
    lambda: engine.step(plan),
    saved.wait,
    lambda: engine.copy_out("global", [0], host[2:3]).wait(),
):
    try:
        call()
        print("no error")
    except EngineError as err:
        print(err.message)
engine.close()
"""


def test_after_a_fault_nothing_steps_and_nothing_is_saved() -> None:
    found = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, timeout=300)
    lines = found.stdout.splitlines()
    assert found.returncode == 0, found.stderr
    assert len(lines) == 4, found.stdout
    assert "no error" not in lines
    assert lines[1].startswith("the device failed before")
    assert lines[2].startswith("a copy of KV blocks failed")
