"""A2CR: attention-aware cache replacement."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from math import exp, log

import numpy as np
from numpy.typing import NDArray

from wicore.hmt.policies.base import Clock, Heat
from wicore.hmt.policies.ranking import Ranking

_STEPS = 2.0**32
"""Steps of a key to a factor e of the score."""
_LEAST = 1 / 64
_MOST = 64.0
"""Bounds of the attention that counts: a sink's is large whatever it holds."""


@dataclass(frozen=True, slots=True)
class A2CRParams:
    """Times are in units of the policy's clock: tokens."""

    attention_weight: float = 1.0
    frequency_weight: float = 1.0
    recency_time: float = 1e6
    """tau: time in which an unused block's score falls by a factor e."""
    frequency_time: float = 1e6
    """Time in which an access loses a factor e of its weight in the frequency."""
    newcomer: float = 0.03
    """Weight of a content's first access in the frequency; every later one weighs 1."""
    attention_steps: float = 32.0
    """Steps over which the mean of attention reaches back."""


class A2CR:
    """Lowest A^w_a * F^w_f * exp(-t / tau) first.

    A is a decayed mean of the attention that a block drew, relative to an even spread over its sequence,
    and 1 where none was reported; F is a decayed count of its accesses, t the time since the last of them.
    The weights are exponents because as factors they would change nothing in the order.

    Both decays are exponential, so that the order of two blocks does not change between their accesses:
    the logarithm of the score is, but for a summand that is the same for all blocks,

        w_a log A + w_f log F(last) + last * (1 / tau + w_f / tau_F)

    which makes a key that a heap can hold.
    """

    __slots__ = ("_attention", "_clock", "_frequency", "_last", "_pace", "_params", "_ranking")

    def __init__(self, blocks: int, clock: Clock, params: A2CRParams | None = None) -> None:
        self._clock = clock
        self._params = params = params or A2CRParams()
        self._pace = 1 / params.recency_time + params.frequency_weight / params.frequency_time
        self._ranking = Ranking(blocks)
        self._attention = array("f", [0.0]) * blocks
        """0 where none was reported."""
        self._frequency = array("f", [0.0]) * blocks
        self._last = array("d", [0.0]) * blocks

    def insert(self, block: int, content: bytes, heat: Heat | None = None) -> None:
        if heat is None:
            self._frequency[block] = self._params.newcomer
            self._last[block] = self._clock()
        else:
            self._attention[block] = heat.attention
            self._frequency[block] = heat.frequency
            self._last[block] = heat.last
        if self._ranking.members[block]:
            self._rank(block)

    def touch(self, block: int) -> None:
        now = self._clock()
        age = now - self._last[block]
        self._frequency[block] = 1.0 + self._frequency[block] * exp(-age / self._params.frequency_time)
        self._last[block] = now
        if self._ranking.members[block]:
            self._rank(block)

    def record(self, blocks: NDArray[np.int32], mass: NDArray[np.float32]) -> None:
        attention = np.frombuffer(self._attention, np.float32)
        before, drawn = attention[blocks], np.maximum(mass * np.float32(len(blocks)), np.float32(1e-6))
        known = before + (drawn - before) / np.float32(self._params.attention_steps)
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
        self._attention[block] = self._frequency[block] = self._last[block] = 0.0

    def heat(self, block: int) -> Heat:
        return Heat(self._attention[block], self._frequency[block], self._last[block])

    def _rank(self, block: int) -> None:
        params = self._params
        frequency = max(self._frequency[block], 1e-6)
        key = self._last[block] * self._pace + params.frequency_weight * log(frequency)
        attention = self._attention[block]
        if attention:
            key += params.attention_weight * log(min(max(attention, _LEAST), _MOST))
        self._ranking.move(block, int(key * _STEPS))
