"""Dead workers are noticed by their lifelines; live, hung and unsure ones are left to their leases."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from tests.queue_site import Site
from tests.services import follow, running_worker, settings_for, worker_process
from tests.waiting import until
from wicore.exit_codes import ExitCode
from wicore.queue.connection import connect
from wicore.queue.lifeline import DeathWatch
from wicore.queue.producer import Producer
from wicore.queue.registry import Heartbeat, alive_workers
from wicore.request import Event, Priority, parse_job

pytestmark = pytest.mark.valkey
NOBODY = 999_999_999
"""A client id that no connection has."""


def announced(client: redis.Redis, worker: str) -> str | None:
    entry = client.hget("wicore:workers", worker)
    return json.loads(entry)["lifeline"] if entry else None


def forge(client: redis.Redis, worker: str, connection: int = NOBODY, server: str | None = None) -> None:
    """A heartbeat that names any lifeline."""
    server = server or client.info("server")["run_id"]
    client.hset("wicore:workers", worker, json.dumps({"lifeline": f"{server}:{connection}"}))


@pytest.fixture
def watch(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeathWatch]:
    """Of a live worker `me`, which looks whenever it is told."""
    monkeypatch.setattr("wicore.queue.lifeline._APART_S", 0.0)
    heart = Heartbeat(site.redis, "me", dict)
    heart.start()
    until(lambda: announced(site.redis, "me"), "an announcement")
    yield DeathWatch(site.redis, site.scripts, "me", site.keys)
    heart.stop()


def looks(watch: DeathWatch, times: int = 4) -> list[list[str]]:
    return [watch.look() for _ in range(times)]


# --- looking --------------------------------------------------------------------------------------


def test_a_lifeline_gone_at_two_looks_lets_that_worker_s_leases_expire(site: Site, watch: DeathWatch) -> None:
    for owner in ("w1", "w10"):
        site.submit()
        site.worker(owner).pop(1)
    forge(site.redis, "w1")
    assert looks(watch, 3) == [[], ["w1"], []]
    assert site.reap() == [1, 0], "the one of w10 is not touched"
    assert not site.redis.hexists(site.keys.workers, "w1")


def test_a_worker_that_announced_a_new_lifeline_between_two_looks_lives(
    site: Site, watch: DeathWatch
) -> None:
    for connection in range(NOBODY, NOBODY + 4):
        forge(site.redis, "w1", connection)
        assert watch.look() == []


def test_a_worker_that_announces_at_the_last_moment_keeps_its_leases(site: Site) -> None:
    site.submit()
    site.worker("w1").pop(1)
    forge(site.redis, "w1", NOBODY + 1)
    seen_gone = f"{site.redis.info('server')['run_id']}:{NOBODY}"
    assert site.scripts.call("abandon", "w1", seen_gone) is None
    assert site.reap() == [0, 0]
    assert site.redis.hexists(site.keys.workers, "w1")


def test_a_lifeline_of_another_server_says_nothing(site: Site, watch: DeathWatch) -> None:
    forge(site.redis, "w1", server="f" * 40)
    assert looks(watch) == [[], [], [], []]


def test_who_does_not_see_its_own_lifeline_judges_nobody(site: Site, watch: DeathWatch) -> None:
    forge(site.redis, "w1")
    forge(site.redis, "me")
    assert looks(watch) == [[], [], [], []]


def test_an_outage_of_our_own_starts_the_count_anew(site: Site, watch: DeathWatch) -> None:
    forge(site.redis, "w1")
    assert watch.look() == []
    watch.reset()
    assert looks(watch, 2) == [[], ["w1"]]


@pytest.mark.parametrize(
    ("forbidden", "words"),
    [
        ("client", "without a lifeline"),
        ("info", "without a lifeline"),
        ("client|list", "cannot look for dead workers"),
    ],
)
def test_where_the_server_forbids_to_ask_leases_alone_decide(
    site: Site, valkey_url: str, forbidden: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wicore")
    rules = ("on", "nopass", "~*", "&*", "+@all", f"-{forbidden}")
    site.redis.execute_command("ACL", "SETUSER", "limited", *rules)
    client = connect(valkey_url.replace("unix://", "unix://limited:any@"))
    heart = Heartbeat(client, "me", dict, period_s=0.02)
    heart.start()
    try:
        until(lambda: alive_workers(site.redis), "a heartbeat")
        first = alive_workers(site.redis)[0]["at_ms"]
        until(lambda: alive_workers(site.redis)[0]["at_ms"] > first, "another one")
        forge(site.redis, "w1")
        watch = DeathWatch(client, site.scripts, "me", site.keys)
        assert looks(watch) == [[], [], [], []]
    finally:
        heart.stop()
        client.close()
        site.redis.acl_deluser("limited")
    told = [record.levelname for record in caplog.records if words in record.message]
    assert told == ["INFO"]


# --- workers --------------------------------------------------------------------------------------


def submit(client: redis.Redis, tokens: int, job_id: str = "job") -> str:
    body = {"kind": "completion", "prompt": "Once upon", "max_tokens": tokens, "ignore_eos": True}
    return Producer(client).submit(parse_job(body), Priority.NORMAL, job_id=job_id).id


def text(events: list[Event]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "token")


def worker_of(client: redis.Redis, job: str) -> str | None:
    return Producer(client).record(job).worker


def test_a_killed_worker_s_job_goes_on_in_seconds_however_long_the_lease(
    redis_client: redis.Redis, valkey_url: str
) -> None:
    settings = settings_for(valkey_url, engine__kind="null", queue__lease_s=20.0)
    with running_worker(settings, "undisturbed"):
        expected = list(follow(redis_client, submit(redis_client, 300)))
    redis_client.flushall()

    job = submit(redis_client, 300)
    first = worker_process(settings)
    events = follow(redis_client, job)
    seen = [next(events) for _ in range(20)]
    with running_worker(settings, "second"):
        until(lambda: announced(redis_client, "second"), "the second worker")
        first.kill()
        first.wait()
        died = time.monotonic()
        while seen[-1]["type"] != "resumed":
            seen.append(next(events))
        waited = time.monotonic() - died
        seen += events
    assert waited < 4
    assert [event["seq"] for event in seen] == list(range(1, len(seen) + 1))
    assert text(seen) == text(expected)
    assert Producer(redis_client).record(job).attempts == 2


def test_a_worker_whose_lifeline_is_cut_keeps_its_job(redis_client: redis.Redis, valkey_url: str) -> None:
    settings = settings_for(valkey_url, engine__kind="null", queue__lease_s=20.0)
    with running_worker(settings, "one"), running_worker(settings, "other"):
        until(lambda: len(alive_workers(redis_client)) == 2, "two workers")
        job = submit(redis_client, 700)
        until(lambda: worker_of(redis_client, job), "the job running")
        holder = worker_of(redis_client, job)
        assert holder
        cut: list[str | None] = [None]
        while Producer(redis_client).record(job).status in ("queued", "running"):
            until(lambda: announced(redis_client, holder) not in cut, "a new lifeline")
            cut.append(announced(redis_client, holder))
            redis_client.client_kill_filter(_id=str(cut[-1]).rpartition(":")[2])
    record = Producer(redis_client).record(job)
    assert len(cut) > 3
    assert (record.status, record.attempts) == ("succeeded", 1)


def test_a_frozen_worker_is_not_taken_for_dead_but_a_killed_one_is(
    site: Site, watch: DeathWatch, valkey_url: str
) -> None:
    job = submit(site.redis, 3000)
    process = worker_process(settings_for(valkey_url, engine__kind="null", queue__lease_s=20.0))
    try:
        until(lambda: site.last_seq(job) > 5, "tokens")
        process.send_signal(signal.SIGSTOP)
        assert looks(watch) == [[], [], [], []]
    finally:
        process.kill()
        process.wait()
    until(lambda: watch.look() == [worker_of(site.redis, job)], "its death noticed")
    assert site.reap() == [1, 0]


def test_a_worker_whose_engine_hangs_ends_with_its_stacks_for_a_new_one(
    redis_client: redis.Redis, valkey_url: str, new_site: Callable[..., Any]
) -> None:
    settings = settings_for(valkey_url, engine__kind="null", queue__lease_s=0.5, queue__stall_s=1.0)
    job = submit(redis_client, 20)
    process = worker_process(settings, "tests.hanging_worker", stderr=subprocess.PIPE)
    _, told = process.communicate(timeout=30)
    assert process.returncode == ExitCode.STALLED
    assert "the engine has been in one step for 2 s" in told.decode()
    assert 'hanging_worker.py", line' in told.decode()
    assert "most recent call first" in told.decode()
    with running_worker(settings, "new"):
        assert list(follow(redis_client, job))[-1]["type"] == "done"
    assert Producer(redis_client).record(job).attempts == 2
    new_site().check()
