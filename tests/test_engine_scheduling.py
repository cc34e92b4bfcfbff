"""The CPU engine under the scheduler: what sharing, reuse and preemption must not change."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engines import FIXTURES, cpu_engine
from wicore.engine.base import ImageRows
from wicore.engine.cpu import CpuEngine
from wicore.hmt import CacheManager, TierSizes
from wicore.request import Priority, SamplingParams
from wicore.sampling import SamplingState
from wicore.scheduler import Limits, Scheduler, SequenceRequest
from wicore.vision.identity import content_ids

OUTPUT = 24
RNG = np.random.default_rng(1)
SYSTEM = RNG.integers(5, 500, 70).tolist()
PROMPTS = [SYSTEM + RNG.integers(5, 500, int(n)).tolist() for n in RNG.integers(1, 90, 12)]


IMAGE = 20


def pictured(prompt: list[int], *pictures: int) -> tuple[list[int], list[ImageRows]]:
    """The prompt with images in its first words, and their rows."""
    tokens, images = prompt[:3], []
    for picture in pictures:
        images.append(ImageRows(len(tokens), np.random.default_rng(picture).random((IMAGE, 64), np.float32)))
        tokens += [*content_ids(bytes([picture]), IMAGE), *prompt[3:10]]
    return tokens + prompt[10:], images


PICTURED = [pictured(prompt, 1, 2 + i % 3, 9) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module", params=["float32", "int8"])
def engine(request: pytest.FixtureRequest) -> CpuEngine:
    return cpu_engine(FIXTURES / "tiny", request.param)


def run(
    engine: CpuEngine, prompts: list, *, blocks: int = 256, **options
) -> tuple[list[list[int]], Scheduler]:
    """Greedy output of every prompt (tokens, or these and images), all handed in at once, with `blocks` of
    each pool."""
    info = engine.info
    cache = CacheManager(
        info.layout, TierSizes({"global": blocks, "window": blocks}), info.fingerprint, **options
    )
    scheduler = Scheduler(Limits(max_batch=8, token_budget=96, image_tokens=IMAGE), cache)
    for key, prompt in enumerate(prompts):
        tokens, images = prompt if isinstance(prompt, tuple) else (prompt, ())
        state = SamplingState(SamplingParams(temperature=0.0), key)
        scheduler.add(SequenceRequest(key, tokens, [], OUTPUT, state, Priority.NORMAL, images))
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


@pytest.fixture(scope="module")
def pictured_alone(engine: CpuEngine) -> list[list[int]]:
    return [run(engine, [prompt], prefix_cache=False)[0][0] for prompt in PICTURED]


def test_images_change_the_text(alone, pictured_alone) -> None:
    # Nearly every one: on random weights some end in the same words whatever comes before.
    assert sum(text != other for text, other in zip(alone, pictured_alone, strict=True)) > 8


def test_prompts_with_images_give_the_same_text_in_company_and_from_a_reused_prefix(
    engine, pictured_alone
) -> None:
    outputs, scheduler = run(engine, [*PICTURED, *PICTURED])
    assert outputs == pictured_alone * 2
    # All of a prompt's blocks but its last, of which some end within images.
    again = sum((len(tokens) - 1) // 16 * 16 for tokens, _ in PICTURED)
    assert scheduler._cache.stats.matched_tokens >= again


def test_preempted_sequences_with_images_give_the_same_text(engine, alone, pictured_alone) -> None:
    prompts = [prompt for both in zip(PICTURED, PROMPTS, strict=True) for prompt in both]
    outputs, scheduler = run(engine, prompts, blocks=21)
    assert scheduler.preemptions > 0
    assert outputs == [text for both in zip(pictured_alone, alone, strict=True) for text in both]
