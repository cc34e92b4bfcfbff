"""What the doors work with: one set of connections and one model description a process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from flask import current_app
from redis import Redis

from api import rates, spans
from api.keyring import Caller, KeyRing
from api.slots import Budget, Slots
from wicore.access.keys import Limits
from wicore.access.rates import RateLimiter, tokens_taken
from wicore.access.store import KeyStore
from wicore.admission import admit
from wicore.batches.record import Batch
from wicore.batches.store import Batches, unknown_batch
from wicore.config import Settings
from wicore.errors import ConfigError, Forbidden, RateLimited
from wicore.files import FileRecord, Files, unknown_file
from wicore.model import Model, load_model
from wicore.queue.connection import connect
from wicore.queue.dead import DeadLetters
from wicore.queue.producer import JobRecord, Producer, Submission, unknown_job
from wicore.queue.registry import alive_workers
from wicore.request import JobBody, JobStatus, Priority
from wicore.stream.relay import Relay
from wicore.telemetry.tracing import Tracer, tracer_of

EXTENSION = "wicore"
ARRIVING_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True)
class Services:
    """Everything a door needs; built once, shared by all greenlets of a process."""

    settings: Settings
    model: Model
    redis: Redis
    producer: Producer
    dead: DeadLetters
    relay: Relay
    keys: KeyRing
    limiter: RateLimiter
    files: Files
    batches: Batches
    slots: Slots
    """Open websockets, event streams and calls that wait, bounded by `api.max_sockets`."""
    arriving: Budget
    """What clients have sent a part of."""
    tracer: Tracer | None = None

    def accept(
        self,
        body: JobBody,
        default: Priority,
        caller: Caller,
        idempotency_key: str | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> Submission:
        """Check what the form of a body cannot show (`admit`), then put the job on the queue.

        The job is the caller's, takes the caller's turn on its level, and counts against its limits. Without
        a priority of its own it has the default, or the highest that the caller may use. `fields` go into its
        record.

        Raises Forbidden, UnknownModel, TooLarge, InvalidRequest, QueueFull, RateLimited, Conflict or
        Unavailable; then no job was accepted.
        """
        limits = caller.limits
        self.check_allowed(body, limits)
        priority = max(default, limits.level) if body.priority is None else body.priority
        with spans.of_request(self.tracer, "submit") as span, _rates_told():
            prompt = admit(body, self.model, self.settings)
            tokens = len(prompt.token_ids)
            job = self.producer.submit(
                body,
                priority,
                client=caller.client,
                idempotency_key=idempotency_key,
                prompt_tokens=tokens,
                max_tokens=prompt.max_tokens,
                fields=fields,
                limits=limits,
                reserve=tokens_taken(body, prompt),
                traceparent=span.traceparent,
            )
            rates.remember(job.rates)
            span.attributes["wicore.job"] = job.id
            span.attributes["wicore.priority"] = priority.name.lower()
            span.attributes["gen_ai.usage.input_tokens"] = tokens
            return job

    def check_allowed(self, body: JobBody, limits: Limits) -> None:
        """Raises Forbidden for a level or model that these limits leave out."""
        if body.priority is not None and body.priority < limits.level:
            raise Forbidden(
                f"priority: {body.priority.name.lower()} is above this key's highest, {limits.priority}",
                param="priority",
            )
        self.check_model_allowed(limits)

    def check_model_allowed(self, limits: Limits) -> None:
        """Raises Forbidden when the model served is none of the key's."""
        if limits.models is not None and self.model.name not in limits.models:
            raise Forbidden(f"model: this key may not use {self.model.name!r}", param="model")

    def spend(self, caller: Caller) -> None:
        """Count a call that makes work and no job against the caller's limits; raises RateLimited."""
        with _rates_told():
            rates.remember(self.limiter.spend(caller.client, caller.limits))

    def record(self, job_id: str, caller: Caller) -> JobRecord:
        """Raises UnknownJob, also for a job that the caller may not see: nothing tells the two apart."""
        record = self.producer.record(job_id)
        if not caller.may_see(record.client):
            raise unknown_job(job_id)
        return record

    def records(
        self, status: JobStatus | None, limit: int, after: str | None, caller: Caller
    ) -> list[JobRecord]:
        """As `Producer.list`, of what the caller may see; raises UnknownJob for `after` as `record` does."""
        if after is not None:
            self.record(after, caller)
        return self.producer.list(status, limit, after, caller.client if caller.restricted else None)

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


@contextmanager
def _rates_told() -> Iterator[None]:
    """Have also a refusal say how full the caller's buckets are."""
    try:
        yield
    except RateLimited as err:
        rates.remember(err.rates)
        raise


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
        keys=KeyRing(KeyStore(client, prefix), settings.api),
        limiter=RateLimiter(client, prefix),
        files=files,
        batches=Batches(client, files, prefix),
        slots=Slots(settings.api.max_sockets, settings.api.max_client_sockets),
        arriving=Budget(max(ARRIVING_BYTES, 2 * settings.api.max_body_bytes)),
        tracer=tracer_of(settings.telemetry, "wicore-api"),
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
