"""An engine driven by the scheduler as the worker drives it, with nothing around it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from wicore.engine.base import Engine, StepPlan
from wicore.hmt import CacheManager, TierSizes
from wicore.request import Priority, SamplingParams
from wicore.sampling import SamplingState
from wicore.scheduler import Limits, Scheduler, SequenceRequest, TokenOut


def random_prompt(tokens: int, seed: int, vocab_size: int) -> list[int]:
    """Ordinary tokens, each equally likely."""
    edge = min(1000, vocab_size // 4)
    drawn: list[int] = np.random.default_rng(seed).integers(edge, vocab_size - edge, tokens).tolist()
    return drawn


@dataclass
class Times:
    """When which tokens came, in seconds from the moment when all was submitted."""

    steps: list[tuple[float, int]] = field(default_factory=list)
    """The end of each step, and how many tokens it gave."""
    preemptions: int = 0

    @property
    def first_token_s(self) -> float:
        return next(end for end, tokens in self.steps if tokens)

    @property
    def total_s(self) -> float:
        return self.steps[-1][0]

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.steps)


class Driver:
    """One run: sequences with random prompts, an empty cache."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        info = self.info = engine.info
        sizes = TierSizes({"global": info.global_blocks, "window": info.window_blocks})
        cache = CacheManager(info.layout, sizes, info.fingerprint, prefix_cache=False)
        self.engine, self.scheduler = engine, Scheduler(limits, cache)
        self._left: dict[int, int] = {}

    def add(self, key: int, prompt: int, output: int, params: SamplingParams) -> None:
        """A sequence of so many prompt tokens that `run` ends after `output` more."""
        tokens = random_prompt(prompt, key, self.info.vocab_size)
        state = SamplingState(params, key, tokens)
        self.scheduler.add(SequenceRequest(key, tokens, [], output, state, Priority.NORMAL))
        self._left[key] = output

    def plan(self) -> StepPlan | None:
        """The next step, which is not to be made."""
        return self.scheduler.plan()

    def step(self) -> Sequence[TokenOut]:
        """Make one step."""
        plan = self.scheduler.plan()
        if plan is None:
            return ()
        pending = self.engine.start(plan)
        self.scheduler.catch_up()
        return self.scheduler.apply(pending.result())

    def run(self) -> Times:
        """Step until every sequence has its output."""
        times, start = Times(), time.perf_counter()
        while self._left:
            tokens = self.step()
            times.steps.append((time.perf_counter() - start, len(tokens)))
            for out in tokens:
                self._left[out.key] -= 1
                if not self._left[out.key]:
                    del self._left[out.key]
                    self.scheduler.remove(out.key)
        times.preemptions = self.scheduler.preemptions
        return times
