"""The null engine: it computes nothing, and keeps the contract."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from wicore.engine.base import Engine, ImageRows, SequenceInput, StepPlan
from wicore.engine.null import NullEngine
from wicore.hmt import CacheManager, TierSizes
from wicore.request import Priority, SamplingParams
from wicore.sampling import SamplingState
from wicore.scheduler import Limits, Scheduler, SequenceRequest


def engine(step_ms=0.0, **options) -> NullEngine:
    return NullEngine(
        **{"step_ms": step_ms, "global_blocks": 64, "window_blocks": 64, "block_tokens": 8, **options}
    )


def chunk(tokens, start=0, *, key=1, sampled=True, **changes) -> SequenceInput:
    blocks = np.arange(-(-(start + len(tokens)) // 8), dtype=np.int32)
    fields = {
        "key": key,
        "tokens": np.array(tokens, np.int32),
        "start": start,
        "global_table": blocks,
        "window_table": blocks,
        "window_first": 0,
        "sampling": SamplingState(SamplingParams(), 0) if sampled else None,
    }
    return SequenceInput(**{**fields, **changes})


def generate(prompts: list[list[int]], count: int, budget: int, blocks: int = 64) -> dict[int, list[int]]:
    null = engine(global_blocks=blocks, window_blocks=blocks, window=20)
    info = null.info
    cache = CacheManager(
        info.layout, TierSizes({"global": info.global_blocks, "window": info.window_blocks}), info.fingerprint
    )
    scheduler = Scheduler(Limits(4, budget), cache)
    output: dict[int, list[int]] = {}
    for key, prompt in enumerate(prompts):
        output[key] = []
        sampling = SamplingState(SamplingParams(), key)
        scheduler.add(SequenceRequest(key, prompt, (), count, sampling, Priority.NORMAL))
    while (plan := scheduler.plan()) is not None:
        for out in scheduler.apply(null.step(plan)):
            output[out.key].append(out.token.id)
            if len(output[out.key]) == count:
                scheduler.remove(out.key)
    return output


def test_it_satisfies_the_engine_contract():
    assert isinstance(engine(), Engine)


def test_text_depends_on_neither_batch_nor_chunks_nor_preemption():
    prompts = [list(range(key, key + 30)) for key in range(4)]
    alone = {key: generate([prompt], 25, 64)[0] for key, prompt in enumerate(prompts)}
    assert generate(prompts, 25, 64) == alone
    assert generate(prompts, 25, 5) == alone
    assert generate(prompts, 25, 16, blocks=10) == alone


def test_prompts_may_hold_images_up_to_their_end():
    image = ImageRows(2, np.zeros((4, 8), np.float32))
    whole, rest = (chunk([5, 6, -1, -2, -3, -(2**31)][start:], start, images=[image]) for start in (0, 3))
    tokens = [engine().step(StepPlan((asked,))).outputs[1].token for asked in (whole, rest)]
    assert tokens[0] == tokens[1]
    with pytest.raises(ValueError, match="in no image"):
        engine().step(StepPlan((chunk([5, -9, -1, -2, -3, -4], images=[image]),)))


def test_tokens_are_spread_over_the_vocabulary_and_never_control_tokens():
    output = generate([[1, 2, 3]], 400, 64)[0]
    assert min(output) >= 256
    assert max(output) < 262_144
    assert len(set(output)) > 390


def test_a_step_lasts_as_long_as_it_was_told():
    null = engine(step_ms=20)
    begin = time.monotonic()
    null.step(StepPlan((chunk([1, 2, 3]),)))
    assert time.monotonic() - begin >= 0.02


def test_a_prompt_chunk_that_is_not_the_last_gives_no_token_and_mass_sums_to_one():
    result = engine().step(StepPlan((chunk(range(20), sampled=False), chunk([5], 30, key=2))))
    assert result.outputs[1].token is None
    assert result.outputs[2].token is not None
    assert len(result.outputs[2].mass) == 4
    assert result.outputs[2].mass.sum() == pytest.approx(1)


def test_logprobs_are_those_of_a_certain_token():
    sampling = SamplingState(SamplingParams(logprobs=2), 0)
    token = engine().step(StepPlan((chunk([1], sampling=sampling),))).outputs[1].token
    assert token.logprob == 0
    assert token.top == ((token.id, 0.0),)


@pytest.mark.parametrize(
    "bad",
    [
        {"tokens": np.zeros(0, np.int32)},
        {"global_table": np.zeros(0, np.int32)},
        {"window_first": 2},
        {"window_table": np.zeros(0, np.int32)},
        {"start": 10**6},
    ],
)
def test_a_plan_that_breaks_the_contract_is_refused(bad):
    with pytest.raises(ValueError, match="sequence 1: "):
        engine().step(StepPlan((chunk([1, 2], key=2), replace(chunk([1, 2]), **bad))))


def test_a_vocabulary_without_room_for_text_is_refused():
    with pytest.raises(ValueError, match="vocab_size: got 256"):
        engine(vocab_size=256)


def test_blocks_come_back_as_they_were_copied_out():
    null = engine()
    size = null.info.layout.block_bytes("window")
    host = np.arange(2 * size, dtype=np.uint8).reshape(2, size)
    null.copy_in("window", host, [3, 7]).wait()
    back = np.zeros((3, size), np.uint8)
    ticket = null.copy_out("window", [7, 3, 4], back)
    ticket.wait()
    assert ticket.done()
    np.testing.assert_array_equal(back, [host[1], host[0], np.zeros(size)])
    null.close()
    null.close()
