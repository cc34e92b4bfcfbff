"""Celery clients: they submit, wait, get results and errors with no WiCore code on their side."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import celery
import pytest
import redis
from celery.exceptions import TaskRevokedError

from tests.queue_site import RESULT, Site
from wicore.errors import EngineError, WorkerLost
from wicore.queue.embedded import EmbeddedValkey
from wicore.request import Priority

pytestmark = pytest.mark.valkey
KWARGS = {"kind": "completion", "prompt": "Once"}


@pytest.fixture
def app(redis_client: redis.Redis, valkey_server: EmbeddedValkey) -> Iterator[celery.Celery]:
    path = redis_client.connection_pool.connection_kwargs["path"]
    app = celery.Celery(
        "client",
        broker=f"redis+socket://{path}",
        backend=f"redis+socket://{path}",
        set_as_current=False,
    )
    app.conf.update(
        task_default_queue="wicore",
        task_default_priority=3,
        broker_transport_options={"queue_order_strategy": "priority", "socket_timeout": 5},
    )
    yield app
    # Celery leaves its sockets to the end of the process.
    app.backend.result_consumer.stop()
    app.backend.result_consumer._pubsub = None
    app.backend.client.connection_pool.disconnect()
    app.close()


def send(app: celery.Celery, **options: Any) -> Any:
    return app.send_task("wicore.generate", kwargs=KWARGS, task_id=str(uuid.uuid4()), **options)


@pytest.mark.parametrize("level", Priority)
def test_a_task_sent_by_celery_is_a_job_of_its_priority(
    app: celery.Celery, site: Site, level: Priority
) -> None:
    sent = send(app, priority=int(level), expires=60)
    (delivery,) = site.worker().pop(2)
    assert (delivery.job_id, delivery.level, delivery.body.prompt) == (sent.id, level, "Once")
    start_by = int(site.redis.hget(site.keys.job(sent.id), "start_by_ms"))
    assert 50_000 < start_by - delivery.popped_ms <= 61_000
    assert delivery.deadline_ms is None, "what has started in time may finish"
    site.finish(delivery)


def test_celery_gets_the_result(app: celery.Celery, site: Site) -> None:
    sent = send(app)
    (delivery,) = site.worker().pop(1)
    site.start(delivery)
    site.finish(delivery)
    assert sent.get(timeout=5) == RESULT
    assert sent.status == "SUCCESS"
    record = site.producer.record(sent.id)
    assert record.finished_ms is not None
    assert round(sent.date_done.timestamp() * 1000) == record.finished_ms


def test_celery_gets_the_error_of_a_failed_job(app: celery.Celery, site: Site) -> None:
    sent = send(app)
    (delivery,) = site.worker().pop(1)
    site.finish(delivery, "failed", error=EngineError("the device is gone").body())
    with pytest.raises(EngineError, match="the device is gone"):
        sent.get(timeout=5)


def test_celery_hears_of_a_job_that_lost_its_workers(app: celery.Celery, site: Site) -> None:
    sent = send(app)
    for attempt in range(3):
        assert site.worker(f"w{attempt}").pop(1)
        site.lose_workers()
    with pytest.raises(WorkerLost, match="3 attempts"):
        sent.get(timeout=5)


def test_celery_hears_of_a_cancelled_job(app: celery.Celery, site: Site) -> None:
    sent = send(app)
    worker = site.worker()
    (delivery,) = worker.pop(1)
    site.producer.cancel(sent.id)
    site.finish(delivery, "cancelled")
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=5)
    assert sent.status == "REVOKED"


def test_celery_hears_what_was_wrong_with_its_arguments(app: celery.Celery, site: Site) -> None:
    sent = app.send_task("wicore.generate", kwargs={**KWARGS, "temperature": 9})
    assert site.worker().pop(1) == []
    with pytest.raises(Exception, match="temperature"):
        sent.get(timeout=5)
