"""`wicore bench engine`: what the engine does, through the scheduler and with sampling, beside a peer.

Decode: `batch` sequences with a prompt of `context` random tokens, the median time of a step over all
rounds. Prefill: from an empty cache to the first token of one prompt. Ours and the peer's rounds
alternate, because other work on the machine disturbs minutes, not milliseconds; the ratio is the
median of the rounds' ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

from wicore.bench.driver import Driver
from wicore.bench.hardware import Ceiling, describe
from wicore.engine.base import Engine, KVLayout
from wicore.gemma3.config import Gemma3Config
from wicore.hmt.tiers import POOLS
from wicore.request import SamplingParams
from wicore.scheduler import Limits

WARM = SamplingParams(temperature=0.7, top_k=40, top_p=0.9)
"""What both sides sample with: llama.cpp's default top-k, and the field's usual temperature."""
_WARM_UP = 3
"""Steps of each round that are not counted."""

Line = dict[str, object]


class Subject(Protocol):
    """What is measured."""

    @property
    def name(self) -> str: ...

    def prefill(self, tokens: int) -> float:
        """Seconds from an empty cache to the first sampled token of one prompt."""

    def decode(self, batch: int, context: int, steps: int, params: SamplingParams) -> list[float]:
        """Seconds of each step of `batch` sequences of `context` tokens, sampling included."""


class Ours:
    """An engine of ours, driven by the scheduler as the worker drives it."""

    def __init__(self, engine: Engine, max_batch: int, token_budget: int) -> None:
        self._engine = engine
        self._limits = Limits(max_batch, token_budget)
        self.name = f"wicore {engine.info.name} {engine.info.weights}, {engine.info.device}"

    def prefill(self, tokens: int) -> float:
        driver = Driver(self._engine, self._limits)
        driver.add(0, tokens, 1, WARM)
        return driver.run().first_token_s

    def decode(self, batch: int, context: int, steps: int, params: SamplingParams) -> list[float]:
        driver = Driver(self._engine, self._limits)
        for key in range(batch):
            driver.add(key, context, context + 10 * steps, params)
        while len(driver.step()) < batch:
            pass
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            driver.step()
            times.append(time.perf_counter() - start)
        return times


def measure(
    ours: Ours,
    peer: Subject | None,
    config: Gemma3Config,
    layout: KVLayout,
    ceiling: Ceiling,
    *,
    batches: Sequence[int],
    context: int,
    prompts: Sequence[int],
    steps: int,
    rounds: int,
) -> Iterator[Line]:
    """One line a measurement; the peer's figures and the ratio are in the same line."""
    for batch in batches:
        work = _decode_work(batch, context, steps)
        mine, theirs, ratio = _alternate(work, ours, peer, rounds)
        yield {
            "measurement": "decode",
            "batch": batch,
            "context": context,
            "sampling": WARM.model_dump(exclude_defaults=True),
            "ms_a_step": round(mine * 1e3, 2),
            "tokens_s": round(batch / mine, 1),
            **_peer(peer, ratio, batch / theirs if theirs else None),
            **_shares(config, layout, ceiling, batch, context, mine),
        } | _common(ours)
    for tokens in prompts:
        mine, theirs, ratio = _alternate(partial(_prefill, tokens), ours, peer, rounds)
        flop = 2 * (config.parameters - config.vocab_size * config.hidden_size) * tokens
        yield {
            "measurement": "prefill",
            "batch": 1,
            "prompt": tokens,
            "ms_to_first_token": round(mine * 1e3, 1),
            "tokens_s": round(tokens / mine, 1),
            **_peer(peer, ratio, tokens / theirs if theirs else None),
            "share_of_compute": round(flop / mine / 1e9 / ceiling.int8_gflop_s, 3),
        } | _common(ours)


def _decode_work(batch: int, context: int, steps: int) -> Callable[[Subject], float]:
    def work(subject: Subject) -> float:
        times = subject.decode(batch, context, steps + _WARM_UP, WARM)
        return statistics.median(times[_WARM_UP:])

    return work


def _prefill(tokens: int, subject: Subject) -> float:
    return subject.prefill(tokens)


def _alternate(
    work: Callable[[Subject], float], ours: Subject, peer: Subject | None, rounds: int
) -> tuple[float, float | None, float | None]:
    """(our seconds, the peer's, how many times faster we are): medians over the rounds."""
    pairs = [(work(ours), work(peer) if peer else None) for _ in range(rounds)]
    mine = statistics.median(a for a, _ in pairs)
    both = [(a, b) for a, b in pairs if b is not None]
    if not both:
        return mine, None, None
    return mine, statistics.median(b for _, b in both), statistics.median(b / a for a, b in both)


def _peer(peer: Subject | None, ratio: float | None, rate: float | None) -> Line:
    if peer is None or ratio is None or rate is None:
        return {}
    return {"peer": peer.name, "peer_tokens_s": round(rate, 1), "ratio": round(ratio, 2)}


def _shares(
    config: Gemma3Config, layout: KVLayout, ceiling: Ceiling, batch: int, context: int, seconds: float
) -> Line:
    """How near a decode step is to reading its weights and KV once, and to the 8-bit product rate."""
    weights = config.parameters * (1 + 4 / 32)
    seen = {"global": context, "window": min(context, layout.window)}
    kv = batch * sum(layout.block_bytes(pool) * seen[pool] / layout.block_tokens for pool in POOLS)
    flop = 2 * config.parameters * batch
    return {
        "share_of_bandwidth": round((weights + kv) / seconds / 1e9 / ceiling.read_gb_s, 3),
        "share_of_compute": round(flop / seconds / 1e9 / ceiling.int8_gflop_s, 3),
    }


def _common(ours: Ours) -> Line:
    return {"engine": ours.name, **describe()}
