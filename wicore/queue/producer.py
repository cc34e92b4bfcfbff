"""Putting jobs in, looking at them, calling them off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import redis

from wicore.config import QueueSettings
from wicore.request import JobBody, JobStatus, Priority


@dataclass(frozen=True, slots=True)
class Submission:
    """What became of a submit."""

    id: str
    created: bool
    """False: the id or the idempotency key was known; nothing was added."""
    position: int
    """Jobs that were ahead, on its level and those above, when the job was accepted."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as `GET /v1/jobs/{id}` shows it. Times are ms of Redis TIME; None: not yet, or unknown."""

    id: str
    status: JobStatus
    kind: str | None
    model: str | None
    priority: Priority
    attempts: int
    position: int | None
    """Jobs ahead when it was accepted; None for messages that did not come through `submit`."""
    prompt_tokens: int | None
    worker: str | None
    """Who has it, or had it last."""
    created_ms: int
    deadline_ms: int | None
    started_ms: int | None
    first_token_ms: int | None
    finished_ms: int | None
    seq: int
    """Last sequence number in the log."""
    cancel_requested: bool
    finish_reason: str | None
    usage: dict[str, int] | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    metadata: dict[str, str]


class Producer:
    """Thread-safe; holds nothing but the client. Every method raises Unavailable when Redis is away."""

    def __init__(
        self, client: redis.Redis, prefix: str = "wicore", settings: QueueSettings | None = None
    ) -> None:
        raise NotImplementedError

    def submit(
        self,
        body: JobBody,
        priority: Priority,
        *,
        job_id: str | None = None,
        idempotency_key: str | None = None,
        prompt_tokens: int | None = None,
    ) -> Submission:
        """Write the record and push the message in one atomic step; on return the job is accepted.

        `body.timeout_s` becomes the deadline. Sending the same id twice adds nothing, so a caller may
        repeat a submit whose answer was lost, giving the same `job_id`.

        Raises QueueFull at `max_jobs` waiting, Conflict when the idempotency key was used with another
        body, InvalidRequest for a bad job id.
        """
        raise NotImplementedError

    def cancel(self, job_id: str) -> JobStatus:
        """Call a job off; idempotent; returns the status after the call.

        A waiting job gets its terminal event at once. A running one keeps "running" until its worker,
        which is told through the control channel, ends it. A finished one is left alone.
        Raises UnknownJob when there is no record; the wish is kept for an hour all the same, for a message
        from another client that no worker has seen yet.
        """
        raise NotImplementedError

    def record(self, job_id: str) -> JobRecord:
        """Raises UnknownJob."""
        raise NotImplementedError

    def list(
        self, *, status: JobStatus | None = None, limit: int = 20, after: str | None = None
    ) -> list[JobRecord]:
        """Newest first; `after` is the id of the last job of the page before. Raises UnknownJob for it."""
        raise NotImplementedError

    def depths(self) -> Mapping[Priority, int]:
        """Jobs waiting on each level."""
        raise NotImplementedError

    def estimated_wait_s(self, position: int) -> float | None:
        """Seconds until `position` jobs have gone, at the rate of the last minute; None when unknown."""
        raise NotImplementedError
