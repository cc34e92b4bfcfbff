"""A2CR: attention-aware cache replacement."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from math import exp, log

import numpy as np
from numpy.typing import NDArray

from wicore.hmt.policies.base import Clock, Heat
from wicore.hmt.policies.miniature import STEPS, Trial
from wicore.hmt.policies.ranking import Ranking

_LEAST, _MOST = 1 / 64, 64.0
"""Bounds of the attention that counts: a sink's is large whatever it holds."""
_RARE = 1e-6
"""Least frequency that is told from others."""
_PACES = (1.0, 4.0, 16.0, 64.0, 512.0)
"""What is tried for `pace` in units of w_f / tau_F, from frequency alone to recency alone."""
_DRIFT = 1.25
"""Factor by which the measured turnover must differ from the one in use to replace it."""


@dataclass(frozen=True, slots=True)
class A2CRParams:
    """Weights, and times in units of the policy's clock: tokens."""

    attention_weight: float = 0.1
    frequency_weight: float = 1.0
    """Above 0."""
    recency_time: float | None = None
    """tau: time in which an unused block's score falls by a factor e. None: found by trial."""
    frequency_time: float | None = None
    """tau_F: time in which an access loses a factor e of its weight in the frequency. None: `turnovers`."""
    turnovers: float = 16.0
    """tau_F in units of the time in which a pool sees as many accesses as it has blocks."""
    newcomer: float = 0.1
    """Weight of a content's first access in the frequency; every later one weighs 1."""
    attention_steps: float = 32.0
    """Steps over which the mean of attention reaches back."""
    block_tokens: float = 64.0
    """Tokens to an access, assumed until they are measured."""


class A2CR:
    """Lowest A^w_a * F^w_f * exp(-t / tau) first.

    A is a decayed mean of the attention that a block drew, relative to an even spread over its sequence,
    and 1 where none was reported; F is a decayed count of its accesses, t the time since the last of them.
    The weights are exponents because as factors they would change nothing in the order. The first access
    weighs less than the others: that a content is used again says most about it.

    Both decays are exponential, so that the order of two blocks does not change between their accesses:
    the logarithm of the score is, but for a summand that is the same for all blocks,

        w_a log A + w_f log F(last) + last * pace,    pace = 1 / tau + w_f / tau_F

    which makes a key that a heap can hold. No tau suits all loads and sizes: where many contents return
    for long, frequency must count; in conversations that end, recency. So it is found from the pool's own
    accesses, by trial in miniature caches.
    """

    __slots__ = (
        "_accesses",
        "_attention",
        "_blocks",
        "_clock",
        "_decay",
        "_frequency",
        "_last",
        "_measure_at",
        "_measured_from",
        "_pace",
        "_params",
        "_ranking",
        "_sampled",
        "_trial",
        "_turnover",
    )

    def __init__(self, blocks: int, clock: Clock, params: A2CRParams | None = None) -> None:
        self._blocks = blocks
        self._clock = clock
        self._params = params or A2CRParams()
        self._ranking = Ranking(blocks)
        self._attention = array("f", [0.0]) * blocks
        """0 where none was reported."""
        self._frequency = array("f", [0.0]) * blocks
        self._last = array("d", [0.0]) * blocks
        self._trial = Trial(blocks, _PACES, _PACES[len(_PACES) // 2])
        self._sampled: dict[int, bytes] = {}
        """Contents of the blocks that take part in the trial: none when there is nothing to find."""
        self._accesses = 0
        self._measured_from = clock()
        self._measure_at = max(64, blocks // 2)
        self._set_turnover(blocks * self._params.block_tokens)
        self._set_pace()

    def insert(self, block: int, content: bytes, heat: Heat | None = None) -> None:
        if heat is None:
            self._frequency[block] = self._params.newcomer
            self._last[block] = self._clock()
        else:
            self._attention[block] = heat.attention
            self._frequency[block] = heat.frequency
            self._last[block] = heat.last
        if self._params.recency_time is None and self._trial.samples(content):
            self._sampled[block] = content
        self._accessed(block)

    def touch(self, block: int) -> None:
        now = self._clock()
        age = now - self._last[block]
        self._frequency[block] = 1.0 + self._frequency[block] * exp(-age * self._decay)
        self._last[block] = now
        self._accessed(block)

    def record(self, blocks: NDArray[np.int32], mass: NDArray[np.float32], steps: int = 1) -> None:
        attention = np.frombuffer(self._attention, np.float32)
        before, drawn = attention[blocks], np.maximum(mass * np.float32(len(blocks)), np.float32(_RARE))
        known = before + (drawn - before) * np.float32(min(1.0, steps / self._params.attention_steps))
        attention[blocks] = np.where(before > 0, known, drawn)
        # Blocks that queries read are in use, as a rule, and those are ranked when they cease to be.
        evictable = np.frombuffer(self._ranking.members, np.uint8)
        for block in blocks[evictable[blocks] > 0].tolist():
            self._rank(block)

    def add(self, block: int) -> None:
        self._rank(block)
        self._ranking.add(block)

    def remove(self, block: int) -> None:
        self._ranking.remove(block)

    def victim(self) -> int:
        return self._ranking.lowest()

    def drop(self, block: int, *, evicted: bool) -> None:
        self._ranking.remove(block)
        self._sampled.pop(block, None)
        self._attention[block] = self._frequency[block] = self._last[block] = 0.0

    def heat(self, block: int) -> Heat:
        return Heat(self._attention[block], self._frequency[block], self._last[block])

    def _rank(self, block: int) -> None:
        params = self._params
        key = self._last[block] * self._pace + params.frequency_weight * log(
            max(self._frequency[block], _RARE)
        )
        attention = self._attention[block]
        if attention:
            key += params.attention_weight * log(min(max(attention, _LEAST), _MOST))
        self._ranking.move(block, int(key * STEPS))

    # --- time constants ---------------------------------------------------------------------------

    def _accessed(self, block: int) -> None:
        if self._ranking.members[block]:
            self._rank(block)
        if block in self._sampled:
            frequency = max(self._frequency[block], _RARE)
            if self._trial.access(self._sampled[block], frequency, self._last[block], self._decay):
                self._set_pace()
        self._accesses += 1
        if self._accesses == self._measure_at:
            self._measure()

    def _measure(self) -> None:
        """See how fast the pool turns over: first before it can be full, later to put that right."""
        self._measure_at *= 2
        turnover = self._blocks * (self._clock() - self._measured_from) / self._accesses
        if turnover and not 1 / _DRIFT < turnover / self._turnover < _DRIFT:
            self._set_turnover(turnover)
            self._trial.restart()
            self._set_pace()

    def _set_turnover(self, tokens: float) -> None:
        """Take `tokens` for the time in which the pool sees as many accesses as it has blocks."""
        self._turnover = tokens
        self._decay = 1 / (self._params.frequency_time or self._params.turnovers * tokens)

    def _set_pace(self) -> None:
        """Rank by the times that are given, or by those that did best."""
        weight, recency_time = self._params.frequency_weight, self._params.recency_time
        if recency_time is None:
            self._pace = weight * self._decay * self._trial.pace
        else:
            self._pace = 1 / recency_time + weight * self._decay
        keys = np.frombuffer(self._last, np.float64) * self._pace
        keys += weight * np.log(np.maximum(np.frombuffer(self._frequency, np.float32), _RARE))
        attention = np.frombuffer(self._attention, np.float32)
        counted = np.where(attention > 0, np.clip(attention, _LEAST, _MOST), 1)
        keys += self._params.attention_weight * np.log(counted)
        self._ranking.renew((keys * STEPS).astype(np.int64))
