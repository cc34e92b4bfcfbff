"""Putting jobs in, looking at them, calling them off."""

from __future__ import annotations

import builtins
import hashlib
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import redis

from wicore.config import QueueSettings
from wicore.errors import Conflict, InvalidRequest, QueueFull, UnknownJob
from wicore.queue.codec import encode
from wicore.queue.connection import unavailable_on_failure
from wicore.queue.schema import Keys
from wicore.queue.scripts import Scripts
from wicore.request import JOB_ID, JobBody, JobStatus, Priority, new_job_id


@dataclass(frozen=True, slots=True)
class Submission:
    """What became of a submit."""

    id: str
    created: bool
    """False: the id or the idempotency key was known; nothing was added."""
    status: JobStatus
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

    def public(self) -> dict[str, Any]:
        """JSON form for clients; what is not known yet is null."""
        return {**asdict(self), "priority": self.priority.name.lower()}


_ESTIMATE_WINDOW_MS = 60_000
_ESTIMATE_LEAST = 3
"""Fewer finishes than this in the window say nothing about the rate."""


class Producer:
    """Thread-safe; holds nothing but the client. Every method raises Unavailable when Redis is away."""

    def __init__(
        self, client: redis.Redis, prefix: str = "wicore", settings: QueueSettings | None = None
    ) -> None:
        self._client = client
        self._keys = Keys(prefix)
        self._settings = settings or QueueSettings()
        self._scripts = Scripts(client, self._keys, self._settings)

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
        body in the last 24 h, InvalidRequest for a bad job id.
        """
        job_id = job_id or new_job_id()
        if not JOB_ID.fullmatch(job_id):
            raise InvalidRequest(
                f'id: must be 1 to 128 letters, digits, "_", ".", ":" or "-" (got {job_id!r:.60})', param="id"
            )
        tag = str(uuid.uuid4())
        queue = self._keys.queue(priority)
        raw = encode(body, job_id=job_id, tag=tag, priority=priority, queue=self._keys.prefix)
        timeout = "" if body.timeout_s is None else math.ceil(body.timeout_s * 1000)
        digests = _idempotency(body, priority, idempotency_key)
        fields = record_fields(body)
        if prompt_tokens is not None:
            fields["prompt_tokens"] = str(prompt_tokens)
        flat = [part for item in fields.items() for part in item]
        with unavailable_on_failure(self._client):
            answer = self._scripts.call(
                "submit", job_id, tag, queue, raw, int(priority), timeout, *digests, *flat
            )
        return self._submission(answer)

    def _submission(self, answer: list[Any]) -> Submission:
        if answer[0] == b"full":
            wait = self._seconds_for(1)
            raise QueueFull(
                f"{answer[1]} jobs are waiting, the bound (queue.max_jobs) is {self._settings.max_jobs}; "
                "try again later",
                retry_after=max(1.0, wait) if wait is not None else 5.0,
            )
        known = answer[1].decode()
        if answer[0] == b"conflict":
            raise Conflict(
                f"Idempotency-Key: was used with another body, for job {known}; use a new key",
                param="Idempotency-Key",
            )
        return Submission(
            id=known,
            created=answer[0] == b"created",
            status=cast(JobStatus, answer[3].decode()),
            position=answer[2],
        )

    def cancel(self, job_id: str) -> JobStatus:
        """Call a job off; idempotent; returns the status after the call.

        A waiting job gets its terminal event at once. A leased one keeps its status until its worker,
        which is told through the control channel and with its next append or renewal, ends it. A
        finished one is left alone.
        Raises UnknownJob when there is no record; the wish is kept for an hour all the same, for a message
        from another client that no worker has seen yet.
        """
        if not JOB_ID.fullmatch(job_id):
            raise _unknown(job_id)
        with unavailable_on_failure(self._client):
            status = self._scripts.call("cancel", job_id).decode()
        if not status:
            raise _unknown(job_id)
        return cast(JobStatus, status)

    def record(self, job_id: str) -> JobRecord:
        """Raises UnknownJob."""
        with unavailable_on_failure(self._client):
            fields = self._client.hgetall(self._keys.job(job_id))
        if not fields:
            raise _unknown(job_id)
        return _record(job_id, cast("dict[bytes, bytes]", fields))

    def list(
        self, status: JobStatus | None = None, limit: int = 20, after: str | None = None
    ) -> builtins.list[JobRecord]:
        """Newest first; `after` is the id of the last job of the page before. Raises UnknownJob for it."""
        index = self._keys.jobs if status is None else self._keys.jobs_by_status(status)
        below = None if after is None else (self.record(after).created_ms, after)
        page: list[JobRecord] = []
        with unavailable_on_failure(self._client):
            while len(page) < limit:
                ids = self._ids(index, below, limit - len(page))
                if not ids:
                    break
                below = ids[-1]
                page += self._records([job_id for _, job_id in ids])
        return page

    def _ids(self, index: str, below: tuple[int, str] | None, count: int) -> builtins.list[tuple[int, str]]:
        """Next (created_ms, id) pairs of an index, in falling order, under `below`."""
        if below is None:
            found = self._client.zrange(index, 0, count - 1, desc=True, withscores=True)
        else:
            # Ties in the millisecond of `below` come along and are sorted out by id.
            ties = self._client.zcount(index, below[0], below[0])
            found = self._client.zrange(
                index, below[0], "-inf", desc=True, byscore=True, offset=0, num=count + ties, withscores=True
            )
        pairs = [(int(score), member.decode()) for member, score in cast("list[tuple[bytes, float]]", found)]
        return [pair for pair in pairs if below is None or pair < below][:count]

    def _records(self, ids: Sequence[str]) -> builtins.list[JobRecord]:
        with self._client.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hgetall(self._keys.job(job_id))
            replies = pipe.execute()
        # A record may have expired since; the sweep takes it off the index soon.
        return [_record(job_id, fields) for job_id, fields in zip(ids, replies, strict=True) if fields]

    def depths(self) -> Mapping[Priority, int]:
        """Jobs waiting on each level; those of dead workers are counted apart, by `suspects`."""
        queues = self._keys.queues()
        with unavailable_on_failure(self._client), self._client.pipeline(transaction=True) as pipe:
            for queue in queues.values():
                pipe.llen(queue)
            pipe.hmget(self._keys.tombstones, builtins.list(queues.values()))
            *lengths, gone = pipe.execute()
        return {
            level: max(0, length - int(dropped or 0))
            for level, length, dropped in zip(queues, lengths, gone, strict=True)
        }

    def suspects(self) -> int:
        """Jobs waiting for another attempt because their worker died."""
        with unavailable_on_failure(self._client):
            return self._client.llen(self._keys.suspect)

    def estimated_wait_s(self, job: Submission) -> float | None:
        """Seconds until the jobs ahead of `job` have gone, at the rate of the last minute.

        None when too few jobs ended in that minute to tell.
        """
        return self._seconds_for(job.position)

    def _seconds_for(self, jobs: int) -> float | None:
        with unavailable_on_failure(self._client):
            seconds, _ = self._client.time()
            since = seconds * 1000 - _ESTIMATE_WINDOW_MS
            ended: int = self._client.zcount(self._keys.finished, since, "+inf")
        if ended < _ESTIMATE_LEAST:
            return None
        return jobs * _ESTIMATE_WINDOW_MS / 1000 / ended


def record_fields(body: JobBody) -> dict[str, str]:
    """What the record keeps of a body, under the record's field names."""
    fields: dict[str, str] = {"kind": body.kind}
    if body.model is not None:
        fields["model"] = body.model
    if body.metadata:
        fields["metadata"] = json.dumps(body.metadata, ensure_ascii=False)
    return fields


def _idempotency(body: JobBody, priority: Priority, key: str | None) -> tuple[str, str]:
    """Digests of the key and of what it must always come with; ("", "") without a key."""
    if key is None:
        return "", ""
    request = json.dumps([int(priority), body.wire()], sort_keys=True)
    return _sha256(key), _sha256(request)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _unknown(job_id: str) -> UnknownJob:
    return UnknownJob(
        f"No job {job_id!r:.140}: it was never accepted, or its record has expired.", param="id"
    )


def _record(job_id: str, fields: dict[bytes, bytes]) -> JobRecord:
    texts = {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}

    def number(name: str) -> int | None:
        return int(texts[name]) if name in texts else None

    def data(name: str) -> Any:
        return json.loads(texts[name]) if name in texts else None

    return JobRecord(
        id=job_id,
        status=cast(JobStatus, texts["status"]),
        kind=texts.get("kind"),
        model=texts.get("model"),
        priority=Priority(int(texts["level"])),
        attempts=number("attempts") or 0,
        position=number("position"),
        prompt_tokens=number("prompt_tokens"),
        worker=texts.get("worker"),
        created_ms=int(texts["created_ms"]),
        deadline_ms=number("deadline_ms"),
        started_ms=number("started_ms"),
        first_token_ms=number("first_token_ms"),
        finished_ms=number("finished_ms"),
        seq=number("seq") or 0,
        cancel_requested="cancel" in texts,
        finish_reason=texts.get("finish_reason"),
        usage=data("usage"),
        result=data("result"),
        error=data("error"),
        metadata=data("metadata") or {},
    )
