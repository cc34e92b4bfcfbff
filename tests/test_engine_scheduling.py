"""The CPU engine under the scheduler: what sharing, reuse and preemption must not change."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engines import FIXTURES, cpu_engine
from wicore.engine.cpu import CpuEngine
from wicore.hmt import CacheManager, TierSizes
from wicore.request import Priority, SamplingParams
from wicore.sampling import SamplingState
from wicore.scheduler import Limits, Scheduler, SequenceRequest

OUTPUT = 24
RNG = np.random.default_rng(1)
SYSTEM = RNG.integers(5, 500, 70).tolist()
PROMPTS = [SYSTEM + RNG.integers(5, 500, int(n)).tolist() for n in RNG.integers(1, 90, 12)]


@pytest.fixture(scope="module", params=["float32", "int8"])
def engine(request: pytest.FixtureRequest) -> CpuEngine:
    return cpu_engine(FIXTURES / "tiny", request.param)


def run(
    engine: CpuEngine, prompts: list[list[int]], *, blocks: int = 256, **options
) -> tuple[list, Scheduler]:
    """Greedy output of every prompt, all handed in at once, with `blocks` of each pool."""
    info = engine.info
    cache = CacheManager(
        info.layout, TierSizes({"global": blocks, "window": blocks}), info.fingerprint, **options
    )
    scheduler = Scheduler(Limits(max_batch=8, token_budget=96), cache)
    for key, prompt in enumerate(prompts):
        state = SamplingState(SamplingParams(temperature=0.0), key)
        scheduler.add(SequenceRequest(key, prompt, [], OUTPUT, state, Priority.NORMAL))
    outputs: dict[int, list[int]] = {key: [] for key in range(len(prompts))}
    while (plan := scheduler.plan()) is not None:
        for out in scheduler.apply(engine.step(plan)):
            outputs[out.key].append(out.token.id)
            if len(outputs[out.key]) == OUTPUT:
                scheduler.remove(out.key)
        scheduler.check()
    return list(outputs.values()), scheduler


@pytest.fixture(scope="module")
def alone(engine: CpuEngine) -> list[list[int]]:
    return [run(engine, [prompt], prefix_cache=False)[0][0] for prompt in PROMPTS]


def test_a_full_batch_gives_each_sequence_the_text_it_gets_alone(engine, alone) -> None:
    assert run(engine, PROMPTS, prefix_cache=False)[0] == alone


def test_a_reused_prefix_gives_the_same_text(engine, alone) -> None:
    outputs, scheduler = run(engine, PROMPTS)
    assert outputs == alone
    assert scheduler._cache.stats.matched_tokens >= 64 * (len(PROMPTS) - 1)


def test_preempted_sequences_give_the_same_text(engine, alone) -> None:
    outputs, scheduler = run(engine, PROMPTS, blocks=20)
    assert scheduler.preemptions > 0
    assert outputs == alone
