"""What the host does for one decode step: scheduler, cache accounts and text.

`python -m benchmarks.host_time [--batch N ...] [--context TOKENS] [--waiting TOKENS]`: the null engine, whose
step takes no time, driven by the worker's own parts, in this thread and without Redis. One JSON line a batch,
with milliseconds of one core a step, medians over all steps:

    between  plan + apply + take: what lies between a step's result and the next one's start
    shadow   events, accounts of attention, moves of blocks: what is done while a step runs

With `--waiting` another sequence waits for blocks, of whose prompt the cache has so many tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from wicore.bench.hardware import describe
from wicore.config import Settings, load_settings
from wicore.engine.base import StepPlan
from wicore.engine.factory import create_engine
from wicore.generation import Generation
from wicore.model import load_model
from wicore.request import Priority, SamplingParams, parse_job
from wicore.sampling import SamplingState
from wicore.scheduler import Limits, Scheduler, SequenceRequest
from wicore.text.prompt import Prompt
from wicore.tiers.cache import TieredCache

Line = dict[str, Any]
Result = TypeVar("Result")


class Clock:
    """Seconds of this thread on a core, by part, one entry a step."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}

    def time(self, part: str, work: Callable[[], Result]) -> Result:
        start = time.thread_time()
        result = work()
        self.parts.setdefault(part, []).append(time.thread_time() - start)
        return result


def settings_of(model: str, batch: int, tokens: int) -> Settings:
    overrides = {
        "model.path": model,
        "engine.kind": "null",
        "engine.null_step_ms": 0.0,
        "scheduler.max_batch": batch + 1,
        "scheduler.token_budget": 2048,
        "hmt.device_tokens": tokens,
    }
    return load_settings([], environ={}, overrides=overrides)


def measure(model_name: str, batch: int, context: int, steps: int, waiting: int) -> Line:
    growth = batch * (steps + 64)
    settings = settings_of(model_name, batch, batch * context + growth + waiting)
    model = load_model(settings)
    engine = create_engine(settings, model)
    cache = TieredCache(settings, engine, lambda: None)
    limits = Limits(settings.scheduler.max_batch, settings.scheduler.token_budget)
    scheduler = Scheduler(limits, cache.manager)
    generations: dict[int, Generation] = {}
    numbers = np.random.default_rng(0)
    known = numbers.integers(1000, 200_000, waiting).tolist()
    if waiting:
        scheduler.add(_request(batch, known))
        while not _step(scheduler, engine.step, cache, generations, Clock()):
            pass
        scheduler.remove(batch)
    fields = {"kind": "completion", "prompt": "x", "ignore_eos": True, "temperature": 0.7}
    body = parse_job({**fields, "max_tokens": steps + 64})
    for key in range(batch):
        tokens = numbers.integers(1000, 200_000, context).tolist()
        prompt = Prompt(tokens, steps + 64, frozenset())
        generation = Generation(f"job{key}", body, prompt, model.tokenizer, priority=Priority.NORMAL)
        for _, request in generation.requests(key):
            scheduler.add(request)
        generations[key] = generation
    decoding = 0
    while decoding < batch:
        decoding = _step(scheduler, engine.step, cache, generations, Clock())
    if waiting:
        scheduler.add(_request(batch, [*known, *range(1000, 1000 + growth + batch * context // 2)]))
    cache.flush(60, lambda seconds: time.sleep(0.001))  # the prompts' blocks
    clock = Clock()
    gc.collect()
    for _ in range(steps):
        _step(scheduler, engine.step, cache, generations, clock)
    cache.close()
    engine.close()
    between = np.sum([clock.parts[part] for part in ("plan", "apply", "take")], 0)
    return {
        "measurement": "host time of a decode step",
        "batch": batch,
        "context": context,
        "waiting_tokens_cached": waiting,
        "between_ms": _ms([between]),
        "between_ms_p90": round(float(np.percentile(between, 90)) * 1e3, 3),
        **{f"{part}_ms": _ms([clock.parts[part]]) for part in ("plan", "apply", "take")},
        "shadow_ms": _ms([clock.parts[part] for part in ("catch_up", "events", "observe")]),
        **describe(),
    }


def _request(key: int, prompt: list[int]) -> SequenceRequest:
    return SequenceRequest(key, prompt, [], 4, SamplingState(SamplingParams(), key), Priority.NORMAL)


def _step(
    scheduler: Scheduler,
    step: Callable[[StepPlan], Any],
    cache: TieredCache,
    generations: dict[int, Generation],
    clock: Clock,
) -> int:
    """One step; how many tokens it gave."""
    plan = clock.time("plan", scheduler.plan)
    assert plan is not None
    result = clock.time("engine", lambda: step(plan))
    tokens = clock.time("apply", lambda: scheduler.apply(result))

    def take() -> None:
        for out in tokens:
            if out.key in generations:
                generations[out.key].take(0, out.token)

    clock.time("take", take)
    clock.time("events", lambda: [generation.events() for generation in generations.values()])
    clock.time("catch_up", scheduler.catch_up)
    clock.time("observe", lambda: cache.observe(plan, 0.01))
    return len(tokens)


def _ms(parts: Sequence[Any]) -> float:
    return round(float(np.median(np.sum(parts, 0))) * 1e3, 3)


def lines(given: argparse.Namespace) -> Iterator[Line]:
    for batch in given.batch:
        yield measure(given.model, batch, given.context, given.steps, given.waiting)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of each sequence")
    parser.add_argument("--waiting", type=int, default=0, help="tokens of a prompt that waits")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--model", default="gemma-3-270m", help="model.path; only its tokenizer is used")
    for line in lines(parser.parse_args()):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
