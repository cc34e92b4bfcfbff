"""A2CR: what attention does, and the search for the time constant."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from tests.pages import Cache, Time
from wicore.hmt.policy import A2CR, LRU, A2CRParams, Clock, EvictionPolicy, Heat


def test_attention_decides_between_blocks_used_alike() -> None:
    policy = A2CR(4, Time())
    blocks = np.array([0, 1, 2], np.int32)
    policy.record(blocks, np.array([0.5, 0.2, 0.3], np.float32))
    for block in (0, 1, 2, 3):
        policy.insert(block, bytes([block]))
        policy.add(block)
    assert policy.heat(0).attention == pytest.approx(1.5)
    assert policy.heat(3).attention == 0
    order = []
    for _ in range(4):
        order.append(policy.victim())
        policy.drop(order[-1], evicted=True)
    assert order == [1, 2, 3, 0]


def test_attention_that_falls_while_a_block_is_evictable_counts_at_once() -> None:
    policy = A2CR(2, Time())
    for block in (0, 1):
        policy.insert(block, bytes([block]))
        policy.add(block)
    both = np.array([0, 1], np.int32)
    policy.record(both, np.array([0.9, 0.1], np.float32))
    assert policy.victim() == 1
    for _ in range(200):
        policy.record(both, np.array([0.1, 0.9], np.float32))
    assert policy.victim() == 0


def test_what_was_recorded_ends_with_the_content_and_yields_to_what_another_tier_knows() -> None:
    policy, one = A2CR(2, Time()), np.array([0], np.int32)
    policy.record(one, np.array([3.0], np.float32))
    policy.insert(0, b"a")
    assert policy.heat(0).attention == 3
    policy.drop(0, evicted=False)
    assert policy.heat(0) == Heat()
    policy.record(one, np.array([3.0], np.float32))
    policy.insert(0, b"b", Heat(attention=0.5, frequency=2.0, last=0.0))
    assert policy.heat(0).attention == 0.5


def _hits(make: Callable[[int, Clock], EvictionPolicy], blocks: int, pages: list[int]) -> int:
    cache = Cache(blocks, make)
    for page in pages:
        cache.access(str(page))
    return cache.hits


def _popular(rng: random.Random, length: int) -> list[int]:
    """Pages that stay popular amid others that nobody asks for twice."""
    return [rng.randrange(60) if rng.random() < 0.4 else 1000 + number for number in range(length)]


def _passing(rng: random.Random, length: int) -> list[int]:
    """Pages asked for often, but only for a while: recency is all that matters."""
    return [number // 8 + rng.randrange(70) for number in range(length)]


@pytest.mark.parametrize("pages", [_popular, _passing])
def test_a2cr_finds_the_time_constant_that_suits_the_load(
    pages: Callable[[random.Random, int], list[int]],
) -> None:
    trace = pages(random.Random(3), 15_000)
    params = [A2CRParams(recency_time=tau) for tau in (1.0, 64.0, 1e9)]
    fixed = [_hits(partial(A2CR, params=each), 64, trace) for each in params]
    assert max(fixed) > 1.05 * min(fixed)
    assert _hits(A2CR, 64, trace) > 0.97 * max(fixed)


def test_a2cr_follows_a_load_that_changes() -> None:
    rng = random.Random(4)
    trace = _popular(rng, 10_000) + _passing(rng, 10_000)
    assert _hits(A2CR, 64, trace) > 0.97 * _hits(LRU, 64, trace)
