"""A mixed workload for an engine under the scheduler with all tiers, and how it is served without Redis."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.engines import GREEDY
from wicore.config import Settings, load_settings
from wicore.engine.base import Engine
from wicore.request import Priority
from wicore.sampling import SamplingState
from wicore.scheduler import Limits, Scheduler, SequenceRequest
from wicore.tiers.cache import TieredCache


@dataclass(frozen=True)
class Job:
    arrives: int
    """The step before which it comes."""
    prompt: tuple[int, ...]
    max_tokens: int
    priority: Priority


def mixed_jobs(count: int, vocabulary: int, *, longest: int, output: int = 24, seed: int = 0) -> list[Job]:
    """Shared system prompts, conversations that go on, long documents asked several times, short one-offs;
    urgent ones among them, so that others give way."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)

    def words(n: int) -> list[int]:
        return numbers.integers(5, vocabulary, n).tolist()

    systems = [words(rng.randint(40, longest // 4)) for _ in range(3)]
    documents = [words(rng.randint(longest // 2, longest - 60)) for _ in range(4)]
    talks: list[list[int]] = []
    jobs = []
    for number in range(count):
        kind = rng.random()
        if kind < 0.3:
            prompt = rng.choice(systems) + words(rng.randint(1, 40))
            talks.append(prompt)
        elif kind < 0.55 and talks:
            index = rng.randrange(len(talks))
            talks[index] = prompt = (talks[index] + words(rng.randint(5, 60)))[: longest - 40]
        elif kind < 0.75:
            prompt = rng.choice(documents) + words(rng.randint(1, 20))
        else:
            prompt = words(rng.randint(2, 150))
        urgency = rng.choice([Priority.NORMAL, Priority.NORMAL, Priority.BATCH, Priority.INTERACTIVE])
        jobs.append(Job(number * 2, tuple(prompt), rng.randint(2, output), urgency))
    return jobs


def settings_of(**overrides: object) -> Settings:
    """Settings for `Server`; names with __ for the dot."""
    return load_settings(
        [], environ={}, overrides={name.replace("__", "."): value for name, value in overrides.items()}
    )


class Server:
    """An engine served as the worker serves it, in this thread."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._moved = threading.Event()
        self.engine = engine
        self.cache = TieredCache(settings, engine, self._moved.set)
        limits = Limits(settings.scheduler.max_batch, settings.scheduler.token_budget)
        self.scheduler = Scheduler(limits, self.cache.manager)
        self.streamed_steps = self.prefilled = 0
        """Steps with a streamed sequence, and tokens computed of prompts."""

    def serve(self, jobs: Sequence[Job], *, every_step: Callable[[], None] = lambda: None) -> list[list[int]]:
        """Greedy output of every job; the accounts are checked after every step."""
        waiting = sorted(enumerate(jobs), key=lambda item: item[1].arrives)
        outputs: list[list[int]] = [[] for _ in jobs]
        step = 0
        while waiting or not self.scheduler.idle:
            while waiting and (waiting[0][1].arrives <= step or self.scheduler.idle):
                key, job = waiting.pop(0)
                state = SamplingState(GREEDY, key)
                self.scheduler.add(
                    SequenceRequest(key, list(job.prompt), [], job.max_tokens, state, job.priority)
                )
            step += 1
            self._step(jobs, outputs)
            self.scheduler.check()
            every_step()
        return outputs

    def flush(self) -> None:
        self.cache.flush(60, self._wait)

    def close(self) -> None:
        self.cache.close()
        self.engine.close()

    def _step(self, jobs: Sequence[Job], outputs: list[list[int]]) -> None:
        self._moved.clear()
        plan = self.scheduler.plan()
        if plan is None:
            if self.cache.manager.busy:
                self._moved.wait(30)
            return
        self.streamed_steps += any(sequence.streamed for sequence in plan.sequences)
        self.prefilled += sum(len(s.tokens) for s in plan.sequences if len(s.tokens) > 1)
        pending = self.engine.start(plan)
        self.scheduler.catch_up()
        for out in self.scheduler.apply(pending.result()):
            outputs[out.key].append(out.token.id)
            if len(outputs[out.key]) == jobs[out.key].max_tokens:
                self.scheduler.remove(out.key)

    def _wait(self, seconds: float) -> None:
        self._moved.wait(seconds)
        self._moved.clear()


def folder_settings(path: Path, megabytes: int) -> dict[str, object]:
    return {"hmt__nvme_path": str(path), "hmt__nvme_bytes": megabytes * 2**20}
