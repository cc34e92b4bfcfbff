"""The Celery tasks, in a process of their own as `wicore up` runs it, and at the hand of a client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import celery
import kombu.pools
import pytest
import redis

from tests.queue_site import Site
from tests.receiver import Receiver, receiver
from tests.services import ROOT, running_worker, settings_for, tasks_process
from tests.test_webhooks import SECRET, ended, is_owed, make_due, record
from tests.waiting import until
from wicore.config import Settings
from wicore.errors import InvalidRequest, TooLarge, UnknownModel
from wicore.exit_codes import ExitCode
from wicore.queue.celery_url import celery_url
from wicore.request import Priority
from workers.tasks import create_app

pytestmark = [
    pytest.mark.valkey,
    # Celery's result backend, where a task runs in this process.
    pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning"),
]
PATIENCE_S = 15.0
KWARGS = {"kind": "completion", "prompt": "Once upon a time", "max_tokens": 4}


@pytest.fixture
def settings(valkey_url: str) -> Settings:
    return settings_for(
        valkey_url, webhooks__secret=SECRET, webhooks__allow_private=True, webhooks__retry_s=0.1
    )


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as there:
        yield there


@contextmanager
def tasks(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """A running tasks process; stopped in good order, unless the test ended it."""
    process = tasks_process(settings)
    try:
        yield process
        if process.poll() is None:
            process.terminate()
            assert process.wait(PATIENCE_S) == ExitCode.OK
    finally:
        process.kill()
        process.wait()


@contextmanager
def closing(app: celery.Celery) -> Iterator[celery.Celery]:
    yield app
    # Celery leaves its sockets to the end of the process.
    if app.backend.result_consumer._pubsub is not None:
        app.backend.result_consumer.stop()
        app.backend.result_consumer._pubsub = None
    app.backend.client.connection_pool.disconnect()
    app.close()
    kombu.pools.reset()


@pytest.fixture
def client(valkey_url: str) -> Iterator[celery.Celery]:
    """A Celery client that knows nothing of WiCore."""
    url = celery_url(valkey_url).url
    app = celery.Celery("client", broker=url, backend=url, set_as_current=False)
    app.conf.update(task_default_queue="wicore-tasks", task_default_priority=3)
    with closing(app):
        yield app


@pytest.fixture
def here(redis_client: redis.Redis, settings: Settings) -> Iterator[celery.Celery]:
    """The app itself, whose tasks a test runs in its own process."""
    with closing(create_app(settings)) as app:
        yield app


# --- webhooks -----------------------------------------------------------------------------------


def test_a_webhook_comes_at_once_and_again_until_it_is_taken(
    site: Site, settings: Settings, hook: Receiver, client: celery.Celery
) -> None:
    with tasks(settings):
        until(lambda: client.control.inspect(timeout=0.2).ping())
        hook.answers = [(500, {}), (500, {})]
        finished = time.monotonic()
        job = ended(site, hook.url)
        first = hook.next()
        # Promptly: by the message, as the schedule comes every ten seconds.
        assert time.monotonic() - finished < 5
        assert [hook.next().body for _ in range(2)] == [first.body] * 2
        until(lambda: record(site, job).webhook_status == "delivered")
    assert not is_owed(site, job)


def test_a_webhook_survives_the_death_of_its_sender(site: Site, settings: Settings, hook: Receiver) -> None:
    job = ended(site, hook.url)
    hook.may_answer.clear()
    with tasks(settings) as sender:
        first = hook.next()
        sender.kill()
        sender.wait()
    hook.may_answer.set()
    assert is_owed(site, job)
    make_due(site, job)  # as it is when the claim has run out
    with tasks(settings):
        second = hook.next()
        until(lambda: record(site, job).webhook_status == "delivered")
    assert (second.headers["webhook-id"], second.body) == (first.headers["webhook-id"], first.body)


def test_a_webhook_whose_message_was_lost_is_sent_by_the_schedule(
    site: Site, settings: Settings, hook: Receiver
) -> None:
    job = ended(site, hook.url)
    site.redis.delete(site.keys.tasks)
    make_due(site, job)
    with tasks(settings):
        hook.next()
        until(lambda: not is_owed(site, job))


def test_webhooks_go_on_when_redis_is_back(
    site: Site, settings: Settings, hook: Receiver, client: celery.Celery
) -> None:
    with tasks(settings):
        until(lambda: client.control.inspect(timeout=0.2).ping())
        for kind in ("pubsub", "normal"):
            site.redis.client_kill_filter(_type=kind, skipme=True)
        job = ended(site, hook.url)
        hook.next()
        until(lambda: not is_owed(site, job))


def test_a_stopped_process_finishes_what_it_has_begun(site: Site, settings: Settings, hook: Receiver) -> None:
    hook.may_answer.clear()
    job = ended(site, hook.url)
    with tasks(settings) as process:
        hook.next()
        process.terminate()
        hook.may_answer.set()
        assert process.wait(PATIENCE_S) == ExitCode.OK
    assert record(site, job).webhook_status == "delivered"


# --- upkeep -------------------------------------------------------------------------------------


def test_results_expire_with_no_worker_running(
    new_site: Callable[..., Site], here: celery.Celery, settings: Settings
) -> None:
    site = new_site()
    jobs = [site.submit().id for _ in range(250)]
    for job in jobs:
        site.producer.cancel(job)
    assert not site.worker().pop(1)  # takes the messages of the cancelled jobs away
    for job in jobs:  # as after a day
        site.redis.zadd(site.keys.finished, {job: 1}, xx=True)
        site.redis.delete(site.keys.job(job), site.keys.log(job), site.keys.celery_result(job))
    expire = here.tasks["wicore.expire_results"]
    expire.apply().get()
    assert len(site.jobs()) == 250, "Redis has not been there steadily for a lease"
    site.redis.set(site.keys.steady, 1)
    expire.apply().get()
    assert site.jobs() == []
    assert site.redis.zcard(site.keys.finished) == 0


def test_sweeps_without_a_gap_are_what_makes_redis_steady(site: Site, here: celery.Celery) -> None:
    sweep = here.tasks["wicore.sweep_webhooks"]
    sweep.apply().get()
    since = site.redis.get(site.keys.steady)
    sweep.apply().get()
    assert site.redis.get(site.keys.steady) == since
    assert 0 < site.redis.ttl(site.keys.steady) <= 15


def test_the_sweep_adds_nothing_to_a_queue_that_is_long(site: Site, here: celery.Celery) -> None:
    job = ended(site, "https://there.example")
    make_due(site, job)
    site.redis.rpush(site.keys.tasks, *["x"] * 99)
    assert here.tasks["wicore.sweep_webhooks"].apply().get() == 0
    site.redis.delete(site.keys.tasks)
    assert here.tasks["wicore.sweep_webhooks"].apply().get() == 1
    (message,) = site.redis.lrange(site.keys.tasks, 0, -1)
    assert json.loads(message)["headers"]["task"] == "wicore.deliver_webhook"


# --- preparing ----------------------------------------------------------------------------------


def test_a_prepared_job_runs_under_the_tasks_id(
    site: Site, settings: Settings, client: celery.Celery
) -> None:
    with tasks(settings):
        sent = client.send_task("wicore.prepare", kwargs=KWARGS, task_id=str(uuid.uuid4()), priority=6)
        info = until(lambda: sent.info)
        assert (sent.state, info["id"], info["status"]) == ("PREPARED", sent.id, "queued")
        assert (record(site, sent.id).priority, record(site, sent.id).prompt_tokens) == (
            Priority.BATCH,
            info["prompt_tokens"],
        )
        with running_worker(settings):
            result = sent.get(timeout=PATIENCE_S)
        assert result == record(site, sent.id).result
        assert result["usage"]["prompt_tokens"] == info["prompt_tokens"]


def test_preparing_twice_gives_one_job_and_never_hides_its_end(site: Site, here: celery.Celery) -> None:
    prepare = here.tasks["wicore.prepare"]
    first = prepare.apply(kwargs=KWARGS, task_id="j1").get()
    assert first["status"] == "queued"
    site.producer.cancel("j1")
    assert prepare.apply(kwargs=KWARGS, task_id="j1").get() == {**first, "status": "cancelled"}
    assert json.loads(site.redis.get(site.keys.celery_result("j1")))["status"] == "REVOKED"
    assert site.jobs() == ["j1"]


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"temperature": 9}, InvalidRequest, "temperature"),
        ({"task": 1}, InvalidRequest, "task"),
        ({"model": "gpt-4"}, UnknownModel, "model"),
        ({"max_tokens": 100_000}, TooLarge, "max_tokens"),
        ({"n": 16, "webhook_url": "ftp://x"}, InvalidRequest, "webhook_url"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_refused_is_raised_by_name(
    site: Site, here: celery.Celery, changes: dict[str, Any], error: type[Exception], param: str
) -> None:
    with pytest.raises(error, match=param):
        here.tasks["wicore.prepare"].apply(kwargs={**KWARGS, **changes}).get()
    assert site.jobs() == []


def test_a_client_hears_why_its_job_was_refused(
    site: Site, settings: Settings, client: celery.Celery
) -> None:
    with tasks(settings):
        sent = client.send_task("wicore.prepare", kwargs={**KWARGS, "max_tokens": 100_000})
        with pytest.raises(TooLarge, match="over the context"):
            sent.get(timeout=PATIENCE_S)


@pytest.mark.parametrize(
    ("priority", "level"),
    [
        (0, Priority.INTERACTIVE),
        (2, Priority.INTERACTIVE),
        (3, Priority.NORMAL),
        (8, Priority.BATCH),
        (9, Priority.BACKGROUND),
        (None, Priority.NORMAL),
    ],
)
def test_the_messages_priority_is_the_jobs(
    site: Site, here: celery.Celery, priority: int | None, level: Priority
) -> None:
    prepare = here.tasks["wicore.prepare"]
    prepare.apply(kwargs=KWARGS, task_id="j1", priority=priority).get()
    assert record(site, "j1").priority == level


# --- the process --------------------------------------------------------------------------------


def test_revoking_a_running_job_does_not_end_it_for_its_client_before_it_ends(
    site: Site, settings: Settings, client: celery.Celery
) -> None:
    job = site.submit().id
    (delivery,) = site.worker().pop(1)
    site.start(delivery)
    with tasks(settings):
        (reply,) = until(lambda: client.control.revoke([job], reply=True, timeout=0.5))
        assert "flagged as revoked" in next(iter(reply.values()))["ok"]
        assert site.producer.record(job).cancel_requested
        assert client.AsyncResult(job).status == "PENDING"
    site.finish(delivery, "cancelled")
    assert client.AsyncResult(job).status == "REVOKED"


def test_it_runs_by_celerys_own_command(redis_client: redis.Redis, settings: Settings) -> None:
    env = {**os.environ, "WICORE_REDIS__URL": settings.redis.url or "", "WICORE_WEBHOOKS__SECRET": SECRET}
    command = [sys.executable, "-m", "celery", "-A", "workers.tasks", "worker", "-l", "info"]
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        overdue = threading.Timer(PATIENCE_S, process.kill)
        overdue.start()
        told = []
        for line in process.stdout:
            told.append(line)
            if "ready." in line:
                process.send_signal(signal.SIGTERM)
        overdue.cancel()
    assert process.returncode == 0, "".join(told)
    assert "wicore-tasks" in "".join(told)
    assert "8 (thread)" in "".join(told)


def test_without_a_redis_url_it_says_which_setting_is_missing() -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("WICORE_")}
    done = subprocess.run(
        [sys.executable, "-m", "workers.tasks"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr[:16]) == (ExitCode.CONFIG, "error: redis.url")
