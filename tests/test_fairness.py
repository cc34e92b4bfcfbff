"""Within a level clients take turns by tokens; position and wait are told as they will be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.messages import raw
from tests.queue_site import Site, ids
from wicore.errors import QueueFull
from wicore.queue.consumer import Delivery, LeaseConsumer
from wicore.request import Priority, terminal_event, usage_of

pytestmark = pytest.mark.valkey


def serve_all(site: Site, worker: LeaseConsumer, took: Callable[[Delivery], int]) -> list[str]:
    """Run one job after the other; `took` says how many tokens each really took. Returns the ids in order."""
    order = []
    while batch := worker.pop(1):
        finish(site, batch[0], took(batch[0]))
        order += ids(batch)
    return order


def finish(site: Site, delivery: Delivery, tokens: int) -> None:
    seq = site.last_seq(delivery.job_id) + 1
    usage = usage_of(tokens - 1, 1)
    site.write(delivery, terminal_event(delivery.job_id, seq, "done", usage=usage), result={})


def has_slots(site: Site, slots: int) -> None:
    now = site.redis.time()[0] * 1000
    site.redis.hset(site.keys.workers, "w", json.dumps({"slots": slots, "at_ms": now, "period_s": 5}))
    site.redis.delete(site.keys.capacity)


def test_a_thousand_jobs_of_one_client_do_not_delay_anothers_first(site: Site) -> None:
    for _ in range(1000):
        site.submit(client="greedy", prompt_tokens=100, max_tokens=10)
    worker = site.worker()
    for _ in range(50):
        finish(site, worker.pop(1)[0], 110)
    late = site.submit(client="modest", prompt_tokens=100, max_tokens=10)
    assert late.id in ids(worker.pop(2))


def test_clients_share_by_tokens_not_by_jobs(site: Site) -> None:
    for i in range(40):
        site.submit(client="long", job_id=f"long-{i}", prompt_tokens=900, max_tokens=100)
        site.submit(client="short", job_id=f"short-{i}", prompt_tokens=90, max_tokens=10)
    worker = site.worker()
    order = [delivery.job_id.split("-")[0] for _ in range(33) for delivery in worker.pop(1)]
    assert Counter(order)["short"] == pytest.approx(30, abs=1)


def test_what_a_job_really_took_is_what_its_client_pays(site: Site) -> None:
    for i in range(40):
        site.submit(client="frugal", job_id=f"frugal-{i}", prompt_tokens=10, max_tokens=200)
        site.submit(client="talkative", job_id=f"talkative-{i}", prompt_tokens=10, max_tokens=200)
    worker = site.worker()
    order = []
    for _ in range(40):
        (delivery,) = worker.pop(1)
        name = delivery.job_id.split("-")[0]
        finish(site, delivery, 210 if name == "talkative" else 70)
        order.append(name)
    assert Counter(order)["frugal"] == pytest.approx(30, abs=2)


def test_a_pause_saves_up_no_turns(site: Site) -> None:
    worker = site.worker()
    for _ in range(30):
        site.submit(client="busy", prompt_tokens=100, max_tokens=1)
    for _ in range(20):
        finish(site, worker.pop(1)[0], 101)
    for i in range(10):
        site.submit(client="back", job_id=f"back-{i}", prompt_tokens=100, max_tokens=1)
    order = serve_all(site, worker, lambda _: 101)[:10]
    assert sum(job.startswith("back") for job in order) == pytest.approx(5, abs=1)


def test_a_plain_message_may_name_its_client(site: Site) -> None:
    for i in range(20):
        site.redis.lpush(
            site.keys.queue(Priority.NORMAL),
            raw(
                headers__id=f"a{i}",
                headers__client="a",
                properties={"delivery_tag": f"ta{i}", "body_encoding": "base64"},
            ),
        )
    site.redis.lpush(
        site.keys.queue(Priority.NORMAL),
        raw(
            headers__id="b", headers__client="b", properties={"delivery_tag": "tb", "body_encoding": "base64"}
        ),
    )
    assert "b" in ids(site.worker().pop(2))


def test_a_client_s_own_jobs_keep_their_order(site: Site) -> None:
    jobs = [site.submit(client="c", prompt_tokens=10 * (1 + i % 3)).id for i in range(10)]
    assert ids(site.worker().pop(10)) == jobs


def test_handing_back_costs_a_client_nothing(site: Site) -> None:
    worker = site.worker()
    for i in range(10):
        site.submit(client="a", job_id=f"a{i}", prompt_tokens=100, max_tokens=1)
    for _ in range(5):
        worker.hand_back(worker.pop(4))
    for i in range(10):
        site.submit(client="b", job_id=f"b{i}", prompt_tokens=100, max_tokens=1)
    order = serve_all(site, worker, lambda _: 101)
    assert Counter(job[0] for job in order[:10]) == {"a": 5, "b": 5}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    jobs=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400)), min_size=1, max_size=40),
    served=st.integers(0, 40),
)
def test_clients_that_wait_never_drift_apart_by_more_than_two_jobs(
    redis_client: redis.Redis, jobs: list[tuple[str, int]], served: int
) -> None:
    """The bound of start-time fair queueing: the largest job of each."""
    redis_client.flushdb()
    site = Site(redis_client)
    sizes = {}
    for i, (client, tokens) in enumerate(jobs):
        job = site.submit(client=client, job_id=f"{client}{i}", prompt_tokens=tokens, max_tokens=1).id
        sizes[job] = tokens + 1
    worker = site.worker()
    left = Counter(client for client, _ in jobs)
    took: Counter[str] = Counter()
    waiting = set(left)
    for _ in range(min(served, len(jobs))):
        (delivery,) = worker.pop(1)
        client = delivery.job_id[0]
        finish(site, delivery, sizes[delivery.job_id])
        took[client] += sizes[delivery.job_id]
        left[client] -= 1
        if not left[client]:
            waiting.discard(client)
        shares = [took[client] for client in waiting]
        if shares:
            assert max(shares) - min(shares) <= 2 * max(sizes.values())
    site.check()
    site.close()


# --- position and wait --------------------------------------------------------------------------


def test_a_position_counts_who_is_served_before(site: Site) -> None:
    for _ in range(5):
        site.submit(Priority.INTERACTIVE, client="x", prompt_tokens=100, max_tokens=1)
        site.submit(client="greedy", prompt_tokens=100, max_tokens=1)
    first = site.submit(client="modest", prompt_tokens=100, max_tokens=1)
    second = site.submit(client="modest", prompt_tokens=100, max_tokens=1)
    assert first.position == 5
    assert second.position == 5 + 1 + 1
    order = ids(site.worker().pop(20))
    assert order.index(first.id) - first.position in (0, 1)
    assert order.index(second.id) - second.position in (0, 1)


def test_a_free_slot_means_no_wait(site: Site) -> None:
    assert site.submit().estimated_wait_s is None, "there is no worker"
    has_slots(site, 4)
    assert site.submit().estimated_wait_s == 0
    site.worker().pop(2)
    assert [site.submit().estimated_wait_s for _ in range(3)] == [0, 0, None]


def test_a_wait_is_what_the_jobs_ahead_take(site: Site) -> None:
    """Two slots, each job 100 tokens and 10 s: a job ends every 5 s."""
    has_slots(site, 2)
    worker = site.worker()
    for _ in range(8):
        site.submit(prompt_tokens=99, max_tokens=1)
    for delivery in worker.pop(2):
        site.redis.hincrby(site.keys.job(delivery.job_id), "leased_ms", -10_000)
        finish(site, delivery, 100)
    worker.pop(2)
    told = site.submit(prompt_tokens=99, max_tokens=1)
    assert told.position == 4
    assert told.estimated_wait_s == pytest.approx(25, rel=0.05)
    assert site.producer.record(told.id).estimated_wait_s == told.estimated_wait_s


def test_a_full_queue_says_when_there_will_be_room(new_site: Callable[..., Site]) -> None:
    site = new_site(max_jobs=1)
    has_slots(site, 1)
    worker = site.worker()
    site.submit(prompt_tokens=99, max_tokens=1)
    (delivery,) = worker.pop(1)
    site.redis.hincrby(site.keys.job(delivery.job_id), "leased_ms", -30_000)
    finish(site, delivery, 100)
    for _ in range(2):
        site.submit(prompt_tokens=99, max_tokens=1)
        worker.pop(1 - len(site.redis.zrange(site.keys.leases, 0, -1)))
    with pytest.raises(QueueFull) as refused:
        site.submit()
    assert refused.value.retry_after == pytest.approx(30, rel=0.05)


# --- looking at urgent levels only --------------------------------------------------------------


def test_a_worker_that_is_full_takes_only_what_is_more_urgent(site: Site) -> None:
    background, normal = site.submit(Priority.BACKGROUND), site.submit(Priority.NORMAL)
    urgent = site.submit(Priority.INTERACTIVE)
    worker = site.worker()
    assert ids(worker.pop(5, above=Priority.NORMAL)) == [urgent.id]
    assert worker.pop(5, above=Priority.NORMAL) == []
    assert ids(worker.pop(5)) == [normal.id, background.id]


def test_what_one_worker_leaves_wakes_another(site: Site) -> None:
    jobs = [site.submit().id for _ in range(3)]
    first, second = site.worker("w1"), site.worker("w2")
    assert ids(first.pop(1)) == jobs[:1]
    assert second.wait(5)
    assert ids(second.pop(5)) == jobs[1:]
    assert not second.wait(0.01)


@pytest.mark.parametrize("client", ["", 7, "a b", "x" * 200])
def test_a_client_s_name_in_a_message_is_checked(site: Site, client: Any) -> None:
    message = raw(headers__client=client)
    site.redis.lpush("wicore", message)
    assert site.worker().pop(1) == []
    assert "headers.client" in site.dead()[0]["reason"]
