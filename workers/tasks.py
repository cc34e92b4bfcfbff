"""The Celery app for what is neither generating nor answering: webhooks, batches, upkeep, long preparations.

`python -m workers.tasks`, or `celery -A workers.tasks worker`, takes the queue `wicore-tasks` and runs the
schedule below in a thread of its own; any number of them may run. Stock Kombu can lose a message when its
process is killed, so nothing here relies on one: webhooks are owed in Redis until they end, and the schedule
finds what is overdue; batches need no messages (batches.py).

SIGTERM: take no more tasks, finish those that run, exit 0.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys
import threading
import warnings
from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from typing import Any

from celery import Celery, Task, bootsteps, signals
from celery.beat import EmbeddedService, Scheduler
from celery.platforms import SecurityWarning
from celery.worker.control import control_command

from wicore.admission import admit
from wicore.batches.runner import Runner
from wicore.config import Settings, load_settings
from wicore.errors import ConfigError, Unavailable, WicoreError
from wicore.exit_codes import exit_code
from wicore.model import Model, load_model
from wicore.queue.celery_url import celery_url
from wicore.queue.connection import connect, unavailable_on_failure
from wicore.queue.producer import Producer
from wicore.queue.registry import alive_workers
from wicore.queue.schema import Keys
from wicore.queue.scripts import WEBHOOK_TASK, Scripts
from wicore.request import Priority, parse_job
from wicore.webhooks.outbox import Outbox
from workers.batches import BatchThread
from workers.panel import revoke

log = logging.getLogger("wicore.tasks")

SWEEP_S, EXPIRE_S = 10.0, 60.0
_STEADY_S = 15
"""Sweeps further apart than this are no longer steady: Redis, or everything, was away in between."""
_MANY = 100
_SOON_S = 60.0
"""A webhook's next attempt that is nearer than this is sent at once, to be held here; others are swept."""
_THREADS = 8
PREPARED = "PREPARED"
"""Celery's state of a `wicore.prepare` whose job waits or runs; its meta is what the task returned."""


class Context:
    """What the tasks work with. The model is described only when a task needs it."""

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError without redis.url."""
        if settings.redis.url is None:
            raise ConfigError(
                "redis.url: not set; set WICORE_REDIS__URL, or run the whole service by `wicore up`",
                param="redis.url",
            )
        prefix = settings.redis.prefix
        self.url = settings.redis.url
        self.settings = settings
        self.keys = Keys(prefix)
        self.redis = connect(self.url)
        self.scripts = Scripts(self.redis, self.keys, settings.queue)
        self.producer = Producer(self.redis, prefix, settings.queue)
        self.outbox = Outbox(self.redis, prefix, settings.queue, settings.webhooks)
        self._loading = threading.Lock()

    @property
    def model(self) -> Model:
        """Raises CheckpointError."""
        with self._loading:
            return self._model

    @cached_property
    def _model(self) -> Model:
        return load_model(self.settings)


def create_app(settings: Settings) -> Celery:
    """The Celery app of these settings; it connects with its first use. Raises ConfigError."""
    context = Context(settings)
    broker = celery_url(context.url)
    app = Celery("wicore", broker=broker.url, backend=broker.url, set_as_current=False)
    app.conf.update(_configuration(context, broker.options))
    app.steps["worker"].add(Schedule)
    app.steps["worker"].add(_batches_step(context))
    _add_upkeep(app, context)
    _add_prepare(app, context)
    _answer_revokes(context)
    return app


def _configuration(context: Context, options: dict[str, Any]) -> dict[str, Any]:
    queue = context.keys.tasks
    timeouts = {"socket_timeout": 10.0, "socket_connect_timeout": 5.0, "socket_keepalive": True}
    # By default these keys are one set a database, and any other app's worker restores what is in them.
    unacked = {f"{name}_key": f"{queue}:{name}" for name in ("unacked", "unacked_index", "unacked_mutex")}
    return {
        "accept_content": ["json"],
        "beat_schedule": {
            "sweep": {"task": "wicore.sweep_webhooks", "schedule": SWEEP_S, "options": {"expires": SWEEP_S}},
            "expire": {
                "task": "wicore.expire_results",
                "schedule": EXPIRE_S,
                "options": {"expires": EXPIRE_S},
            },
        },
        "broker_connection_max_retries": None,
        "broker_connection_retry_on_startup": True,
        "broker_transport_options": {
            **timeouts,
            **unacked,
            "queue_order_strategy": "priority",
            "visibility_timeout": 600,
            **options,
        },
        "result_backend_transport_options": {"socket_timeout": 10.0, **options},
        "result_expires": context.settings.queue.retention_s,
        "task_acks_late": True,
        "task_default_priority": int(Priority.NORMAL),
        "task_default_queue": queue,
        "task_ignore_result": True,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_concurrency": _THREADS,
        "worker_pool": "threads",
        "worker_prefetch_multiplier": 1,
    }


class Schedule(bootsteps.StartStopStep):
    """Celery's beat as a thread of the worker, its schedule in memory alone."""

    requires = ("celery.worker.components:Pool",)

    def create(self, worker: Any) -> Any:
        return EmbeddedService(worker.app, thread=True, scheduler_cls=Scheduler)


def _batches_step(context: Context) -> type[bootsteps.StartStopStep]:
    """The batch runner as a part of the Celery worker: started and stopped with it."""

    class BatchesStep(bootsteps.StartStopStep):
        requires = ("celery.worker.components:Pool",)

        def create(self, worker: Any) -> Any:
            return BatchThread(Runner(context.redis, context.settings, lambda: context.model))

    return BatchesStep


def _add_upkeep(app: Celery, context: Context) -> None:
    keys, client = context.keys, context.redis

    @app.task(name=WEBHOOK_TASK, shared=False)
    def deliver_webhook(job_id: str) -> None:
        """Try to deliver the webhook of a job, if it is due."""
        wait_s = context.outbox.deliver(job_id)
        if wait_s is not None and wait_s <= _SOON_S:
            deliver_webhook.apply_async((job_id,), countdown=wait_s, priority=0)

    @app.task(name="wicore.sweep_webhooks", shared=False)
    def sweep_webhooks() -> int:
        """Send `deliver_webhook` for webhooks that are overdue; how many."""
        _note_steady(context)
        with unavailable_on_failure(client):
            waiting = client.llen(keys.tasks)
        overdue = context.outbox.overdue(_MANY) if waiting < _MANY else []
        for job_id in overdue:
            deliver_webhook.apply_async((job_id,), priority=0)
        return len(overdue)

    @app.task(name="wicore.expire_results", shared=False)
    def expire_results() -> None:
        """Sweep until nothing is left; nothing when Redis has not been steadily there for a lease.

        After an outage the workers' leases have run out although they live: they renew them first.
        """
        with unavailable_on_failure(client):
            since = client.get(keys.steady)
            if since is None or _now_ms(context) - int(since) < context.settings.queue.lease_s * 1000:
                return
            while any(context.scripts.call("reap")) or _forgettable(context):
                pass
        alive_workers(client, keys.prefix)  # forgets those that died long ago

    @signals.worker_ready.connect(weak=False)
    def sweep_now(sender: Any, **_: Any) -> None:
        if sender.app is app:
            sweep_webhooks.apply_async(expires=SWEEP_S)


def _note_steady(context: Context) -> None:
    with unavailable_on_failure(context.redis):
        context.redis.set(context.keys.steady, _now_ms(context), nx=True)
        context.redis.expire(context.keys.steady, _STEADY_S)


def _forgettable(context: Context) -> bool:
    before = _now_ms(context) - context.settings.queue.retention_s * 1000
    return bool(context.redis.zcount(context.keys.finished, "-inf", before))


def _now_ms(context: Context) -> int:
    seconds, micros = context.redis.time()
    return seconds * 1000 + micros // 1000


def _add_prepare(app: Celery, context: Context) -> None:
    settings = context.settings

    @app.task(
        name="wicore.prepare",
        bind=True,
        shared=False,
        store_errors_even_if_ignored=True,
        throws=(WicoreError,),
        autoretry_for=(Unavailable,),
        retry_backoff=True,
        max_retries=8,
    )
    def prepare(task: Task, /, **fields: Any) -> dict[str, Any]:
        """Check and tokenise a job, then put it on the queue under the task's id.

        Returns its id, status and prompt_tokens. Idempotent. `AsyncResult(id)` is in state PREPARED, with
        that as `info`, until the job ends, and then has the job's result, as that of `wicore.generate`.
        """
        body = parse_job(fields)
        prompt = admit(body, context.model, settings)
        level = _level_of(task.request.delivery_info) if body.priority is None else body.priority
        tokens = len(prompt.token_ids)
        job = context.producer.submit(
            body, level, job_id=task.request.id, prompt_tokens=tokens, max_tokens=prompt.max_tokens
        )
        answer = {"id": job.id, "status": job.status, "prompt_tokens": tokens}
        _store_prepared(context, answer)
        return answer


def _level_of(delivery: dict[str, Any] | None) -> Priority:
    """The queue level of a message's priority, as Kombu rounds it: down."""
    priority = (delivery or {}).get("priority")
    if priority is None:
        return Priority.NORMAL
    levels = sorted(Priority)
    return levels[max(0, bisect_right(levels, priority) - 1)]


def _store_prepared(context: Context, answer: dict[str, Any]) -> None:
    """Never in place of the job's end, which has the same key and may have come already."""
    meta = {"status": PREPARED, "result": answer, "traceback": None, "children": [], "task_id": answer["id"]}
    key = context.keys.celery_result(answer["id"])
    with unavailable_on_failure(context.redis):
        context.redis.set(key, json.dumps(meta), nx=True, ex=7 * 86_400)


def _answer_revokes(context: Context) -> None:
    """A revoked id is a job's: cancel it. Celery's own command would write its result before it has ended."""

    def cancel(state: Any, task_id: Any, **_: Any) -> dict[str, str]:
        return revoke(context.producer, task_id)

    control_command(name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")(cancel)
    control_command(
        name="terminate", args=[("signal", str)], variadic="task_id", signature="<signal> [id1 [... [idN]]]"
    )(cancel)


def __getattr__(name: str) -> Celery:
    """`app`, for `celery -A workers.tasks`: importing this module needs no settings."""
    if name != "app":
        raise AttributeError(name)
    return create_app(load_settings())


def main() -> int:
    try:
        settings = load_settings()
        app = create_app(settings)
    except WicoreError as err:
        print(f"error: {err.message}", file=sys.stderr)
        return exit_code(err)
    # As root Celery warns of pickle; only JSON is accepted here.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    _log_as_the_others(settings.telemetry.log_level.upper())
    # Celery sets its own handlers when it has started; told to stop before, there is nothing to finish.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    worker = app.Worker(
        hostname=f"wicore-tasks@{socket.gethostname()}",
        quiet=True,
        without_mingle=True,
        without_gossip=True,
        without_heartbeat=True,
    )
    worker.start()
    return int(worker.exitcode or 0)


def _log_as_the_others(level: str) -> None:
    setup: Callable[..., None] = lambda **_: logging.basicConfig(  # noqa: E731
        level=level, format="%(asctime)s %(name)s %(levelname)s %(message)s"
    )
    signals.setup_logging.connect(setup, weak=False)
    if level != "DEBUG":
        # A line or two for every task, and the schedule never rests.
        for name in ("celery.app.trace", "celery.worker.strategy", "celery.beat"):
            logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
