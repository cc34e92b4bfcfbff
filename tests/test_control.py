"""Remote control of a worker: cancels within a step, and Celery's `inspect` and `control`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import celery
import kombu.pools
import pytest
import redis

from tests.services import ROOT, follow, running_worker, settings_for
from tests.waiting import until
from wicore.config import Settings
from wicore.engine.base import Engine, PendingStep, StepPlan, StepResult, WhenAsked
from wicore.engine.factory import create_engine
from wicore.errors import ConfigError
from wicore.model import load_model
from wicore.queue.celery_url import celery_url
from wicore.queue.producer import Producer
from wicore.request import Priority, parse_job
from wicore.stream.relay import read_log
from workers.worker import Worker

pytestmark = pytest.mark.valkey
PATIENCE_S = 20.0


class Watched:
    """An engine that notes what each step holds and calls back in the middle of it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.steps: list[int] = []
        """Tokens computed by each step."""
        self.during: Callable[[int], None] = lambda number: None
        """Called within a step, with how many there were before."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def start(self, plan: StepPlan) -> PendingStep:
        return WhenAsked(partial(self._step, plan))

    def _step(self, plan: StepPlan) -> StepResult:
        number = len(self.steps)
        self.steps.append(sum(len(sequence.tokens) for sequence in plan.sequences))
        self.during(number)
        return self._engine.step(plan)


@pytest.fixture
def settings(valkey_url: str) -> Settings:
    # Leases so long that no renewal brings a cancel within a test.
    return settings_for(valkey_url, queue__lease_s=600.0)


@pytest.fixture
def engine(settings: Settings) -> Watched:
    return Watched(create_engine(settings, load_model(settings)))


@contextmanager
def controlled(client: redis.Redis, settings: Settings, engine: Engine | None = None) -> Iterator[Worker]:
    """A worker that listens; no earlier one does any more."""
    until(lambda: client.pubsub_numpat() == 0)
    with running_worker(settings, "controlled", engine) as running:
        until(lambda: is_listening(client))
        yield running


@pytest.fixture
def worker(redis_client: redis.Redis, settings: Settings, engine: Watched) -> Iterator[Worker]:
    with controlled(redis_client, settings, engine) as running:
        yield running


@pytest.fixture
def producer(redis_client: redis.Redis) -> Producer:
    return Producer(redis_client)


@contextmanager
def celery_client(valkey_url: str) -> Iterator[celery.Celery]:
    """A Celery client that knows nothing of WiCore, only where Redis is."""
    url = celery_url(valkey_url).url
    app = celery.Celery("client", broker=url, backend=url, set_as_current=False)
    yield app
    app.backend.client.connection_pool.disconnect()
    app.close()
    kombu.pools.reset()


@pytest.fixture
def app(valkey_url: str) -> Iterator[celery.Celery]:
    with celery_client(valkey_url) as client:
        yield client


def submit(producer: Producer, prompt: str | list[int] = "Once", **fields: object) -> str:
    body = {"kind": "completion", "prompt": prompt, "max_tokens": 3000, "ignore_eos": True, **fields}
    return producer.submit(parse_job(body), Priority.NORMAL).id


def is_listening(client: redis.Redis) -> bool:
    return client.pubsub_numsub("wicore:control")[0][1] > 0 and client.pubsub_numpat() > 0


@pytest.mark.parametrize(
    ("prompt", "at"),
    [("Once", 40), ([5] * 3000, 2)],
    ids=["while decoding", "while prefilling a long prompt"],
)
def test_a_cancelled_job_is_in_no_further_step(
    worker: Worker,
    engine: Watched,
    redis_client: redis.Redis,
    producer: Producer,
    prompt: str | list[int],
    at: int,
) -> None:
    submitted = threading.Event()
    jobs: list[str] = []

    def cancel(number: int) -> None:
        if number == at:
            assert submitted.wait(PATIENCE_S)
            producer.cancel(jobs[0])
            # The engine thread is in this step, so what is heard waits for its end.
            until(lambda: not worker._inbox.empty())

    engine.during = cancel
    jobs.append(submit(producer, prompt, max_tokens=100))
    submitted.set()
    until(lambda: producer.record(jobs[0]).finished_ms)
    last = read_log(redis_client, jobs[0])[-1]
    assert last["type"] == "cancelled"
    assert len(engine.steps) == at + 1
    if at == 2:
        assert last["usage"]["completion_tokens"] == 0
        assert sum(engine.steps) < 3000
    until(lambda: not worker.jobs()[0])
    assert worker.status()["running"] == 0
    # All slots and blocks are free again: a job that needs nearly all of the pool runs.
    again = submit(producer, [5] * 3900, max_tokens=2)
    assert list(follow(redis_client, again))[-1]["type"] == "done"


def test_celery_sees_the_worker_and_its_jobs(
    worker: Worker, app: celery.Celery, redis_client: redis.Redis, producer: Producer
) -> None:
    job = submit(producer)
    until(lambda: worker.jobs()[0])
    node = "wicore@controlled"
    inspect = app.control.inspect([node], timeout=PATIENCE_S)
    assert inspect.ping() == {node: {"ok": "pong"}}
    ((task,),) = inspect.active().values()
    assert (task["id"], task["name"], task["hostname"]) == (job, "wicore.generate", node)
    assert "Once" not in str(task)
    assert inspect.query_task(job, "other")[node] == {job: ["active", task]}
    assert inspect.reserved() == inspect.scheduled() == inspect.revoked() == {node: []}
    assert inspect.registered() == {node: ["wicore.generate"]}
    assert [queue["name"] for queue in inspect.active_queues()[node]] == ["wicore"]
    stats = inspect.stats()[node]
    assert (stats["pid"], stats["total"], stats["pool"]["max-concurrency"]) == (
        os.getpid(),
        {"wicore.generate": 1},
        16,
    )
    assert inspect.conf()[node]["queue.lease_s"] == 600.0
    assert "model:tiny" in inspect.report()[node]["ok"]
    producer.cancel(job)
    assert list(follow(redis_client, job))[-1]["type"] == "cancelled"


def test_celery_revokes_running_waiting_and_coming_jobs(
    worker: Worker, app: celery.Celery, redis_client: redis.Redis, producer: Producer
) -> None:
    running = submit(producer)
    until(lambda: worker.jobs()[0])
    replies = app.control.revoke([running, "to-come"], reply=True, terminate=True, timeout=1)
    assert "flagged as revoked" in replies[0]["wicore@controlled"]["ok"]
    assert list(follow(redis_client, running))[-1]["type"] == "cancelled"
    assert app.AsyncResult(running).status == "REVOKED"
    producer.submit(parse_job({"kind": "completion", "prompt": "x"}), Priority.NORMAL, job_id="to-come")
    assert list(follow(redis_client, "to-come"))[-1]["type"] == "cancelled"


def test_celery_stops_a_worker_which_hands_back_its_jobs(
    redis_client: redis.Redis, valkey_url: str, app: celery.Celery, producer: Producer
) -> None:
    with controlled(redis_client, settings_for(valkey_url, queue__drain_s=0.0)) as worker:
        job = submit(producer)
        until(lambda: worker.jobs()[0])
        app.control.shutdown()
        until(lambda: producer.record(job).status == "queued")
    assert producer.record(job).attempts == 0


def test_the_celery_command_line_reaches_the_worker(
    worker: Worker, redis_client: redis.Redis, valkey_url: str
) -> None:
    command = [sys.executable, "-m", "celery", "-b", celery_url(valkey_url).url, "inspect", "ping"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, "wicore@controlled: OK" in done.stdout) == (0, True), done
    assert "pong" in done.stdout


def test_an_unknown_command_is_answered_and_a_broken_one_costs_nothing(
    worker: Worker, app: celery.Celery, redis_client: redis.Redis
) -> None:
    (reply,) = app.control.broadcast("pool_grow", reply=True, timeout=PATIENCE_S, limit=1)
    assert "no such command" in reply["wicore@controlled"]["error"]
    redis_client.publish("wicore:control", b"\xff{")
    redis_client.publish("wicore:control", b'{"type": "cancel"}')
    with app.connection_for_write() as connection:
        publisher = app.amqp.Producer(connection)
        publisher.publish(["nonsense"], exchange="celery.pidbox", serializer="json")
        publisher.publish({"method": "ping", "more": 1}, exchange="celery.pidbox", serializer="json")
    assert app.control.inspect(["wicore@controlled"], timeout=PATIENCE_S).ping() is not None
    job = submit(Producer(redis_client))
    until(lambda: worker.jobs()[0])
    Producer(redis_client).cancel(job)
    assert list(follow(redis_client, job))[-1]["type"] == "cancelled"


def test_remote_control_takes_no_message_and_comes_back_after_an_outage(
    worker: Worker, valkey_url: str, redis_client: redis.Redis
) -> None:
    with celery_client(valkey_url) as app:
        app.send_task("someone.elses", queue="theirs")
    redis_client.client_kill_filter(_type="pubsub")
    redis_client.client_kill_filter(_type="normal", skipme=True)
    until(lambda: is_listening(redis_client))
    with celery_client(valkey_url) as app:
        assert app.control.inspect(["wicore@controlled"], timeout=PATIENCE_S).ping() is not None
    assert redis_client.llen("theirs") == 1


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("redis://host", "redis://host/0"),
        ("redis://me:p%40w@host:7/2", "redis://me:p%40w@host:7/2"),
        ("redis://host/1?db=3", "redis://host/3"),
        ("rediss://host:7/2", "rediss://host:7/2?ssl_cert_reqs=required"),
        ("rediss://host?ssl_cert_reqs=none", "rediss://host/0?ssl_cert_reqs=none"),
        ("unix:///run/redis.sock", "redis+socket:///run/redis.sock"),
        ("unix://me:pw@/run/redis.sock?db=4", "redis+socket://me:pw@/run/redis.sock?virtual_host=4"),
    ],
)
def test_celery_is_told_where_redis_is(url: str, wanted: str) -> None:
    assert celery_url(url).url == wanted


def test_celery_is_told_of_sentinels() -> None:
    told = celery_url("sentinel://me:p%40w@a,b:7/main?db=2&sentinel_password=x")
    assert told.url == "sentinel://me:p%40w@a:26379/2;sentinel://me:p%40w@b:7/2"
    assert told.options == {"master_name": "main", "sentinel_kwargs": {"password": "x"}}


def test_a_scheme_that_celery_cannot_use_is_refused() -> None:
    with pytest.raises(ConfigError, match="ftp"):
        celery_url("ftp://host")
