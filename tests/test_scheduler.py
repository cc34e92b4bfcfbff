"""The scheduler over the real cache manager, against an engine that verifies every KV read."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.checking_engine import VOCABULARY, CheckingEngine, undisturbed
from tests.memory_tiers import MemoryMover
from wicore.engine.base import ImageRows, KVLayout, StepResult
from wicore.errors import ConfigError, EngineError, TooLarge
from wicore.hmt import CacheManager, TierSizes
from wicore.hmt.moves import Outcome
from wicore.hmt.policy import POLICIES
from wicore.request import Priority, SamplingParams
from wicore.sampling import SamplingState
from wicore.scheduler import Limits, Scheduler, SequenceRequest
from wicore.scheduler.scheduler import PATIENCE

BLOCK = 4
GREEDY = SamplingParams(temperature=0)
SEEDED = SamplingParams(temperature=1.2, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.5)


def layout(window: int = 10) -> KVLayout:
    return KVLayout(BLOCK, 1, 1, 1, 1, window, "float32")


class Service:
    """A scheduler, its cache and the checking engine, driven as a worker drives them."""

    def __init__(
        self,
        *,
        blocks=64,
        window_blocks=None,
        window=10,
        max_batch=4,
        budget=16,
        prefix_cache=True,
        host=None,
        nvme=None,
        seed=0,
        patience=0,
        fault_rate=0.0,
        by_layer=False,
        policy="lru",
        checkpoint_tokens=0,
        image_tokens=0,
    ) -> None:
        window_blocks = window_blocks or blocks
        self.engine = CheckingEngine(layout(window), blocks, window_blocks)
        sizes = TierSizes({"global": blocks, "window": window_blocks}, host, nvme)
        self.mover = MemoryMover(
            self.engine, sizes, seed=seed, patience=patience, fault_rate=fault_rate, by_layer=by_layer
        )
        self.cache = CacheManager(
            layout(window),
            sizes,
            "salt",
            mover=self.mover,
            prefix_cache=prefix_cache,
            policy=POLICIES[policy],
            checkpoint_tokens=checkpoint_tokens,
        )
        self.scheduler = Scheduler(Limits(max_batch, budget, image_tokens=image_tokens), self.cache)
        self.budget, self.max_batch, self.blocks = budget, max_batch, blocks
        self.requests: dict[int, SequenceRequest] = {}
        self.outputs: dict[int, list[int]] = {}
        self.finished: dict[int, list[int]] = {}
        self.steps = 0
        self.plan = None

    def add(
        self, key, prompt, max_tokens=6, *, generated=(), priority=Priority.NORMAL, params=GREEDY, seed=None
    ) -> None:
        seed, images = key if seed is None else seed, images_of(prompt)
        state = SamplingState(params, seed, prompt, generated)
        request = SequenceRequest(key, prompt, generated, max_tokens, state, priority, images)
        self.scheduler.add(request)
        self.requests[key] = request
        self.outputs[key] = list(generated)

    def expected(self, key: int) -> list[int]:
        request = self.requests[key]
        state = SamplingState(request.sampling.params, request.sampling.seed, request.prompt)
        return undisturbed(request.prompt, request.max_tokens, state, request.images)

    def remove(self, key: int) -> list[int]:
        self.scheduler.remove(key)
        return self.outputs.pop(key)

    def start_step(self) -> bool:
        self.plan = self.scheduler.plan()
        if self.plan is not None:
            assert sum(len(s.tokens) for s in self.plan.sequences) <= self.budget
            assert self.scheduler.running <= self.max_batch
        return self.plan is not None

    def catches_up(self) -> bool:
        """Every third step ends so soon that there was no time for it."""
        return self.steps % 3 > 0

    def end_step(self) -> None:
        if self.catches_up():
            self.scheduler.catch_up()
        result = self.engine.step(self.plan)
        self.plan = None
        self.steps += 1
        for out in self.scheduler.apply(result):
            output = self.outputs[out.key]
            output.append(out.token.id)
            if len(output) == self.requests[out.key].max_tokens:
                assert self.remove(out.key) == self.expected(out.key)
                self.finished[out.key] = output

    def step(self) -> bool:
        """Compute, or wait for blocks; False when there is nothing to do."""
        if not self.start_step():
            self.scheduler.check()
            return self.cache.busy or not self.scheduler.idle
        self.end_step()
        self.scheduler.check()
        return True

    def drain(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.step():
                break
        assert self.scheduler.idle, f"{sorted(self.outputs)} did not finish in {limit} steps"
        stats = self.cache.stats
        assert stats.global_pool.used == stats.window_pool.used == 0


def words(start: int, count: int) -> list[int]:
    return [(start + i * 7) % VOCABULARY for i in range(count)]


def image(tokens: int, variant: int = 0) -> list[int]:
    """Ids of an image. All variants share all ids but the last, which also tells where an image ends."""
    return [-9] * (tokens - 1) + [-1 - variant]


def images_of(prompt: Sequence[int]) -> list[ImageRows]:
    """The images in a prompt; their rows are their ids."""
    images, start = [], 0
    for position, token in enumerate(prompt):
        if token >= 0:
            start = position + 1
        elif token > -9:
            ids = prompt[start : position + 1]
            images.append(ImageRows(start, np.array(ids, np.float32)[:, None]))
            start = position + 1
    return images


ANY = {"deadline": None, "suppress_health_check": list(HealthCheck)}


# --- any order of arrivals, ends and cancels ----------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Tiny pools, shared prefixes, every priority, cancels before, between and during steps."""

    @initialize(
        blocks=st.integers(9, 24),
        extra=st.integers(0, 8),
        window=st.integers(1, 14),
        max_batch=st.integers(1, 5),
        budget=st.integers(6, 20),
        prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def start(self, blocks, extra, window, max_batch, budget, prefix_cache) -> None:
        window_blocks = min(blocks, -(-(window - 1) // BLOCK) + 1 + extra)
        self.service = Service(
            blocks=blocks,
            window_blocks=window_blocks,
            window=window,
            max_batch=max_batch,
            budget=budget,
            prefix_cache=prefix_cache,
        )
        self.key = 0

    @rule(
        family=st.integers(0, 2),
        shared=st.integers(0, 18),
        own=st.integers(1, 8),
        max_tokens=st.integers(1, 9),
        done=st.integers(0, 4),
        priority=st.sampled_from(Priority),
        params=st.sampled_from([GREEDY, SEEDED]),
    )
    def arrive(self, family, shared, own, max_tokens, done, priority, params) -> None:
        self.submit(words(family, shared) + words(self.key, own), max_tokens, done, priority, params)

    def submit(self, prompt, max_tokens, done, priority, params) -> None:
        self.key += 1
        generated = ()
        if 0 < done < max_tokens:
            state = SamplingState(params, self.key, prompt)
            generated = undisturbed(prompt, done, state, images_of(prompt))
        try:
            self.service.add(
                self.key,
                prompt,
                max_tokens,
                generated=generated,
                priority=priority,
                params=params,
                seed=self.key,
            )
        except TooLarge:
            assert self.is_too_large(len(prompt) + max_tokens - 1)

    def is_too_large(self, positions: int) -> bool:
        return positions > self.service.blocks * BLOCK

    @rule()
    def one_step(self) -> None:
        if self.service.plan is None:
            self.service.start_step()
        if self.service.plan is not None:
            self.service.end_step()

    @precondition(lambda self: self.service.plan is None)
    @rule()
    def begin_a_step(self) -> None:
        self.service.start_step()

    @precondition(lambda self: self.service.outputs)
    @rule(data=st.data())
    def cancel_or_stop_early(self, data) -> None:
        key = data.draw(st.sampled_from(sorted(self.service.outputs)))
        output = self.service.remove(key)
        assert output == self.service.expected(key)[: len(output)]

    @invariant()
    def blocks_and_sequences_add_up(self) -> None:
        if hasattr(self, "service"):
            self.service.scheduler.check()
            assert self.service.scheduler.running <= self.service.max_batch

    def teardown(self) -> None:
        if not hasattr(self, "service"):
            return
        if self.service.plan is not None:
            self.service.end_step()
        self.service.drain()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=120, stateful_step_count=50, **ANY)


TIERS: dict[str, st.SearchStrategy] = {
    "host": st.tuples(st.integers(6, 30), st.integers(0, 8)),
    "nvme": st.none() | st.tuples(st.integers(1, 40), st.integers(1, 20)),
    "patience": st.integers(0, 4),
    "fault_rate": st.sampled_from([0.0, 0.0, 0.1, 0.6]),
    "seed": st.integers(0, 1000),
    "policy": st.sampled_from(sorted(POLICIES)),
    "checkpoint_tokens": st.sampled_from([0, 4, 12]),
}
"""What of the tiers below the device may differ, and how their copies go wrong."""


class AnyTiers(AnyOrder):
    """The same over host memory and a file, with every policy, copies that take their time, and faults; and
    with sequences longer than the device pool."""

    @initialize(
        blocks=st.integers(4, 14),
        extra=st.integers(0, 4),
        window=st.integers(1, 14),
        max_batch=st.integers(1, 5),
        budget=st.integers(6, 20),
        **TIERS,
    )
    def start(
        self, blocks, extra, window, max_batch, budget, host, nvme, patience, fault_rate, seed, policy,
        checkpoint_tokens,
    ) -> None:  # fmt: skip
        span = -(-(window - 1) // BLOCK) + 1
        self.service = Service(
            blocks=blocks,
            window_blocks=span + extra,
            window=window,
            max_batch=max_batch,
            budget=budget,
            host={"global": host[0], "window": span + host[1]},
            nvme=None if nvme is None else {"global": nvme[0], "window": nvme[1]},
            patience=patience,
            fault_rate=fault_rate,
            seed=seed,
            policy=policy,
            checkpoint_tokens=checkpoint_tokens,
        )
        self.key = 0


TestAnyTiers = AnyTiers.TestCase
TestAnyTiers.settings = settings(max_examples=80, stateful_step_count=40, **ANY)


# --- single decisions ---------------------------------------------------------------------------------


def test_decodes_and_prompt_chunks_share_one_step_within_the_budget():
    service = Service(budget=8)
    service.add(1, words(0, 5))
    service.step()
    service.add(2, words(3, 30))
    service.start_step()
    assert {s.key: len(s.tokens) for s in service.plan.sequences} == {1: 1, 2: 7}
    assert {s.key: s.sampling is not None for s in service.plan.sequences} == {1: True, 2: False}
    service.end_step()
    service.drain()


def test_few_prompts_advance_in_one_step():
    service = Service(max_batch=8, budget=64)
    for key in range(8):
        service.add(key, words(key, 3))
    service.start_step()
    assert len(service.plan.sequences) == Limits(8, 64).prompt_chunks < 8
    service.end_step()
    service.drain()


def test_nothing_is_planned_past_max_tokens():
    service = Service()
    service.add(1, words(0, 5), max_tokens=1)
    plan = service.scheduler.plan()
    service.scheduler.apply(service.engine.step(plan))
    assert service.scheduler.plan() is None
    assert not service.scheduler.idle


def test_a_sequence_that_could_never_fit_is_refused_with_the_numbers_and_the_setting():
    service = Service(blocks=8)
    with pytest.raises(TooLarge, match=r"33 positions.*9 global blocks of 4.*has 8.*hmt\.device_tokens"):
        service.add(1, words(0, 30), max_tokens=4)
    service.add(2, words(0, 30), max_tokens=3)
    service.drain()


def test_a_window_that_could_never_fit_is_refused():
    service = Service(blocks=16, window_blocks=3, window=10)
    with pytest.raises(TooLarge, match="4 window blocks"):
        service.add(1, words(0, 30), max_tokens=4)


def test_a_token_budget_that_decodes_could_use_up_is_refused():
    with pytest.raises(ConfigError, match=r"scheduler\.token_budget: 16 must exceed scheduler\.max_batch"):
        Limits(16, 16)


def test_interactive_work_takes_the_slot_of_batch_work_and_both_end_as_undisturbed():
    service = Service(max_batch=2, budget=32)
    service.add(1, words(1, 6), priority=Priority.BATCH, params=SEEDED)
    service.add(2, words(2, 6), priority=Priority.BATCH, params=SEEDED)
    service.step()
    service.step()
    service.add(3, words(3, 6), priority=Priority.INTERACTIVE)
    service.start_step()
    assert {s.key for s in service.plan.sequences} == {1, 3}
    assert service.scheduler.preemptions == 1
    service.end_step()
    service.drain()


def test_work_of_the_same_level_never_preempts_for_admission():
    service = Service(max_batch=1, budget=32)
    service.add(1, words(1, 6))
    service.step()
    service.add(2, words(2, 6))
    service.step()
    assert (service.scheduler.running, service.scheduler.waiting) == (1, 1)
    assert service.scheduler.preemptions == 0
    service.drain()


def test_nobody_is_preempted_for_an_arrival_that_would_not_fit_even_then():
    service = Service(blocks=10, max_batch=4, budget=40)
    service.add(1, words(1, 24), priority=Priority.INTERACTIVE, max_tokens=8)
    service.add(2, words(2, 3), priority=Priority.BATCH)
    service.step()
    assert service.scheduler.running == 2
    service.add(3, words(3, 20), priority=Priority.INTERACTIVE)
    service.step()
    assert service.scheduler.preemptions == 0
    service.drain()


def test_growth_preempts_the_last_ranked_whose_text_then_goes_on_unchanged():
    service = Service(blocks=7, max_batch=3, budget=32)
    service.add(1, words(1, 7), max_tokens=12, params=SEEDED)
    service.add(2, words(2, 7), max_tokens=12, params=SEEDED)
    service.drain()
    assert service.scheduler.preemptions > 0
    assert list(service.finished) == [1, 2]


def test_sequences_of_one_prompt_prefill_it_once():
    prompt = words(0, 40)
    service = Service(max_batch=8, budget=64)
    for key in range(6):
        service.add(key, prompt, max_tokens=4, params=SEEDED)
    service.drain()
    shared = 39 // BLOCK * BLOCK
    assert service.engine.computed == 6 * (40 + 3) - 5 * shared


def test_without_a_prefix_cache_nobody_waits_for_a_shared_prompt():
    service = Service(max_batch=4, budget=64, prefix_cache=False)
    for key in range(3):
        service.add(key, words(0, 16), max_tokens=2)
    service.start_step()
    assert len(service.plan.sequences) == 3
    service.end_step()
    service.drain()


def test_a_sequence_held_back_for_a_shared_prompt_lets_others_pass():
    service = Service(max_batch=4, budget=8)
    service.add(1, words(0, 20))
    service.add(2, words(0, 20))
    service.add(3, words(5, 4))
    service.start_step()
    assert (service.scheduler.running, service.scheduler.waiting) == (2, 1)
    service.end_step()
    service.drain()


def test_a_sequence_held_back_goes_on_when_the_one_it_waits_for_is_cancelled():
    service = Service(max_batch=4, budget=8)
    service.add(1, words(0, 40))
    service.add(2, words(0, 40))
    service.step()
    service.remove(1)
    service.drain()
    assert list(service.finished) == [2]


def test_nobody_waits_for_blocks_that_are_computed_already_but_lost_from_the_window():
    service = Service(blocks=64, window_blocks=6, window=5, budget=8)
    service.add(1, words(0, 80))
    for _ in range(6):
        service.step()
    service.add(2, words(0, 20))
    service.step()
    assert (service.scheduler.running, service.scheduler.waiting) == (2, 0)
    assert len(service.outputs[1]) == 0
    service.drain()


def test_short_sequences_do_not_overtake_a_long_one_that_waits_for_blocks():
    service = Service(blocks=12, max_batch=4, budget=16)
    service.add(1, words(1, 5), max_tokens=8)
    service.step()
    service.add(2, words(2, 40), max_tokens=5)
    service.add(3, words(3, 5), max_tokens=2)
    service.step()
    while 1 not in service.finished:
        assert service.scheduler.waiting == 2
        service.step()
    service.drain()


def test_batch_work_finishes_under_an_endless_stream_of_interactive_work():
    service = Service(max_batch=2, budget=16)
    service.add(1, words(1, 12), max_tokens=20, priority=Priority.BACKGROUND)
    key = 1
    for _ in range(12 * PATIENCE):
        while service.scheduler.free_slots or service.scheduler.waiting < 3:
            key += 1
            service.add(key, words(key, 5), max_tokens=3, priority=Priority.INTERACTIVE)
        service.step()
        if 1 in service.finished:
            break
    assert 1 in service.finished
    service.drain()


def test_a_cancel_during_a_step_drops_its_result_and_frees_its_slot_at_once():
    service = Service()
    service.add(1, words(1, 5))
    service.add(2, words(2, 5))
    service.start_step()
    free = service.scheduler.free_slots
    service.remove(1)
    assert service.scheduler.free_slots == free + 1
    service.scheduler.check()
    service.add(1, words(4, 5))
    service.end_step()
    assert service.outputs[1] == []
    assert len(service.outputs[2]) == 1
    service.drain()


def test_removing_twice_is_harmless():
    service = Service()
    service.add(1, words(1, 5))
    service.scheduler.remove(1)
    service.scheduler.remove(1)
    assert service.scheduler.idle


def test_ending_soon_counts_the_sequences_that_the_step_in_flight_ends():
    service = Service(budget=32)
    service.add(1, words(1, 5), max_tokens=1)
    service.add(2, words(2, 5), max_tokens=2)
    assert service.scheduler.ending_soon() == 0
    service.start_step()
    assert service.scheduler.ending_soon() == 1
    service.end_step()
    assert service.scheduler.ending_soon() == 0
    service.drain()


def test_what_was_prepared_while_a_step_ran_is_what_would_be_planned_after_it():
    services = [Service(blocks=64, host={"global": 16, "window": 16}) for _ in range(2)]
    plans = [[], []]
    for service, planned, prepares in zip(services, plans, (True, False), strict=True):
        service.catches_up = lambda prepares=prepares: prepares
        for length in (5, 9, 14):
            service.add(length, words(100 * length, length), 12)
        while service.start_step():
            planned.append([_facts(sequence) for sequence in service.plan.sequences])
            service.end_step()
    assert plans[0] == plans[1]


def _facts(sequence):
    tables = sequence.global_table.tolist(), sequence.window_table.tolist(), sequence.window_first
    return sequence.key, sequence.tokens.tolist(), sequence.start, tables, sequence.sampling is not None


# --- blocks on their way ----------------------------------------------------------------------------


def restored(**options) -> Service:
    """A service whose sequence 2 has its prefix, 8 blocks of which 3 are in the window, in host memory."""
    service = Service(blocks=24, host={"global": 24, "window": 24}, by_layer=True, patience=10**9, **options)
    prompt = words(1, 8 * BLOCK + 1)
    service.add(1, prompt, max_tokens=1)
    while not service.scheduler.idle or service.cache.saving:
        service.step()
        service.scheduler.catch_up()
        service.cache.take_in()
        service.cache.start_moves()
        service.mover.hurry()
    for pool in service.cache.traffic.pools["device"].values():
        for hash in service.cache.chain(prompt).hashes:
            pool.discard(hash)
    service.add(2, prompt, max_tokens=4)
    return service


def test_a_sequence_alone_begins_while_its_blocks_still_come():
    service = restored()
    assert service.start_step()
    [sequence] = service.plan.sequences
    assert sequence.start == 8 * BLOCK
    assert [move.pool for move in service.mover.moves] == ["window", "global"]
    assert len(sequence.arriving) == 2
    service.end_step()
    assert service.start_step()
    assert not service.plan.sequences[0].arriving
    service.end_step()
    service.mover.patience = 0
    service.drain()


def test_beside_others_it_waits_where_copying_may_take_longer_than_computing():
    service = restored()
    service.add(3, words(90, 5), max_tokens=8)
    service.step()
    for _ in range(3):
        assert service.start_step()
        assert [sequence.key for sequence in service.plan.sequences] == [3]
        service.end_step()
    service.mover.patience = 0
    service.drain()


def test_beside_others_it_begins_where_copying_is_known_to_be_faster():
    service = restored()
    service.add(3, words(90, 5), max_tokens=8)
    service.step()
    [bring_up] = {move.source: move for move in service.mover.moves if move.target == "device"}.values()
    rates = service.cache.traffic.rates
    rates.observe_move(Outcome(bring_up, 0.001), 10**9)
    rates.observe_prefill(16, 10.0)
    assert service.start_step()
    assert sorted(sequence.key for sequence in service.plan.sequences) == [2, 3]
    service.end_step()
    service.mover.patience = 0
    service.drain()


def test_misuse_is_named():
    service = Service()
    service.add(1, words(1, 5))
    with pytest.raises(ValueError, match="present already"):
        service.add(1, words(1, 5))
    with pytest.raises(ValueError, match="needs a prompt"):
        service.add(2, [])
    with pytest.raises(ValueError, match="2 of 2"):
        service.add(2, [1], max_tokens=2, generated=[3, 4])
    with pytest.raises(RuntimeError, match="no step is in flight"):
        service.scheduler.apply(StepResult({}))
    service.start_step()
    with pytest.raises(RuntimeError, match="a step is in flight"):
        service.scheduler.plan()
    with pytest.raises(EngineError, match="sequence 1"):
        service.scheduler.apply(StepResult({}))


def test_planning_sixteen_decodes_is_cheap():
    service = Service(blocks=16 * 200, max_batch=16, budget=4096)
    for key in range(16):
        service.add(key, [*words(key, 500), key], max_tokens=200)
    while service.scheduler.running < 16 or any(len(out) < 2 for out in service.outputs.values()):
        service.step()
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        service.start_step()
        times.append(time.perf_counter() - begin)
        assert len(service.plan.sequences) == 16
        service.end_step()
    # 0.1 ms on a quiet core of 2025; the bound leaves room for a slow and busy one, not for O(blocks).
    assert min(times) < 1e-3
