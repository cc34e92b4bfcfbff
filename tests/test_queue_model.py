"""Any order of submits, pops, writes, crashes, cancels and pushes keeps the queue's invariants."""

from __future__ import annotations

import json

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.messages import pushed
from tests.queue_site import Site
from wicore.queue.consumer import Delivery
from wicore.queue.scripts import Arg
from wicore.request import STATUS_OF_TERMINAL, Priority, terminal_event

pytestmark = pytest.mark.valkey
ENDINGS = st.sampled_from(sorted(STATUS_OF_TERMINAL))


class QueueMachine(RuleBasedStateMachine):
    """Two workers and a crash; deliveries stay usable after their lease is lost, as in a slow process."""

    client: redis.Redis
    deliveries = Bundle("deliveries")

    def __init__(self) -> None:
        super().__init__()
        self.client.flushdb()
        self.site = Site(self.client, max_attempts=2, background_share=0.3)
        self.workers = {name: self.site.worker(name) for name in ("w1", "w2")}
        self.finished: dict[str, int] = {}
        self.names = 0

    @rule(level=st.sampled_from(Priority))
    def submit(self, level: Priority) -> None:
        self.names += 1
        self.site.submit(level, job_id=f"s{self.names}")

    @rule(level=st.sampled_from(Priority), same_id=st.booleans(), same_tag=st.booleans())
    def push(self, level: Priority, same_id: bool, same_tag: bool) -> None:
        self.names += 1
        job = "same" if same_id else f"p{self.names}"
        self.client.lpush(self.site.keys.queue(level), pushed(job, "same" if same_tag else f"t{self.names}"))

    @rule(
        raw=st.sampled_from(
            [b"garbage", json.dumps({"headers": {"id": "bare"}}).encode(), pushed("odd", top_p=9)]
        )
    )
    def push_malformed(self, raw: bytes) -> None:
        self.client.lpush("wicore", raw)

    @rule(target=deliveries, worker=st.sampled_from(["w1", "w2"]))
    def pop(self, worker: str) -> list[Delivery]:
        return self.workers[worker].pop(2)

    @rule(batch=deliveries)
    def start(self, batch: list[Delivery]) -> None:
        for delivery in batch:
            if self.site.last_seq(delivery.job_id) == delivery.seq:
                self.site.start(delivery)

    @rule(batch=deliveries, kind=ENDINGS)
    def finish(self, batch: list[Delivery], kind: str) -> None:
        for delivery in batch:
            seq = self.site.last_seq(delivery.job_id) + 1
            args: list[Arg] = [str(arg) for arg in self._ending(delivery, kind, seq)]
            self.site.scripts.call("finish", *args)

    @staticmethod
    def _ending(delivery: Delivery, kind: str, seq: int) -> list[object]:
        event = json.dumps(terminal_event(delivery.job_id, seq, kind))  # type: ignore[arg-type]
        return [delivery.job_id, delivery.fence, kind, seq, event, "", "", "", "", "WicoreError", "why", ""]

    @rule(batch=deliveries)
    def hand_back(self, batch: list[Delivery]) -> None:
        self.workers["w1"].hand_back(batch)

    @rule(worker=st.sampled_from(["w1", "w2"]))
    def forget_everything(self, worker: str) -> None:
        self.site.scripts.call("recover", worker)

    @rule()
    def crash(self) -> None:
        self.site.lose_workers()

    @rule(pick=st.integers(0, 30))
    def cancel(self, pick: int) -> None:
        if jobs := sorted(self.site.jobs()):
            self.site.producer.cancel(jobs[pick % len(jobs)])

    @rule(pick=st.integers(0, 30))
    def pass_a_deadline(self, pick: int) -> None:
        if jobs := sorted(self.site.jobs()):
            job = jobs[pick % len(jobs)]
            key = self.site.keys.job(job)
            if self.client.hget(key, "status") in (b"queued", b"running"):
                self.client.hset(key, "deadline_ms", 1)
                if self.client.hexists(key, "at"):
                    self.client.zadd(self.site.keys.deadlines, {job: 1})

    @invariant()
    def the_invariants_hold(self) -> None:
        self.site.check()

    @invariant()
    def an_ended_job_stays_as_it_ended(self) -> None:
        for job in self.site.jobs():
            if self.site.producer.record(job).status in STATUS_OF_TERMINAL.values():
                ended = self.finished.setdefault(job, self.site.last_seq(job))
                assert self.site.last_seq(job) == ended

    def teardown(self) -> None:
        """Nothing accepted is lost: workers that come after run every job to its end."""
        self.site.lose_workers()
        while batch := self.workers["w1"].pop(10):
            for delivery in batch:
                assert self.site.finish(delivery) == 1
        self.site.check()
        assert all(
            self.site.producer.record(job).status in STATUS_OF_TERMINAL.values() for job in self.site.jobs()
        )
        assert sum(self.site.producer.depths().values()) == 0
        assert self.client.hlen(self.site.keys.deliveries) == 0
        self.site.close()


def test_any_history_keeps_the_invariants_and_ends_every_job(redis_client: redis.Redis) -> None:
    QueueMachine.client = redis_client
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        QueueMachine,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
