"""The eviction policies: their common contract, naive models of them, and traces with known answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import exp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pages import Cache, Time
from wicore.hmt.optimum import OPT, Future
from wicore.hmt.policies.miniature import Trial
from wicore.hmt.policies.ranking import Ranking
from wicore.hmt.policy import A2CR, ARC, LFU, LRU, POLICIES, SLRU, A2CRParams, Clock, EvictionPolicy
from wicore.hmt.pool import BlockPool

BLOCKS = 6
RECENCY_TIME, FREQUENCY_TIME = 50.0, 80.0
PARAMS = A2CRParams(recency_time=RECENCY_TIME, frequency_time=FREQUENCY_TIME, attention_steps=4.0)


def _policy(name: str, blocks: int, clock: Clock) -> EvictionPolicy:
    if name == "opt":
        return OPT(blocks, clock, Future([]))
    if name == "adaptive":
        return A2CR(blocks, clock)
    return A2CR(blocks, clock, PARAMS) if name == "a2cr" else POLICIES[name](blocks, clock)


EVERY = [*POLICIES, "opt", "adaptive"]
operations = st.lists(
    st.tuples(
        st.sampled_from(["insert", "touch", "record", "add", "add", "remove", "evict", "discard", "wait"]),
        st.integers(0, BLOCKS - 1),
        st.integers(0, 20),
    ),
    max_size=120,
)


class Driver:
    """Runs operations against a policy within the rules of its contract, and keeps what it should know."""

    def __init__(self, policy: EvictionPolicy, time: Time) -> None:
        self.policy, self.time = policy, time
        self.content: dict[int, bytes] = {}
        self.evictable: set[int] = set()
        self.accesses: dict[int, list[float]] = {}
        self.order: dict[int, int] = {}
        """Block -> number of the operation that last accessed it."""
        self.attention: dict[int, float] = {}
        self.count = 0

    def run(self, operation: str, block: int, number: int) -> None:
        self.count += 1
        if operation == "wait":
            self.time.now += number
        elif operation == "record":
            self.record(block, number)
        elif operation == "insert" and block not in self.content:
            self.insert(block, number)
        elif block in self.content and operation == "touch":
            self.policy.touch(block)
            self.access(block)
        elif block in self.content and operation == "add":
            self.policy.add(block)
            self.evictable.add(block)
        elif operation == "remove":
            self.policy.remove(block)
            self.evictable.discard(block)
        elif operation == "evict" and self.evictable:
            self.drop(self.policy.victim(), evicted=True)
        elif operation == "discard" and block in self.content:
            self.drop(block, evicted=False)

    def insert(self, block: int, number: int) -> None:
        content = number.to_bytes(2, "little")
        if content not in self.content.values():
            self.content[block] = content
            self.policy.insert(block, content)
            self.access(block)

    def access(self, block: int) -> None:
        self.accesses.setdefault(block, []).append(self.time.now)
        self.order[block] = self.count

    def record(self, block: int, number: int) -> None:
        mass = (number + 1) / 32
        blocks = np.array([block, (block + 1) % BLOCKS], np.int32)
        shares = np.array([mass, 1 - mass], np.float32)
        self.policy.record(blocks, shares)
        for which, share in zip(blocks.tolist(), shares.tolist(), strict=True):
            before = self.attention.get(which)
            drawn = share * 2
            self.attention[which] = drawn if before is None else before + (drawn - before) / 4

    def drop(self, block: int, *, evicted: bool) -> None:
        self.policy.drop(block, evicted=evicted)
        self.evictable.discard(block)
        for known in (self.content, self.accesses, self.order, self.attention):
            known.pop(block, None)


@pytest.mark.parametrize("name", EVERY)
@given(operations)
@settings(max_examples=150, deadline=None)
def test_every_victim_is_evictable_and_there_is_none_exactly_when_nothing_is(
    name: str, steps: list[tuple[str, int, int]]
) -> None:
    time = Time()
    driver = Driver(_policy(name, BLOCKS, time), time)
    for step in steps:
        driver.run(*step)
        if driver.evictable:
            victim = driver.policy.victim()
            assert victim in driver.evictable
            assert driver.policy.victim() == victim
        else:
            with pytest.raises(LookupError):
                driver.policy.victim()
        for block in driver.content:
            assert driver.policy.heat(block).last == driver.accesses[block][-1]


def _score(driver: Driver, block: int) -> float:
    """A2CR's definition, evaluated now."""
    now, times = driver.time.now, driver.accesses[block]
    frequency = PARAMS.newcomer * exp(-(now - times[0]) / FREQUENCY_TIME)
    frequency += sum(exp(-(now - time) / FREQUENCY_TIME) for time in times[1:])
    attention = driver.attention.get(block, 1.0)
    score: float = attention * frequency * exp(-(now - times[-1]) / RECENCY_TIME)
    return score


NAIVE: dict[str, Callable[[Driver, int], tuple[float, ...]]] = {
    "lru": lambda driver, block: (driver.order[block],),
    "lfu": lambda driver, block: (len(driver.accesses[block]), driver.order[block]),
    "a2cr": lambda driver, block: (_score(driver, block),),
}


@pytest.mark.parametrize("name", NAIVE)
@given(operations)
@settings(max_examples=200, deadline=None)
def test_the_victim_is_the_one_of_the_definition_applied_to_every_block(
    name: str, steps: list[tuple[str, int, int]]
) -> None:
    time = Time()
    driver = Driver(_policy(name, BLOCKS, time), time)
    for step in steps:
        driver.run(*step)
        if driver.evictable:
            lowest = min(NAIVE[name](driver, block) for block in driver.evictable)
            assert NAIVE[name](driver, driver.policy.victim()) == pytest.approx(lowest, rel=1e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_heat_travels_with_a_content_to_another_tier(name: str) -> None:
    time = Time()
    above, below = _policy(name, 4, time), _policy(name, 4, time)
    above.record(np.array([0, 1], np.int32), np.array([0.75, 0.25], np.float32))
    above.insert(0, b"hot")
    for _ in range(3):
        time.now += 5
        above.touch(0)
    time.now += 30
    above.insert(1, b"cold")
    heat = above.heat(0)
    assert heat.last == 15
    below.insert(3, b"hot", heat)
    assert below.heat(3) == heat


@pytest.mark.parametrize("name", ["a2cr", "lfu", "slru", "arc"])
def test_a_content_known_to_be_used_often_outlives_a_newcomer_in_the_tier_it_comes_to(name: str) -> None:
    time = Time()
    above, below = _policy(name, 4, time), _policy(name, 4, time)
    above.insert(0, b"hot")
    for _ in range(5):
        above.touch(0)
    below.insert(2, b"hot", above.heat(0))
    below.insert(1, b"new")
    below.add(2)
    below.add(1)
    assert below.victim() == 1


@pytest.mark.parametrize("name", EVERY)
def test_memory_stays_bounded_whatever_is_done(name: str) -> None:
    time, rng = Time(), random.Random(5)
    driver = Driver(_policy(name, BLOCKS, time), time)
    kinds = ["insert", "touch", "record", "add", "remove", "evict", "discard", "wait"]
    for _ in range(20_000):
        driver.run(rng.choice(kinds), rng.randrange(BLOCKS), rng.randrange(2000))
    for attribute in driver.policy.__slots__:  # type: ignore[attr-defined]
        value = getattr(driver.policy, attribute)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Ranking):
                assert len(part._heap) <= 64 + 2 * BLOCKS
            elif isinstance(part, Trial):
                assert len(part._history) <= 4 * BLOCKS
                assert all(len(mini._slot) <= BLOCKS for mini in part._minis)
            elif hasattr(part, "__len__"):
                assert len(part) <= max(2 * BLOCKS, 8)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(-9, 9), st.integers(0, 2)), max_size=300))
@settings(max_examples=200, deadline=None)
def test_a_ranking_finds_the_lowest_member_whichever_way_keys_move(steps: list[tuple[int, int, int]]) -> None:
    ranking, keys, members = Ranking(8), [0] * 8, set[int]()
    for block, key, kind in steps:
        if kind == 0:
            ranking.move(block, key)
            keys[block] = key
        elif kind == 1:
            ranking.add(block)
            members.add(block)
        else:
            ranking.remove(block)
            members.discard(block)
        assert len(ranking) == len(members)
        if members:
            assert ranking.lowest() == min(members, key=lambda block: (keys[block], block))


# --- known answers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "pages", "left"),
    [
        (LRU, "abcad", "acd"),
        (LFU, "aaabbcdde", "ade"),  # d replaces c, and e the older of b and d, which have two accesses each
        (LFU, "aabcdc", "adc"),
        (SLRU, "aabcde", "ade"),
        (SLRU, "aabbccd", "bcd"),  # two may be protected: c's promotion sends a back to probation
        (ARC, "aabbcdefg", "abg"),
    ],
)
def test_a_known_trace_leaves_the_known_pages(
    policy: Callable[[int, Clock], EvictionPolicy], pages: str, left: str
) -> None:
    assert Cache(3, policy).run(pages) == set(left)


def test_arc_gives_the_recent_more_room_after_a_page_comes_back_that_left_them() -> None:
    cache = Cache(4, ARC)
    cache.run("aabbccdd" + "ef")
    assert cache.policy._target == 0  # type: ignore[attr-defined]
    # e left T1 for B1 when f came; it comes back, so that T1 should have one more.
    assert not cache.access("e")
    assert cache.policy._target == 1  # type: ignore[attr-defined]
    assert cache.policy.heat(cache.block_of["e"]).frequency == 2


def test_arc_gives_the_frequent_more_room_after_a_page_comes_back_that_left_them() -> None:
    cache = Cache(2, ARC)
    cache.run("aabb" + "c")
    assert set(cache.block_of) == {"b", "c"}
    cache.policy._target = 2.0  # type: ignore[attr-defined]
    assert not cache.access("a")
    assert cache.policy._target == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["a2cr", "lfu", "slru", "arc"])
def test_a_scan_of_pages_used_once_does_not_displace_those_in_use(name: str) -> None:
    hits = {}
    for which in (name, "lru"):
        cache = Cache(40, POLICIES[which])
        scanned = iter(range(1000, 100_000))
        for _ in range(20):
            for page in [*range(20), *range(20)]:
                cache.access(str(page))
            for _ in range(100):
                cache.access(str(next(scanned)))
        hits[which] = cache.hits
    assert hits["lru"] == 20 * 20
    assert hits[name] >= 20 * 20 + (15 if name == "a2cr" else 19) * 20  # A2CR has to find out first


@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=1), max_size=150), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_no_policy_has_more_hits_than_the_optimum(requests: list[list[int]], blocks: int) -> None:
    pages = [str(request[0]) for request in requests]
    future = Future([[page.encode()] for page in pages])
    best = Cache(blocks, lambda blocks, clock: OPT(blocks, clock, future))
    for page in pages:
        future.advance()
        best.access(page)
    for make in POLICIES.values():
        cache = Cache(blocks, make)
        for page in pages:
            cache.access(page)
        assert cache.hits <= best.hits


@given(st.lists(st.integers(-9, 9), min_size=8, max_size=8), st.sets(st.integers(0, 7), min_size=1))
def test_a_ranking_renewed_follows_the_new_keys(keys: list[int], members: set[int]) -> None:
    ranking = Ranking(8)
    for block in range(8):
        ranking.move(block, 5 - block)
        ranking.add(block)
    for block in set(range(8)) - members:
        ranking.remove(block)
    ranking.renew(np.array(keys, np.int64))
    while members:
        assert ranking.lowest() == min(members, key=lambda block: (keys[block], block))
        members.discard(ranking.lowest())
        ranking.remove(ranking.lowest())


@pytest.mark.parametrize("name", POLICIES)
def test_a_pool_of_prefix_chains_adds_up_under_every_policy_and_never_loses_a_parent_first(name: str) -> None:
    rng, time = random.Random(6), Time()
    pool = BlockPool("trial", 40, POLICIES[name], time, leaves_first=True)
    for _ in range(3000):
        document, length = int(rng.paretovariate(0.7)), rng.randrange(1, 12)
        hashes = [f"{document}/{index}".encode() for index in range(length)]
        table: list[int] = []
        parents = [b"", *hashes]
        for hash in hashes:
            block = pool.lookup(hash)
            if block is None:
                break
            pool.acquire(block)
            table.append(block)
        for hash, parent in zip(hashes[len(table) :], parents[len(table) :], strict=False):
            assert pool.lookup(hash) is None
            table.append(pool.allocate())
            pool.register(table[-1], hash, parent)
        time.now += 16 * length
        pool.check(dict.fromkeys(table, 1))
        for block in table:
            pool.release(block)
    pool.check({})
    assert pool.stats().evicted > 1000
