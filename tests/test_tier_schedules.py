"""A thousand schedules over tiers of every size, with slow and failing copies and every policy.

Each is drawn from its seed alone, so that one that fails can be run again by its number. The state machine
of test_scheduler looks for the same and shrinks what it finds; this one looks in more places.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.checking_engine import undisturbed
from tests.test_scheduler import BLOCK, GREEDY, SEEDED, Service, words
from wicore.errors import TooLarge
from wicore.hmt.policy import POLICIES
from wicore.request import Priority
from wicore.sampling import SamplingState

CHUNK = 100
CHUNKS = 10


class Schedule:
    """Arrivals, steps and cancels in a random order, against a service with tiers of random sizes."""

    def __init__(self, seed: int) -> None:
        self.random = r = random.Random(seed)
        window = r.randint(1, 14)
        span = -(-(window - 1) // BLOCK) + 1
        self.service = Service(
            blocks=r.randint(4, 14),
            window_blocks=span + r.randint(0, 4),
            window=window,
            max_batch=r.randint(1, 5),
            budget=r.randint(6, 20),
            host={"global": r.randint(6, 24), "window": span + r.randint(0, 6)},
            nvme=r.choice([None, *2 * [{"global": r.randint(1, 60), "window": r.randint(1, 30)}]]),
            seed=seed,
            patience=r.randint(0, 4),
            fault_rate=r.choice([0, 0, 0.1, 0.4]),
            by_layer=r.random() < 0.5,
            policy=r.choice(sorted(POLICIES)),
            checkpoint_tokens=r.choice([0, 4, 12]),
        )
        self.key = 0
        self.streamed: set[int] = set()
        """Sequences of which a step has read blocks in host memory."""
        self.followed = 0
        """Sequences whose first step read blocks that were still on their way."""
        self.cancelled = 0

    def run(self) -> None:
        """Every output is checked against the undisturbed one, and all accounts after every action."""
        for _ in range(self.random.randint(5, 28)):
            [action] = self.random.choices([self.arrive, self.step, self.cancel], [35, 55, 10])
            action()
            self.service.scheduler.check()
        for _ in range(3000):
            if not self.step():
                break
            self.service.scheduler.check()
        self.service.drain()

    def arrive(self) -> None:
        r, service = self.random, self.service
        self.key += 1
        prompt = words(r.randint(0, 2), r.randint(0, 18)) + words(self.key, r.randint(1, 8))
        max_tokens, done = r.randint(1, 9), r.randint(0, 4)
        params = r.choice([GREEDY, SEEDED])
        generated = []
        if 0 < done < max_tokens:
            generated = undisturbed(prompt, done, SamplingState(params, self.key, prompt))
        try:
            service.add(
                self.key,
                prompt,
                max_tokens,
                generated=generated,
                priority=r.choice(list(Priority)),
                params=params,
            )
        except TooLarge:
            assert len(prompt) + max_tokens > service.blocks * BLOCK

    def step(self) -> bool:
        """Compute, or wait for blocks; False when there is nothing to do."""
        service, r = self.service, self.random
        self._check_matches()
        if not service.start_step():
            return service.cache.busy or not service.scheduler.idle
        self.streamed.update(sequence.key for sequence in service.plan.sequences if sequence.streamed)
        self.followed += sum(bool(sequence.arriving) for sequence in service.plan.sequences)
        service.scheduler.check()
        # Now and then blocks move, and somebody leaves, while the step runs.
        if r.random() < 0.5:
            service.scheduler.catch_up()
        if r.random() < 0.05:
            self.cancel()
        if r.random() < 0.5:
            service.mover.hurry()
        service.scheduler.check()
        service.end_step()
        return True

    def _check_matches(self) -> None:
        """What is remembered of a waiting sequence's match is what would be found now."""
        cache = self.service.cache
        for waiting in self.service.scheduler._waiting:
            share = cache._share if cache.is_long(waiting.positions) else None
            fresh = cache._prefixes._match(waiting.chain, share, cache._prefixes._costs())
            assert cache.match(waiting.chain, waiting.positions) == fresh

    def cancel(self) -> None:
        service = self.service
        if service.outputs:
            key = self.random.choice(sorted(service.outputs))
            output = service.remove(key)
            assert output == service.expected(key)[: len(output)]
            self.cancelled += 1


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_output_of_any_schedule_over_tiers_is_the_undisturbed_one(chunk: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        schedule = Schedule(seed)
        try:
            schedule.run()
        except Exception as err:
            raise AssertionError(f"Schedule({seed}).run() fails") from err
        service = schedule.service
        moved, faults = service.cache.traffic.move_seconds, service.mover.faults
        seen.update(
            finished=len(service.finished),
            cancelled=schedule.cancelled,
            streamed=len(schedule.streamed),
            followed=schedule.followed,
            preempted=service.scheduler.preemptions,
            raised=("host", "device") in moved,
            loaded=("nvme", "host") in moved,
            not_saved=faults["device", "host"] + faults["host", "nvme"],
            not_lifted=faults["host", "device"] + faults["nvme", "host"],
        )
    # What a chunk claims to try did happen, or it would prove nothing.
    assert all(seen.values()), seen
    assert seen["finished"] > 2 * CHUNK
