"""Leases, cancelling and waiting, against a real server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from tests.messages import pushed
from tests.queue_site import Site, ids
from tests.waiting import until
from wicore.errors import Unavailable, UnknownJob
from wicore.queue.connection import connect
from wicore.queue.consumer import Delivery, LeaseConsumer, LeaseKeeper
from wicore.queue.doorbell import Doorbell
from wicore.queue.producer import Producer
from wicore.request import Priority, started_event, token_event

pytestmark = pytest.mark.valkey
LEVELS = sorted(Priority)


# --- leases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("crash_after", ["pop", "started", "tokens"])
def test_a_crash_after_any_command_leaves_the_job_to_the_next_worker(site: Site, crash_after: str) -> None:
    job = site.submit()
    (first,) = site.worker("w1").pop(1)
    if crash_after != "pop":
        site.write(first, started_event(job.id, 1, 1))
    if crash_after == "tokens":
        site.write(first, token_event(job.id, 2, 0, "a", [1]))
    site.check()
    site.expire_leases()
    assert site.reap() == [1, 0]
    site.check()
    assert site.producer.record(job.id).status == "queued"
    (second,) = site.worker("w2").pop(1)
    site.start(second)
    assert site.finish(second) == 1
    assert site.producer.record(job.id).attempts == 2
    assert site.types(job.id).count("done") == 1


def test_a_job_that_kills_its_workers_fails_once_with_the_reason(site: Site) -> None:
    job = site.submit()
    for attempt in (1, 2, 3):
        (delivery,) = site.worker(f"w{attempt}").pop(1)
        assert delivery.attempt == attempt
        site.start(delivery)
        site.lose_workers()
        site.reap()
        site.check()
    assert site.worker().pop(1) == []
    record = site.producer.record(job.id)
    assert record.status == "failed"
    assert record.error is not None
    assert record.error["code"] == "worker_lost"
    assert site.types(job.id)[-2:] == ["token", "failed"]
    (entry,) = site.dead()
    assert json.loads(entry["message"])["headers"]["id"] == job.id


def test_a_renewed_lease_is_kept_and_a_lost_one_reported(site: Site) -> None:
    for _ in range(2):
        site.submit()
    one, two = site.worker().pop(2)
    site.expire_leases()
    triples = [part for d in (one, two) for part in (d.job_id, d.tag, d.fence)]
    assert site.scripts.call("renew", *triples) == [[], []]
    assert site.reap() == [0, 0]
    site.redis.zadd(site.keys.leases, {two.tag: 1})
    site.reap()
    assert site.scripts.call("renew", *triples) == [[two.tag.encode()], []]


def test_a_handed_back_job_goes_first_and_its_attempt_does_not_count(site: Site) -> None:
    jobs = [site.submit().id for _ in range(4)]
    worker = site.worker("w1")
    batch = worker.pop(3)
    site.start(batch[0])
    worker.hand_back(batch)
    site.check()
    again = site.worker("w2").pop(4)
    assert ids(again) == jobs
    assert [d.attempt for d in again] == [1, 1, 1, 1]
    assert site.write(batch[1], started_event(jobs[1], 1, 1)) == [0]
    worker.hand_back(batch)
    assert site.worker("w3").pop(4) == []


def test_a_pop_whose_answer_was_lost_is_undone_by_the_next(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [site.submit().id for _ in range(3)]
    worker = site.worker()
    (held,) = worker.pop(1)
    call = worker._scripts.call

    def lossy(*args: Any) -> Any:
        call(*args)
        raise redis.ConnectionError("the answer was lost")

    monkeypatch.setattr(worker._scripts, "call", lossy)
    with pytest.raises(Unavailable):
        worker.pop(2, held=[held])
    site.check()
    monkeypatch.undo()
    again = worker.pop(2, held=[held])
    assert sorted(ids(again)) == sorted(jobs[1:])
    assert [d.attempt for d in again] == [1, 1]


@pytest.mark.parametrize("client", ["", "c"])
def test_a_finished_record_is_forgotten_after_its_retention(
    new_site: Callable[..., Site], client: str
) -> None:
    site = new_site(retention_s=60)
    job = site.submit(client=client)
    (delivery,) = site.worker().pop(1)
    site.finish(delivery)
    for key in (site.keys.job(job.id), site.keys.log(job.id), site.keys.celery_result(job.id)):
        assert 0 < site.redis.ttl(key) <= 60
    (entry,) = site.redis.zrange(site.keys.finished, 0, -1)
    site.redis.zadd(site.keys.finished, {entry: 1})
    site.redis.delete(site.keys.job(job.id))
    site.reap()
    assert site.redis.keys(f"{site.keys.jobs}*") == []
    assert site.redis.zcard(site.keys.finished) == 0


# --- cancelling ---------------------------------------------------------------------------------


def test_a_cancelled_waiting_job_ends_at_once_and_never_runs(site: Site) -> None:
    job, other = site.submit(), site.submit()
    assert site.producer.cancel(job.id) == "cancelled"
    assert site.types(job.id) == ["cancelled"]
    assert site.producer.depths()[Priority.NORMAL] == 1
    site.check()
    assert site.producer.cancel(job.id) == "cancelled"
    assert ids(site.worker().pop(5)) == [other.id]
    assert site.types(job.id) == ["cancelled"]


@pytest.mark.parametrize("started", [False, True])
def test_a_leased_job_is_cancelled_by_its_worker(site: Site, started: bool) -> None:
    job = site.submit()
    (delivery,) = site.worker().pop(1)
    if started:
        site.start(delivery)
    with site.redis.pubsub() as control:
        control.subscribe(site.keys.control)
        control.get_message(timeout=5)
        assert site.producer.cancel(job.id) == ("running" if started else "queued")
        notice = control.get_message(timeout=5)
    assert json.loads(notice["data"]) == {"type": "cancel", "job": job.id}
    assert site.producer.record(job.id).cancel_requested
    seq = site.last_seq(job.id) + 1
    assert site.write(delivery, token_event(job.id, seq, 0, "b", [1])) == [2]
    assert site.scripts.call("renew", job.id, delivery.tag, delivery.fence) == [[], [delivery.tag.encode()]]
    assert site.finish(delivery, "cancelled") == 1
    assert site.types(job.id)[-1] == "cancelled"


def test_a_cancelled_job_whose_worker_died_is_not_tried_again(site: Site) -> None:
    job = site.submit()
    (delivery,) = site.worker().pop(1)
    site.start(delivery)
    site.producer.cancel(job.id)
    site.lose_workers()
    assert site.types(job.id) == ["started", "token", "cancelled"]


def test_a_cancelled_job_that_is_handed_back_ends(site: Site) -> None:
    job = site.submit()
    worker = site.worker()
    batch = worker.pop(1)
    site.producer.cancel(job.id)
    worker.hand_back(batch)
    assert site.types(job.id) == ["cancelled"]


def test_a_suspect_can_be_cancelled(site: Site) -> None:
    job = site.submit()
    site.worker("dead").pop(1)
    site.lose_workers()
    assert site.producer.cancel(job.id) == "cancelled"
    site.check()
    assert site.worker().pop(1) == []
    assert site.types(job.id) == ["cancelled"]


def test_a_message_no_worker_has_seen_can_be_called_off_by_id(site: Site) -> None:
    site.redis.lpush("wicore", pushed("unseen"))
    with pytest.raises(UnknownJob):
        site.producer.cancel("unseen")
    assert site.worker().pop(1) == []
    assert site.types("unseen") == ["cancelled"]


def test_cancelling_a_finished_job_changes_nothing(site: Site) -> None:
    job = site.submit()
    (delivery,) = site.worker().pop(1)
    site.finish(delivery)
    assert site.producer.cancel(job.id) == "succeeded"
    assert site.types(job.id) == ["done"]


# --- waiting ------------------------------------------------------------------------------------


def in_background(worker: LeaseConsumer, timeout: float) -> tuple[threading.Thread, list[Any]]:
    """A thread in `wait`, blocked there when this returns; the list gets its answer and when it came."""
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.extend((worker.wait(timeout), time.perf_counter())))
    thread.start()
    return thread, answers


def blocked_clients(client: redis.Redis, count: int) -> None:
    end = time.monotonic() + 5
    while client.info("clients")["blocked_clients"] < count:
        assert time.monotonic() < end


@pytest.mark.parametrize("level", LEVELS)
def test_a_push_by_anyone_on_any_level_wakes_a_waiting_worker(site: Site, level: Any) -> None:
    worker = site.worker()
    thread, answers = in_background(worker, 30)
    blocked_clients(site.redis, 5)
    pushed_at = time.perf_counter()
    site.redis.lpush(site.keys.queue(level), pushed("a"), pushed("b"))
    thread.join(10)
    assert answers[0] is True
    assert answers[1] - pushed_at < 1
    assert ids(worker.pop(5)) == ["a", "b"], "waiting moved a message"
    worker.wait(0)


def test_a_job_whose_worker_died_wakes_a_waiting_one(site: Site) -> None:
    job = site.submit()
    site.worker("dies").pop(1)
    worker = site.worker("waits")
    thread, answers = in_background(worker, 30)
    blocked_clients(site.redis, 5)
    site.lose_workers()
    thread.join(10)
    assert answers[0] is True
    assert ids(worker.pop(5)) == [job.id]


def test_what_was_pushed_before_the_wait_is_noticed(site: Site) -> None:
    worker = site.worker()
    assert not worker.wait(0.01)
    site.submit()
    assert worker.wait(5)


def test_a_wait_ends_with_its_time_or_by_interrupt(site: Site) -> None:
    worker = site.worker()
    assert not worker.wait(0.02)
    thread, answers = in_background(worker, 30)
    blocked_clients(site.redis, 5)
    worker.interrupt()
    thread.join(5)
    assert answers[0] is False
    worker.interrupt()
    assert not worker.wait(30)


def test_a_worker_that_was_busy_for_long_waits_again_without_ado(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bell's blocking reads are answered meanwhile, and nobody reads the answers."""
    monkeypatch.setattr(Doorbell, "_BLOCK_S", 0.02)
    worker = site.worker()
    assert not worker.wait(0)
    overdue_at = time.monotonic() + 2 * 0.02
    while site.redis.info("clients")["blocked_clients"] or time.monotonic() <= overdue_at:
        pass
    assert not worker.wait(0)
    site.submit()
    assert worker.wait(5)


def test_a_wait_without_redis_says_so() -> None:
    client = connect("unix:///nowhere/at/all.sock")
    worker = LeaseConsumer(client, "w")
    with pytest.raises(Unavailable, match=r"/nowhere/at/all\.sock"):
        worker.wait(1)
    worker.close()
    client.close()


def test_passwords_stay_out_of_messages() -> None:
    client = connect("redis://user:secret@127.0.0.1:1/0")
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1") as refused:
        Producer(client).depths()
    assert "secret" not in refused.value.message
    client.close()


# --- the keeper ---------------------------------------------------------------------------------


class Keeper:
    def __init__(self, site: Site, progress: Any = lambda: True) -> None:
        self.lost: list[Delivery] = []
        self.cancelled: list[Delivery] = []
        self.told = threading.Event()
        self.keeper = LeaseKeeper(
            site.redis,
            "w1",
            settings=site.settings,
            on_lost=lambda d: (self.lost.append(d), self.told.set()),
            on_cancel=lambda d: (self.cancelled.append(d), self.told.set()),
            progress=progress,
        )

    def __enter__(self) -> Keeper:
        self.keeper.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.keeper.stop()


def test_the_keeper_renews_what_is_held_and_reaps_what_is_not(new_site: Callable[..., Site]) -> None:
    site = new_site(lease_s=0.6)
    held, dropped = (site.submit().id for _ in range(2))
    kept, other = site.worker().pop(2)
    with Keeper(site) as keeper:
        keeper.keeper.hold(kept)
        until(lambda: site.producer.suspects() == 1)
        assert site.producer.record(dropped).status == "queued"
        before = site.redis.zscore(site.keys.leases, kept.tag)
        until(lambda: site.redis.zscore(site.keys.leases, kept.tag) > before)
        assert keeper.lost == []
        assert other.job_id == dropped
    assert site.producer.record(held).attempts == 1


def test_the_keeper_of_a_hung_engine_lets_the_leases_go(new_site: Callable[..., Site]) -> None:
    site = new_site(lease_s=0.3)
    site.submit()
    (delivery,) = site.worker().pop(1)
    hung = threading.Event()
    with Keeper(site, progress=lambda: not hung.is_set()) as keeper:
        keeper.keeper.hold(delivery)
        hung.set()
        until(lambda: site.producer.suspects() == 1)
        hung.clear()
        assert keeper.told.wait(5)
    assert keeper.lost == [delivery]


def test_the_keeper_reports_a_job_called_off(new_site: Callable[..., Site]) -> None:
    site = new_site(lease_s=0.3)
    job = site.submit()
    (delivery,) = site.worker().pop(1)
    with Keeper(site) as keeper:
        keeper.keeper.hold(delivery)
        site.producer.cancel(job.id)
        assert keeper.told.wait(5)
    assert keeper.cancelled[0] == delivery


def test_after_an_outage_the_keeper_renews_before_it_takes_from_others(
    new_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = new_site(lease_s=0.3)
    site.submit()
    (delivery,) = site.worker().pop(1)
    keeper = Keeper(site)
    call, failures = keeper.keeper._scripts.call, iter(range(3))
    after: list[str] = []
    reaped = threading.Event()

    def flaky(name: Any, *args: Any) -> Any:
        if next(failures, None) is not None:
            raise redis.ConnectionError("gone")
        after.append(name)
        if name == "reap":
            reaped.set()
        return call(name, *args)

    monkeypatch.setattr(keeper.keeper._scripts, "call", flaky)
    keeper.keeper.hold(delivery)
    with keeper:
        assert reaped.wait(5)

    assert after[: after.index("reap")].count("renew") >= 2
    assert keeper.lost == []


# --- the longest wait ---------------------------------------------------------------------------


def test_a_job_that_nobody_starts_in_time_expires(site: Site) -> None:
    job = site.submit(queue_timeout_s=60).id
    site.redis.hset(site.keys.job(job), "start_by_ms", 1)
    site.redis.zadd(site.keys.deadlines, {job: 1})
    site.reap()
    assert site.producer.record(job).status == "expired"
    assert "not started in time" in site.log(job)[-1]["error"]["message"]


def test_a_job_that_has_started_may_wait_again_as_long_as_it_takes(new_site: Callable[..., Site]) -> None:
    site = new_site(max_wait_s=60.0)
    job = site.submit().id
    (delivery,) = site.worker("w1").pop(1)
    site.start(delivery)
    site.redis.hset(site.keys.job(job), "start_by_ms", 1)
    site.lose_workers()
    assert ids(site.worker("w2").pop(1)) == [job]


def test_a_late_start_is_refused_at_the_pop(new_site: Callable[..., Site]) -> None:
    site = new_site(max_wait_s=60.0)
    job = site.submit().id
    site.redis.hset(site.keys.job(job), "start_by_ms", 1)
    assert site.worker().pop(1) == []
    assert site.types(job) == ["expired"]
