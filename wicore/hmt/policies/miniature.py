"""Miniature caches that try several time constants side by side, to tell which serves a pool best."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import exp, log
from zlib import crc32

from wicore.hmt.policies.ranking import Ranking

STEPS = 2.0**16
"""Steps of an integer key to a factor e of a score."""
_SIZE = 512
"""Blocks of a miniature: a sample of so many tells hit rates to a percent or two."""
_KEPT = 0.97
"""Share of the misses counted so far that a decision keeps; one falls every eighth of `_SIZE` accesses."""
_DECISIVENESS = 30.0
"""A pace with a share x more misses than the best weighs exp(-30 x) in the mean: half at 2 %."""
_CHANGE = 1.25
"""Factor by which the mean must move to be worth a new order of the pool."""


class Miniature:
    """A cache of a few blocks that evicts the lowest key."""

    __slots__ = ("_content", "_ranking", "_size", "_slot", "misses")

    def __init__(self, size: int) -> None:
        self._size = size
        self._slot: dict[bytes, int] = {}
        self._content = [b""] * size
        self._ranking = Ranking(size)
        self.misses = 0.0

    def access(self, content: bytes, key: int) -> None:
        slot = self._slot.get(content)
        if slot is None:
            self.misses += 1
            slot = len(self._slot)
            if slot == self._size:
                slot = self._ranking.lowest()
                del self._slot[self._content[slot]]
            self._slot[content] = slot
            self._content[slot] = content
            self._ranking.add(slot)
        self._ranking.move(slot, key)


class Trial:
    """One miniature for each of several paces, fed the same sample of a pool's accesses.

    The key of a content is log frequency + time * pace. Contents sampled by hash behave in a cache scaled
    down by the same factor as all of them do in the pool (Waldspurger, Saemundsson, Ahmad and Park, "Cache
    modeling and optimization using miniature simulations", USENIX ATC 2017). Takes memory for a few
    thousand blocks whatever the pool has, and time only for accesses to sampled contents.
    """

    __slots__ = ("_accesses", "_history", "_minis", "_paces", "_rate", "_size", "pace")

    def __init__(self, blocks: int, paces: Sequence[float], pace: float) -> None:
        self._rate = max(1, blocks // _SIZE)
        self._size = blocks // self._rate
        self._paces = paces
        self._accesses = 0
        self._history: OrderedDict[bytes, tuple[float, float]] = OrderedDict()
        """Frequency and last access of the contents sampled of late: a content that the pool had to give up
        is new to the pool, but would not be to a miniature that kept it."""
        self.pace = pace
        """The mean of the paces by what they are worth."""
        self.restart()

    def restart(self) -> None:
        """Try anew, because what a unit of time means has changed; `pace` stays."""
        self._minis = [Miniature(self._size) for _ in self._paces]

    def samples(self, content: bytes) -> bool:
        return crc32(content) % self._rate == 0

    def access(self, content: bytes, frequency: float, time: float, unit: float) -> bool:
        """An access to a sampled content at `time`; `unit` is that of the paces, and the rate at which
        frequencies decay. True when `pace` has changed."""
        known = self._history.pop(content, None)
        if known is not None:
            frequency = max(frequency, 1.0 + known[0] * exp((known[1] - time) * unit))
        self._history[content] = frequency, time
        if len(self._history) > 4 * self._size:
            self._history.popitem(last=False)
        for mini, pace in zip(self._minis, self._paces, strict=True):
            mini.access(content, int((log(frequency) + time * unit * pace) * STEPS))
        self._accesses += 1
        return self._accesses % max(8, self._size // 8) == 0 and self._decide()

    def _decide(self) -> bool:
        misses = [mini.misses for mini in self._minis]
        least = max(1.0, min(misses))
        weights = [exp(_DECISIVENESS * (1 - max(1.0, count) / least)) for count in misses]
        logs = [weight * log(pace) for weight, pace in zip(weights, self._paces, strict=True)]
        pace = exp(sum(logs) / sum(weights))
        for mini in self._minis:
            mini.misses *= _KEPT
        if 1 / _CHANGE <= pace / self.pace <= _CHANGE:
            return False
        self.pace = pace
        return True
