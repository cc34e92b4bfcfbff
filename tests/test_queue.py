"""The queue itself, against a real server: what the scripts promise."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.messages import message, pushed
from tests.queue_site import RESULT, Site, ids
from wicore.errors import Conflict, InvalidRequest, QueueFull, UnknownJob
from wicore.request import Priority, parse_job, terminal_event, token_event, usage_of

pytestmark = pytest.mark.valkey
LEVELS = sorted(Priority)


# --- accepting ----------------------------------------------------------------------------------


def test_an_accepted_job_is_on_record_and_in_its_queue(site: Site) -> None:
    first = site.submit(prompt_tokens=3, timeout_s=60.0)
    second = site.submit(Priority.INTERACTIVE)
    third = site.submit(Priority.BATCH)
    assert [s.position for s in (first, second, third)] == [0, 0, 2]
    assert site.producer.depths() == dict(zip(LEVELS, (1, 1, 1, 0), strict=True))
    record = site.producer.record(first.id)
    assert (record.status, record.kind, record.priority) == ("queued", "completion", Priority.NORMAL)
    assert (record.prompt_tokens, record.deadline_ms) == (3, record.created_ms + 60_000)
    assert json.loads(json.dumps(record.public()))["priority"] == "normal"


def test_a_repeated_submit_of_the_same_id_adds_nothing(site: Site) -> None:
    assert site.submit(job_id="j1").created
    again = site.submit(job_id="j1")
    assert (again.id, again.created, again.status) == ("j1", False, "queued")
    assert sum(site.producer.depths().values()) == 1


def test_a_submit_whose_answer_was_lost_is_repeated_by_the_client_and_still_created(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = site.producer._scripts.call

    def twice(*args: Any) -> Any:
        call(*args)
        return call(*args)

    monkeypatch.setattr(site.producer._scripts, "call", twice)
    assert site.submit(job_id="j1").created
    assert sum(site.producer.depths().values()) == 1


def test_a_bad_job_id_is_refused(site: Site) -> None:
    with pytest.raises(InvalidRequest, match="id:"):
        site.submit(job_id="no spaces")


def test_a_full_level_refuses_with_a_time_to_wait(new_site: Callable[..., Site]) -> None:
    site = new_site(max_jobs=2)
    site.submit()
    cancelled = site.submit()
    with pytest.raises(QueueFull, match=r"2 jobs are waiting.*max_jobs") as refused:
        site.submit()
    assert refused.value.retry_after is not None
    assert site.submit(Priority.BATCH).created, "another level is bounded by itself"
    site.producer.cancel(cancelled.id)
    assert site.submit().created, "a cancelled job still counts as waiting"


def test_a_level_is_bounded_by_tokens_too(new_site: Callable[..., Site]) -> None:
    site = new_site(max_tokens=1000)
    site.submit(prompt_tokens=900, max_tokens=50)
    with pytest.raises(QueueFull, match=r"950 tokens are waiting.*max_tokens"):
        site.submit(prompt_tokens=10, max_tokens=50)
    assert site.submit(prompt_tokens=10, max_tokens=10).created
    site.worker().pop(2)
    assert site.submit(prompt_tokens=5000, max_tokens=1).created, "a job over the bound may wait alone"


def test_the_same_idempotency_key_and_body_give_the_same_job(site: Site) -> None:
    first = site.submit(idempotency_key="k")
    again = site.submit(idempotency_key="k")
    assert (again.id, again.created) == (first.id, False)
    with pytest.raises(Conflict, match=first.id):
        site.submit(text="another body", idempotency_key="k")
    assert site.submit(idempotency_key="k2").created


def test_two_clients_may_use_the_same_idempotency_key(site: Site) -> None:
    one = site.submit(idempotency_key="k", client="one")
    other = site.submit(idempotency_key="k", client="other", text="something else")
    assert other.created
    assert other.id != one.id
    assert site.submit(idempotency_key="k", client="one").id == one.id


def test_of_concurrent_twins_with_one_idempotency_key_one_is_created(site: Site) -> None:
    start = threading.Barrier(8)

    def twin(_: int) -> Any:
        start.wait(5)
        return site.submit(idempotency_key="k")

    with ThreadPoolExecutor(8) as threads:
        twins = list(threads.map(twin, range(8)))
    assert len({t.id for t in twins}) == 1
    assert sum(t.created for t in twins) == 1
    assert sum(site.producer.depths().values()) == 1


def test_jobs_are_listed_newest_first_by_status_and_page(site: Site) -> None:
    jobs = [site.submit(job_id=f"j{i}").id for i in range(7)]
    for i, job in enumerate(jobs):  # three milliseconds, so that pages are cut within ties
        created = 1000 + i // 3
        site.redis.hset(site.keys.job(job), "created_ms", created)
        for index in (site.keys.jobs, site.keys.jobs_by_status("queued")):
            site.redis.zadd(index, {job: created})
    site.producer.cancel("j3")
    seen: list[str] = []
    while page := site.producer.list(limit=2, after=seen[-1] if seen else None):
        seen += [record.id for record in page]
    assert seen == jobs[::-1]
    assert [r.id for r in site.producer.list("cancelled")] == ["j3"]
    assert [r.id for r in site.producer.list("queued", 10, "j4")] == ["j2", "j1", "j0"]
    with pytest.raises(UnknownJob):
        site.producer.list(after="nobody")


# --- taking -------------------------------------------------------------------------------------


def test_messages_come_by_level_and_then_in_order(site: Site) -> None:
    submitted = [site.submit(level).id for level in (9, 3, 0, 6, 3, 0) for level in (Priority(level),)]
    order = [2, 5, 1, 4, 3, 0]
    assert ids(site.worker().pop(10)) == [submitted[i] for i in order]


def test_the_lowest_level_gets_its_share_under_load(new_site: Callable[..., Site]) -> None:
    site = new_site(background_share=0.25)
    for _ in range(20):
        site.submit(Priority.INTERACTIVE)
    for _ in range(4):
        site.submit(Priority.BACKGROUND)
    worker = site.worker()
    levels = [delivery.level for n in (1, 2, 5) for delivery in worker.pop(n)]
    assert [i for i, level in enumerate(levels, 1) if level == Priority.BACKGROUND] == [4, 8]


def test_two_workers_never_get_the_same_job(site: Site) -> None:
    submitted = {site.submit().id for _ in range(40)}
    start = threading.Barrier(2)

    def pull(name: str) -> list[str]:
        worker, mine = site.worker(name), []
        start.wait(5)
        while batch := worker.pop(3):
            mine += ids(batch)
        return mine

    with ThreadPoolExecutor(2) as threads:
        one, two = threads.map(pull, ("w1", "w2"))
    assert sorted(one + two) == sorted(submitted)


def test_a_job_past_its_deadline_expires_without_running(site: Site) -> None:
    job = site.submit(timeout_s=60.0)
    site.redis.hset(site.keys.job(job.id), "deadline_ms", 1)
    assert site.worker().pop(1) == []
    assert site.producer.record(job.id).status == "expired"
    assert site.types(job.id) == ["expired"]


def test_a_job_expires_on_time_although_nobody_pops_it(site: Site) -> None:
    job = site.submit(timeout_s=60.0)
    site.redis.hset(site.keys.job(job.id), "deadline_ms", 1)
    site.redis.zadd(site.keys.deadlines, {job.id: 1})
    site.reap()
    assert site.types(job.id) == ["expired"]
    site.check()
    assert site.worker().pop(1) == []
    assert site.types(job.id) == ["expired"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"garbage", "not a JSON object"),
        (b"\xff\xfe", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"{}", "headers.id"),
        (b'{"headers":{"id":"a b"},"properties":{"delivery_tag":"t"}}', "headers.id"),
        (b"[" * 5000, "not a JSON object"),
    ],
)
def test_what_is_no_message_is_buried_with_the_reason(site: Site, raw: bytes, reason: str) -> None:
    site.redis.lpush("wicore", raw)
    good = site.submit()
    assert ids(site.worker().pop(5)) == [good.id]
    (entry,) = site.dead()
    assert reason in entry["reason"]
    assert entry["at_ms"] > 0


@pytest.mark.parametrize(
    "raw",
    [
        json.dumps(message(headers__id="bad", properties={})).encode(),
        pushed("bad", temperature=17),
        json.dumps(message(headers__id="bad", content_type="application/x-python-serialize")).encode(),
    ],
)
def test_a_malformed_message_with_an_id_fails_its_job_and_is_buried(site: Site, raw: bytes) -> None:
    site.redis.lpush("wicore", raw)
    assert site.worker().pop(5) == []
    record = site.producer.record("bad")
    assert record.status == "failed"
    assert record.error is not None
    (entry,) = site.dead()
    assert entry["reason"] == record.error["message"]
    assert entry["message"].encode() == raw


def test_a_plain_push_becomes_a_job_like_any_other(site: Site) -> None:
    site.redis.lpush(site.keys.queue(Priority.BATCH), pushed("plain", timeout_s=5, metadata={"a": "b"}))
    (delivery,) = site.worker().pop(1)
    assert (delivery.job_id, delivery.level, delivery.body.prompt) == ("plain", Priority.BATCH, "x")
    assert delivery.deadline_ms == delivery.created_ms + 5000
    (record,) = site.producer.list()
    assert (record.id, record.kind, record.metadata, record.position) == (
        "plain",
        "completion",
        {"a": "b"},
        None,
    )
    site.start(delivery)
    assert site.finish(delivery) == 1


def test_a_plain_push_that_is_late_expires(site: Site) -> None:
    late = json.loads(pushed("late"))
    late["headers"]["expires"] = "2020-01-01T00:00:00+00:00"
    site.redis.lpush("wicore", json.dumps(late))
    assert site.worker().pop(1) == []
    assert site.types("late") == ["expired"]


def test_the_same_message_twice_runs_once(site: Site) -> None:
    raw = pushed("twin")
    site.redis.lpush("wicore", raw, raw)
    worker = site.worker()
    (delivery,) = worker.pop(2)
    site.redis.lpush("wicore", raw)
    assert worker.pop(2) == []
    site.finish(delivery)
    site.redis.lpush("wicore", raw)
    assert worker.pop(2) == []
    assert site.types("twin") == ["done"]
    assert site.dead() == []


def test_another_message_with_the_id_of_a_job_is_buried(site: Site) -> None:
    job = site.submit(Priority.BATCH)
    site.redis.lpush("wicore", pushed(job.id, "other tag"))
    (delivery,) = site.worker().pop(2)
    assert delivery.level == Priority.BATCH
    assert "headers.id" in site.dead()[0]["reason"]


def test_a_tag_in_use_fails_the_second_job(site: Site) -> None:
    site.redis.lpush("wicore", pushed("a", "same"), pushed("b", "same"))
    assert ids(site.worker().pop(2)) == ["a"]
    assert site.producer.record("b").status == "failed"


# --- writing ------------------------------------------------------------------------------------


def test_a_job_runs_from_start_to_result(site: Site) -> None:
    job = site.submit()
    (delivery,) = site.worker().pop(1)
    assert site.producer.record(job.id).attempts == 1
    assert site.start(delivery) == [1]
    assert site.producer.record(job.id).status == "running"
    assert site.finish(delivery) == 1
    record = site.producer.record(job.id)
    assert (record.status, record.result, record.finish_reason) == ("succeeded", RESULT, "stop")
    assert record.usage == usage_of(1, 1)
    times = [record.created_ms, record.started_ms, record.first_token_ms, record.finished_ms]
    assert None not in times
    assert times == sorted(times, key=lambda ms: ms or 0)
    assert site.types(job.id) == ["started", "token", "done"]


def test_a_repeated_append_is_passed_over_and_a_gap_refused(site: Site) -> None:
    site.submit()
    (delivery,) = site.worker().pop(1)
    job = delivery.job_id
    site.start(delivery)
    assert site.start(delivery) == [1]
    events = [token_event(job, seq, 0, "b", [1]) for seq in (2, 3)]
    assert site.write(delivery, *events) == [1]
    assert [event["seq"] for event in site.log(job)] == [1, 2, 3]
    assert site.write(delivery, token_event(job, 5, 0, "c", [1])) == [-4]
    assert site.write(delivery, terminal_event(job, 6, "done")) == [-4]
    assert [event["seq"] for event in site.log(job)] == [1, 2, 3]


def test_a_worker_that_lost_its_lease_writes_nothing(site: Site) -> None:
    job = site.submit()
    (lost,) = site.worker("w1").pop(1)
    site.start(lost)
    site.lose_workers()
    before = site.log(job.id)
    assert site.write(lost, token_event(job.id, 3, 0, "x", [1])) == [0]
    assert site.finish(lost) == 0
    (delivery,) = site.worker("w2").pop(1)
    assert (delivery.attempt, delivery.seq, delivery.suspect) == (2, 2, True)
    assert site.write(lost, token_event(job.id, 3, 0, "x", [1])) == [0]
    assert site.finish(lost) == 0
    assert site.log(job.id) == before
    site.start(delivery)
    assert site.finish(delivery) == 1
    assert site.finish(lost) == 0
    assert site.types(job.id) == ["started", "token", "resumed", "token", "done"]


def test_a_repeated_finish_is_reported_done_and_ends_the_job_once(site: Site) -> None:
    job = site.submit()
    (delivery,) = site.worker().pop(1)
    ending = terminal_event(job.id, 1, "done")
    assert site.write(delivery, ending) == [1]
    assert site.write(delivery, ending) == [1]
    assert site.types(job.id) == ["done"]


def test_a_body_is_read_back_as_it_was_submitted(site: Site) -> None:
    body = parse_job(
        {"messages": [{"role": "user", "content": "Ünïcödé \u2028 \x00 \U0001f600"}], "logit_bias": {}}
    )
    site.producer.submit(body, Priority.NORMAL)
    (delivery,) = site.worker().pop(1)
    assert delivery.body == body
