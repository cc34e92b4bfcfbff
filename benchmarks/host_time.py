"""What the host does for one decode step: scheduler, cache accounts, text, and what the GPU engine packs.

`python -m benchmarks.host_time [--batch N ...] [--context TOKENS] [--waiting TOKENS] [--engine null]`: the
TensorRT engine for Gemma 3 27B on a device whose work takes no time (`idle_device`), or the null engine, each
driven by the worker's own parts, in this thread and without Redis. One JSON line a batch, with milliseconds
of one core a step, medians over all steps:

    between  what the device waits for: result + apply + take + plan + start
    result   from the end of the device's work to the tokens
    start    of the engine, up to the launch of the step's graph
    shadow   what is done while a step runs: the rest of `start`, events, accounts of attention, moves of
             blocks

With `--waiting` another sequence waits for blocks, of whose prompt the cache has so many tokens. `--sampling
penalties` has every sequence penalise what it has said.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from benchmarks.idle_device import IdleDevice
from wicore.bench.hardware import describe
from wicore.config import Settings, load_settings
from wicore.engine.base import Engine
from wicore.engine.factory import create_engine
from wicore.engine.sizing import device_blocks, layout_of
from wicore.engine.tensorrt.engine import TensorrtEngine
from wicore.engine.tensorrt.weights import RandomWeights, load_weights
from wicore.gemma3.config import published
from wicore.generation import Generation
from wicore.model import Model, load_model
from wicore.request import Priority, SamplingParams, parse_job
from wicore.sampling import SamplingState
from wicore.scheduler import Limits, Scheduler, SequenceRequest
from wicore.text.prompt import Prompt
from wicore.tiers.cache import TieredCache

Line = dict[str, Any]
BETWEEN = ("result", "apply", "take", "plan", "start")
SHADOW = ("started", "events", "catch_up", "observe")
SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.7},
    "penalties": {"temperature": 0.7, "frequency_penalty": 0.5},
}
Result = TypeVar("Result")


class Clock:
    """Seconds of this thread on a core, by part, one entry a step."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}

    def time(self, part: str, work: Callable[[], Result]) -> Result:
        start = time.thread_time()
        result = work()
        self.note(part, time.thread_time() - start)
        return result

    def note(self, part: str, seconds: float) -> None:
        self.parts.setdefault(part, []).append(seconds)


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


class Driver:
    """A worker's engine thread, without the worker: one step after the other."""

    def __init__(self, settings: Settings, model: Model, engine_name: str) -> None:
        self.device = IdleDevice()
        null = engine_name == "null"
        self.engine = create_engine(settings, model) if null else idle_engine(settings, self.device)
        self.cache = TieredCache(settings, self.engine, lambda: None)
        limits = Limits(settings.scheduler.max_batch, settings.scheduler.token_budget)
        self.scheduler = Scheduler(limits, self.cache.manager)
        self.generations: dict[int, Generation] = {}

    def step(self, clock: Clock) -> int:
        """One step; how many tokens it gave."""
        plan = clock.time("plan", self.scheduler.plan)
        assert plan is not None
        self.device.launched_s = begin = time.thread_time()
        pending = self.engine.start(plan)
        end, launched = time.thread_time(), self.device.launched_s
        if launched == begin:  # a device without graphs
            launched = end
        clock.note("start", launched - begin)
        clock.note("started", end - launched)
        clock.time("events", lambda: [generation.events() for generation in self.generations.values()])
        clock.time("catch_up", self.scheduler.catch_up)
        clock.time("observe", lambda: self.cache.observe(plan, 0.01))
        result = clock.time("result", pending.result)
        tokens = clock.time("apply", lambda: self.scheduler.apply(result))

        def take() -> None:
            for out in tokens:
                if out.key in self.generations:
                    self.generations[out.key].take(0, out.token)

        clock.time("take", take)
        return len(tokens)

    def close(self) -> None:
        self.cache.close()
        self.engine.close()


def idle_engine(settings: Settings, device: IdleDevice) -> Engine:
    """The TensorRT engine, with the shapes of Gemma 3 27B."""
    config = published("gemma-3-27b")
    assert config is not None
    size = settings.hmt.block_tokens
    layout = layout_of(config, size, "float16")
    blocks = device_blocks(settings, layout, -(-(settings.hmt.device_tokens or 0) // size))
    engine = TensorrtEngine(
        load_weights(device, RandomWeights(config)),
        config,
        device,
        block_tokens=size,
        global_blocks=blocks["global"],
        window_blocks=blocks["window"],
        max_batch=settings.scheduler.max_batch,
        token_budget=settings.scheduler.token_budget,
    )
    engine.prepare()
    engine._runner._mass.array.view(np.float32)[:] = 1.0  # as a device would that counts it
    return engine


def measure(given: argparse.Namespace, batch: int) -> Line:
    context, steps, waiting = given.context, given.steps, given.waiting
    growth = batch * (steps + 64)
    settings = settings_of(given.model, batch, batch * context + growth + waiting)
    model = load_model(settings)
    driver = Driver(settings, model, given.engine)
    scheduler = driver.scheduler
    numbers = np.random.default_rng(0)
    known = numbers.integers(1000, 200_000, waiting).tolist()
    if waiting:
        scheduler.add(_request(batch, known))
        while not driver.step(Clock()):
            pass
        scheduler.remove(batch)
    fields = {"kind": "completion", "prompt": "x", "ignore_eos": True, **SAMPLING[given.sampling]}
    body = parse_job({**fields, "max_tokens": steps + 64})
    for key in range(batch):
        tokens = numbers.integers(1000, 200_000, context).tolist()
        prompt = Prompt(tokens, steps + 64, frozenset())
        generation = Generation(f"job{key}", body, prompt, model.tokenizer, priority=Priority.NORMAL)
        for _, request in generation.requests(key):
            scheduler.add(request)
        driver.generations[key] = generation
    decoding = 0
    while decoding < batch:
        decoding = driver.step(Clock())
    if waiting:
        scheduler.add(_request(batch, [*known, *range(1000, 1000 + growth + batch * context // 2)]))
    driver.cache.flush(60, lambda seconds: time.sleep(0.001))  # the prompts' blocks
    clock = Clock()
    gc.collect()
    for _ in range(steps):
        driver.step(clock)
    driver.close()
    between = np.sum([clock.parts[part] for part in BETWEEN], 0)
    return {
        "measurement": "host time of a decode step",
        "engine": given.engine,
        "batch": batch,
        "context": context,
        "sampling": given.sampling,
        "waiting_tokens_cached": waiting,
        "between_ms": _ms([between]),
        "between_ms_p90": round(float(np.percentile(between, 90)) * 1e3, 3),
        **{f"{part}_ms": _ms([clock.parts[part]]) for part in BETWEEN},
        "shadow_ms": _ms([clock.parts[part] for part in SHADOW]),
        **describe(),
    }


def _request(key: int, prompt: list[int]) -> SequenceRequest:
    return SequenceRequest(key, prompt, [], 4, SamplingState(SamplingParams(), key), Priority.NORMAL)


def _ms(parts: Sequence[Any]) -> float:
    return round(float(np.median(np.sum(parts, 0))) * 1e3, 3)


def lines(given: argparse.Namespace) -> Iterator[Line]:
    for batch in given.batch:
        yield measure(given, batch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of each sequence")
    parser.add_argument("--waiting", type=int, default=0, help="tokens of a prompt that waits")
    parser.add_argument("--engine", choices=("tensorrt", "null"), default="tensorrt")
    parser.add_argument("--sampling", choices=list(SAMPLING), default="plain")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--model", default="gemma-3-270m", help="model.path; only its tokenizer is used")
    for line in lines(parser.parse_args()):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
