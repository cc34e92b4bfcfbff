"""Celery's remote control commands, answered for a worker that is no Celery worker.

Replies have the shape of celery/worker/control.py, so that `celery inspect`, `celery control` and Flower
print them. What has no meaning here is answered with an error that says so.
"""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import wicore
from wicore.config import Settings, shown
from wicore.errors import UnknownJob, WicoreError
from wicore.queue.codec import TASK
from wicore.queue.consumer import Delivery
from wicore.queue.producer import Producer

Reply = dict[str, Any] | list[Any]
Command = Callable[..., Reply]


class Controlled(Protocol):
    """What remote control sees of a worker. Every method is for any thread."""

    def status(self) -> dict[str, object]:
        """Figures, as in the registry."""

    def jobs(self) -> tuple[list[Delivery], list[Delivery]]:
        """The jobs that the worker has: those running, and those that it prepares."""

    def stop(self) -> None:
        """Take no more jobs, drain and end."""


class Panel(dict[str, Command]):
    """Commands by name, each called as `command(state, **arguments)`; unknown ones answer with an error."""

    def __init__(self, node: str, worker: Controlled, producer: Producer, settings: Settings) -> None:
        """`node` is the name by which Celery knows the worker."""
        self._node, self._worker, self._producer, self._settings = node, worker, producer, settings
        self._started = time.monotonic()
        commands = (self.active, self.active_queues, self.conf, self.ping, self.query_task, self.registered)
        more = (self.report, self.reserved, self.revoke, self.revoked, self.scheduled, self.shutdown)
        super().__init__({command.__name__: command for command in (*commands, *more, self.stats)})
        self["terminate"] = self.revoke

    def __missing__(self, name: str) -> Command:
        return lambda state, **arguments: {"error": f"{name}: a WiCore worker has no such command"}

    def ping(self, state: object, **_: Any) -> Reply:
        return {"ok": "pong"}

    def active(self, state: object, **_: Any) -> Reply:
        return [self._task(delivery) for delivery in self._worker.jobs()[0]]

    def reserved(self, state: object, **_: Any) -> Reply:
        return [self._task(delivery) for delivery in self._worker.jobs()[1]]

    def scheduled(self, state: object, **_: Any) -> Reply:
        """Nothing: a job cannot be sent for later."""
        return []

    def revoked(self, state: object, **_: Any) -> Reply:
        """Nothing: a revoked job ends at once, or its wish waits in Redis."""
        return []

    def query_task(self, state: object, ids: str | Sequence[str] = (), **_: Any) -> Reply:
        wanted = {ids} if isinstance(ids, str) else set(ids)
        by_state = zip(("active", "reserved"), self._worker.jobs(), strict=True)
        return {
            delivery.job_id: [word, self._task(delivery)]
            for word, deliveries in by_state
            for delivery in deliveries
            if delivery.job_id in wanted
        }

    def registered(self, state: object, **_: Any) -> Reply:
        return [TASK]

    def active_queues(self, state: object, **_: Any) -> Reply:
        name = self._settings.redis.prefix
        exchange = {"name": name, "type": "direct"}
        return [{"name": name, "exchange": exchange, "routing_key": name, "durable": True}]

    def stats(self, state: object, **_: Any) -> Reply:
        status = self._worker.status()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "pid": os.getpid(),
            "uptime": round(time.monotonic() - self._started),
            "total": {TASK: status["jobs"]},
            "prefetch_count": 0,
            "pool": {
                "implementation": "wicore",
                "max-concurrency": status["slots"],
                "processes": [os.getpid()],
            },
            "rusage": {"utime": usage.ru_utime, "stime": usage.ru_stime, "maxrss": usage.ru_maxrss},
            "wicore": status,
        }

    def conf(self, state: object, **_: Any) -> Reply:
        return shown(self._settings)

    def report(self, state: object, **_: Any) -> Reply:
        status = self._worker.status()
        software = f"wicore:{wicore.__version__} py:{platform.python_version()} os:{platform.platform()}"
        engine = f"engine:{status['engine']} device:{status['device']} model:{status['model']}"
        return {"ok": f"\nsoftware -> {software}\n{engine}\n"}

    def revoke(self, state: object, task_id: str | Sequence[str] = (), **_: Any) -> Reply:
        """Cancel jobs. An id that is unknown yet is called off when it comes, for an hour."""
        return revoke(self._producer, task_id)

    def shutdown(self, state: object, **_: Any) -> Reply:
        self._worker.stop()
        return {"ok": "stopping"}

    def _task(self, delivery: Delivery) -> dict[str, Any]:
        """As Celery's `Request.info`; prompts are private and left out."""
        body = delivery.body
        return {
            "id": delivery.job_id,
            "name": TASK,
            "type": TASK,
            "args": [],
            "kwargs": {"kind": body.kind, "n": body.n, "max_tokens": body.max_tokens},
            "hostname": self._node,
            "time_start": delivery.popped_ms / 1000,
            "acknowledged": False,
            "delivery_info": {
                "exchange": "",
                "routing_key": self._settings.redis.prefix,
                "priority": int(delivery.level),
                "redelivered": delivery.attempt > 1,
            },
            "worker_pid": os.getpid(),
        }


def revoke(producer: Producer, task_id: str | Sequence[str]) -> dict[str, str]:
    """Cancel one job or several, answered as Celery does; `terminate` makes no difference to a job."""
    ids = [task_id] if isinstance(task_id, str) else sorted(set(task_id))
    for job_id in ids:
        try:
            producer.cancel(job_id)
        except UnknownJob:
            pass  # the wish is kept
        except WicoreError as err:
            return {"error": err.message}
    return {"ok": f"tasks {', '.join(ids)} flagged as revoked"}
