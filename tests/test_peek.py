"""Looking ahead in the line: what comes next, and nothing changed."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import redis
from redis.exceptions import ResponseError

from tests.messages import pushed, raw
from tests.queue_site import Site, ids
from wicore.queue import scripts
from wicore.queue.consumer import LeaseConsumer
from wicore.request import Priority

pytestmark = pytest.mark.valkey


def peeked(consumer: LeaseConsumer, count: int = 100) -> list[str]:
    return [job.job_id for job in consumer.peek(count)]


def popped(consumer: LeaseConsumer) -> list[str]:
    """All that waits, one after the other."""
    order: list[str] = []
    while got := consumer.pop(1):
        order += ids(got)
    return order


def everything(client: redis.Redis) -> dict[bytes, Any]:
    """Each key's value as the server would save it, and when it expires."""
    return {key: (client.dump(key), client.pexpiretime(key)) for key in client.keys("*")}


@pytest.fixture
def in_turn(new_site: Any) -> Site:
    """A site whose pops always look at the most urgent level first."""
    return new_site(background_share=0.0)


def test_jobs_come_in_the_order_in_which_pop_takes_them(in_turn: Site) -> None:
    for i in range(6):
        in_turn.submit(client="greedy", job_id=f"greedy-{i}", prompt_tokens=300, max_tokens=50)
        in_turn.submit(client="modest", job_id=f"modest-{i}", prompt_tokens=90, max_tokens=10)
        in_turn.submit(sorted(Priority)[i % 4], client=f"c{i}", job_id=f"level-{i}", prompt_tokens=10)
    consumer = in_turn.worker()
    seen = peeked(consumer)
    assert len(seen) == 18
    assert seen[:2] == ["level-0", "level-4"]
    assert seen == popped(consumer)


def test_no_more_come_than_asked_for(site: Site) -> None:
    for i in range(5):
        site.submit(job_id=f"j{i}")
    consumer = site.worker()
    assert peeked(consumer, 2) == ["j0", "j1"]
    assert consumer.peek(0) == []


def test_a_job_comes_with_its_body_and_level(site: Site) -> None:
    site.submit(Priority.BATCH, "Once upon", job_id="j1")
    (job,) = site.worker().peek(1)
    assert (job.job_id, job.level, job.body.prompt) == ("j1", Priority.BATCH, "Once upon")


def test_looking_changes_no_key(site: Site) -> None:
    consumer = site.worker()
    site.submit(job_id="running")
    consumer.pop(1)
    for i, level in enumerate([*Priority, *Priority]):
        site.submit(level, job_id=f"j{i}", client=f"c{i % 3}", timeout_s=3600.0)
    site.producer.cancel("j2")
    site.redis.lpush(site.keys.queue(Priority.NORMAL), pushed("foreign"))
    before = everything(site.redis)
    assert len(consumer.peek(100)) == 7
    assert everything(site.redis) == before


def test_what_must_not_run_is_skipped(site: Site) -> None:
    consumer = site.worker()
    for name in ("cancelled", "late", "good"):
        site.submit(job_id=name)
    site.producer.cancel("cancelled")
    site.redis.hset(site.keys.job("late"), "deadline_ms", 1)
    assert peeked(consumer) == ["good"]


def test_a_foreign_message_is_seen_once_a_pop_has_given_it_a_place(site: Site) -> None:
    consumer = site.worker()
    for i in range(3):
        site.redis.lpush(site.keys.queue(Priority.NORMAL), pushed(f"j{i}"))
    assert peeked(consumer) == []
    assert ids(consumer.pop(1)) == ["j0"]
    assert peeked(consumer) == ["j1", "j2"]


def test_a_foreign_message_that_makes_no_job_is_skipped(site: Site) -> None:
    consumer = site.worker()
    site.submit(job_id="running")
    malformed = raw(headers__id="bad", headers__task="other", properties={"delivery_tag": "t"})
    for message in (malformed, pushed("good")):
        site.redis.lpush(site.keys.queue(Priority.NORMAL), message)
    assert ids(consumer.pop(1)) == ["running"]
    assert peeked(consumer) == ["good"]


def test_a_suspect_is_not_seen(site: Site) -> None:
    site.submit(job_id="suspect")
    site.worker("w1").pop(1)
    site.submit(job_id="other")
    site.lose_workers()
    assert peeked(site.worker("w2")) == ["other"]


def test_one_look_fetches_a_bounded_number_of_bytes(site: Site) -> None:
    for i in range(6):
        site.submit(text="a" * 300_000, job_id=f"j{i}", prompt_tokens=10)
    assert peeked(site.worker()) == ["j0", "j1", "j2", "j3"]


def test_a_peek_that_would_write_is_refused_by_the_server(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = scripts._text

    def text(header: str, name: Any) -> tuple[str, str]:
        lua = genuine(header, name)[0].replace("return found", "redis.call('SET', 'x', 1)")
        return lua, hashlib.sha1(lua.encode()).hexdigest()

    monkeypatch.setattr(scripts, "_text", text)
    with pytest.raises(ResponseError, match="Write commands are not allowed from read-only scripts"):
        site.worker().peek(1)
