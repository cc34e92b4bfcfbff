"""What the doors work with: one set of connections and one model description a process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from flask import current_app
from redis import Redis

from api.callers import Caller
from api.slots import Slots
from wicore.admission import admit
from wicore.batches.record import Batch
from wicore.batches.store import Batches, unknown_batch
from wicore.config import Settings
from wicore.errors import ConfigError
from wicore.files import FileRecord, Files, unknown_file
from wicore.model import Model, load_model
from wicore.queue.connection import connect
from wicore.queue.dead import DeadLetters
from wicore.queue.producer import JobRecord, Producer, Submission, unknown_job
from wicore.queue.registry import alive_workers
from wicore.request import JobBody, JobStatus, Priority
from wicore.stream.relay import Relay

EXTENSION = "wicore"


@dataclass(frozen=True, slots=True)
class Services:
    """Everything a door needs; built once, shared by all greenlets of a process."""

    settings: Settings
    model: Model
    redis: Redis
    producer: Producer
    dead: DeadLetters
    relay: Relay
    files: Files
    batches: Batches
    slots: Slots
    """Open websockets and event streams, bounded by `api.max_sockets`."""

    def accept(
        self,
        body: JobBody,
        default: Priority,
        caller: Caller,
        idempotency_key: str | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> Submission:
        """Check what the form of a body cannot show (`admit`), then put the job on the queue.

        The job is the caller's, and takes the caller's turn on its level. `fields` go into its record.

        Raises UnknownModel, TooLarge, InvalidRequest, QueueFull, Conflict or Unavailable; then no job
        was accepted.
        """
        prompt = admit(body, self.model, self.settings)
        return self.producer.submit(
            body,
            default if body.priority is None else body.priority,
            client=caller.client,
            idempotency_key=idempotency_key,
            prompt_tokens=len(prompt.token_ids),
            max_tokens=prompt.max_tokens,
            fields=fields,
        )

    def record(self, job_id: str, caller: Caller) -> JobRecord:
        """Raises UnknownJob, also for a job that the caller may not see: nothing tells the two apart."""
        record = self.producer.record(job_id)
        if not caller.may_see(record.client):
            raise unknown_job(job_id)
        return record

    def cancel(self, job_id: str, caller: Caller) -> JobStatus:
        """Call a job off, as `Producer.cancel`; raises UnknownJob as `record`."""
        if caller.restricted:
            self.record(job_id, caller)
        return self.producer.cancel(job_id)

    def file(self, file_id: str, caller: Caller) -> FileRecord:
        """Raises UnknownFile, also for a file that the caller may not see."""
        record = self.files.get(file_id)
        if not caller.may_see(record.client):
            raise unknown_file(file_id)
        return record

    def batch(self, batch_id: str, caller: Caller) -> Batch:
        """Raises UnknownBatch, also for a batch that the caller may not see."""
        batch = self.batches.get(batch_id)
        if not caller.may_see(batch.client):
            raise unknown_batch(batch_id)
        return batch

    def heartbeats(self) -> list[dict[str, Any]]:
        """Of all live workers. Raises Unavailable."""
        return alive_workers(self.redis, self.settings.redis.prefix)

    def workers(self) -> list[dict[str, Any]]:
        """The heartbeats of live workers that serve the model. Raises Unavailable."""
        return [worker for worker in self.heartbeats() if worker["model"] == self.model.name]


def build(settings: Settings) -> Services:
    """The real thing; no connection is made before the first command.

    Raises ConfigError without redis.url, CheckpointError when the model is missing or bad.
    """
    url = settings.redis.url
    if url is None:
        raise ConfigError(
            "redis.url: not set; set WICORE_REDIS__URL, or run the whole service by `wicore up`",
            param="redis.url",
        )
    client, prefix = connect(url), settings.redis.prefix
    files = Files(client, prefix, max_bytes=settings.api.max_file_bytes, quota=settings.api.max_files_bytes)
    return Services(
        settings=settings,
        model=load_model(settings),
        redis=client,
        producer=Producer(client, prefix, settings.queue, wait_replicas=settings.redis.wait_replicas),
        dead=DeadLetters(client, prefix, settings.queue),
        relay=Relay(client, prefix, settings.api.stream_buffer),
        files=files,
        batches=Batches(client, files, prefix),
        slots=Slots(settings.api.max_sockets),
    )


class LazyServices:
    """Builds the services on first use, once a process, so that importing and forking need no IO."""

    def __init__(self, settings: Settings, services: Services | None = None) -> None:
        self._settings = settings
        self._services = services
        self._lock = threading.Lock()
        self.stopping: Callable[[], bool] = lambda: False
        """Whether this process was told to stop; streams that can be resumed elsewhere then end."""

    def get(self) -> Services:
        """Raises CheckpointError or ConfigError when the model cannot be described."""
        if self._services is None:
            with self._lock:
                if self._services is None:
                    self._services = build(self._settings)
        return self._services


def current() -> Services:
    """The services of the current app."""
    return lazy().get()


def stopping() -> Callable[[], bool]:
    """Tells, also outside of a request, whether this process was told to stop."""
    extension = lazy()
    return lambda: extension.stopping()


def lazy() -> LazyServices:
    return cast(LazyServices, current_app.extensions[EXTENSION])
