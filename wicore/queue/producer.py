"""Putting jobs in, looking at them, calling them off."""

from __future__ import annotations

import builtins
import hashlib
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import redis

from wicore.access.keys import NO_LIMITS, Limits
from wicore.access.rates import Rates, limits_text, rate_limited, rates_of
from wicore.config import QueueSettings
from wicore.errors import Conflict, InvalidRequest, QueueFull, Unavailable, UnknownJob
from wicore.queue.codec import encode
from wicore.queue.connection import unavailable_on_failure
from wicore.queue.index import page_from
from wicore.queue.schema import BELL, Keys
from wicore.queue.scripts import Arg, Scripts
from wicore.request import JOB_ID, JobBody, JobStatus, Priority, new_job_id


@dataclass(frozen=True, slots=True)
class Submission:
    """What became of a submit."""

    id: str
    created: bool
    """False: the id or the idempotency key was known; nothing was added."""
    status: JobStatus
    position: int
    """Jobs that were ahead when the job was accepted: on the levels above, and on its own by the turns that
    clients take."""
    estimated_wait_s: float | None
    """Seconds from then until it starts if nothing more urgent comes; None: nothing is known of the pace."""
    rates: Rates = ()
    """What is left of the client's rate limits, where it has any."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as `GET /v1/jobs/{id}` shows it. Times are ms of Redis TIME; None: not yet, or unknown."""

    id: str
    client: str
    """Who submitted it; '' is nobody known. Not shown to clients."""
    status: JobStatus
    kind: str | None
    model: str | None
    priority: Priority
    attempts: int
    position: int | None
    """Jobs ahead when it was accepted; None for messages that did not come through `submit`."""
    estimated_wait_s: float | None
    """Seconds that it was then expected to wait."""
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
    usage: dict[str, Any] | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    metadata: dict[str, str]
    retry_of: str | None
    """Id of the dead letter that this job tries again."""
    webhook_url: str | None
    webhook_status: Literal["pending", "delivered", "failed"] | None
    """None until the job has ended."""
    webhook_error: str | None
    """Why the last attempt failed, if it did."""
    response: dict[str, Any] | None
    """What a response keeps with its job (wicore/openai/responses_api). Not shown to clients."""

    def public(self) -> dict[str, Any]:
        """JSON form for clients; what is not known yet is null."""
        fields = asdict(self) | {"priority": self.priority.name.lower()}
        del fields["client"], fields["response"]
        return fields


_UNBOUNDED = 10**9
"""Output tokens of a job that names no bound: what jobs usually take is expected of it."""
_RETRY_AFTER_S = 5.0
"""Told to who finds the queue full while nothing is known of its pace."""
_REPLICATION_MS = 1000
"""How long a submit waits for replicas."""


class Producer:
    """Thread-safe; holds nothing but the client. Every method raises Unavailable when Redis is away."""

    def __init__(
        self,
        client: redis.Redis,
        prefix: str = "wicore",
        settings: QueueSettings | None = None,
        *,
        wait_replicas: int = 0,
    ) -> None:
        """`wait_replicas`: how many must hold a job before `submit` returns."""
        self._client = client
        self._wait_replicas = wait_replicas
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
        client: str = "",
        prompt_tokens: int | None = None,
        max_tokens: int | None = None,
        limits: Limits = NO_LIMITS,
        reserve: int = 0,
        fields: Mapping[str, str] | None = None,
        traceparent: str | None = None,
    ) -> Submission:
        """Write the record and put the job in its line in one atomic step; on return it is accepted.

        `client` takes turns with the others of its level, by tokens. `prompt_tokens` and `max_tokens` (output
        of one choice), where the caller knows them, say how much the job may take. `body.timeout_s` becomes
        the deadline; `body.queue_timeout_s` or `queue.max_wait_s` bounds the wait for the first start.
        `limits` are the client's: one request and `reserve` tokens are taken of them; when the job ends, the
        tokens that it took are counted instead. `fields` go into the record, `traceparent` with the message.
        Sending the same id twice adds nothing, so a caller may repeat a submit whose answer was lost, giving
        the same `job_id`.

        Raises QueueFull when `max_jobs` or `max_tokens` wait on the level, RateLimited when the client is at
        one of its limits, Conflict when the client used the
        idempotency key with another body in the last 24 h, InvalidRequest for a bad job id, Unavailable when
        fewer than `wait_replicas` confirm: the job is there, but a failover may lose it; repeat the submit.
        """
        job_id = job_id or new_job_id()
        if not JOB_ID.fullmatch(job_id):
            raise InvalidRequest(
                f'id: must be 1 to 128 letters, digits, "_", ".", ":" or "-" (got {job_id!r:.60})', param="id"
            )
        tag = str(uuid.uuid4())
        raw = encode(
            body,
            job_id=job_id,
            tag=tag,
            priority=priority,
            queue=self._keys.prefix,
            traceparent=traceparent,
        )
        record = {**record_fields(body), **(fields or {})}
        if prompt_tokens is not None:
            record["prompt_tokens"] = str(prompt_tokens)
        output = max_tokens or body.max_tokens or _UNBOUNDED
        with unavailable_on_failure(self._client):
            args: list[Arg] = [
                *(job_id, tag, raw, int(priority), client),
                *(len(raw) // 4 if prompt_tokens is None else prompt_tokens, output * body.sequences),
                *(_ms(body.timeout_s), _ms(body.queue_timeout_s or self._settings.max_wait_s)),
                *_idempotency(body, priority, client, idempotency_key),
                *(limits_text(limits), reserve),
                *(part for item in record.items() for part in item),
            ]
            return self._submission(self._submit(args))

    def _submit(self, args: builtins.list[Arg]) -> builtins.list[Any]:
        """What submit.lua answers. Raises Unavailable when too few replicas have what it wrote."""
        wanted = self._wait_replicas
        (answer,), holders = self._scripts.call_replicated([("submit", args)], wanted, _REPLICATION_MS)
        if isinstance(answer, Exception):
            raise answer
        if holders < wanted and answer[0] in (b"created", b"existing"):
            raise Unavailable(
                f"{holders} of {wanted} replicas (redis.wait_replicas) confirmed the job within "
                f"{_REPLICATION_MS / 1000:g} s; repeat the request with the same Idempotency-Key or job id",
                retry_after=1,
            )
        return cast("builtins.list[Any]", answer)

    def _submission(self, answer: list[Any]) -> Submission:
        if answer[0] == b"full":
            what, waiting, wait_ms = answer[1].decode(), answer[2], answer[3]
            bound = self._settings.max_jobs if what == "jobs" else self._settings.max_tokens
            raise QueueFull(
                f"{waiting} {what} are waiting on this level, the bound (queue.max_{what}) is {bound}; "
                "try again later",
                retry_after=_RETRY_AFTER_S if wait_ms < 0 else max(1.0, wait_ms / 1000),
            )
        if answer[0] == b"limited":
            raise rate_limited(answer)
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
            estimated_wait_s=None if answer[4] < 0 else answer[4] / 1000,
            rates=rates_of(answer[5]),
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
            raise unknown_job(job_id)
        with unavailable_on_failure(self._client):
            status = self._scripts.call("cancel", job_id).decode()
        if not status:
            raise unknown_job(job_id)
        return cast(JobStatus, status)

    def forget(self, job_id: str) -> bool:
        """Delete a response and call its job off if that is open; whether there was one.

        Of a job that has ended record, log and result go; of an open one, or one that owes a webhook, what
        made it a response, and the rest at the end of its retention.
        """
        with unavailable_on_failure(self._client):
            known = bool(self._scripts.call("forget", job_id))
            if known and self._client.exists(self._keys.job(job_id)):
                self._scripts.call("cancel", job_id)
        return known

    def record(self, job_id: str) -> JobRecord:
        """Raises UnknownJob."""
        with unavailable_on_failure(self._client):
            fields = self._client.hgetall(self._keys.job(job_id))
        if not fields:
            raise unknown_job(job_id)
        return record_of(job_id, cast("dict[bytes, bytes]", fields))

    def list(
        self,
        status: JobStatus | None = None,
        limit: int = 20,
        after: str | None = None,
        client: str | None = None,
    ) -> builtins.list[JobRecord]:
        """Newest first; `after` is the id of the last job of the page before. Raises UnknownJob for it.

        `client`: only the jobs of that one, which must have a name; None: of all.
        """
        if client is not None:
            index = self._keys.jobs_of(client, status)
        else:
            index = self._keys.jobs if status is None else self._keys.jobs_by_status(status)
        below = None if after is None else (self.record(after).created_ms, after)
        with unavailable_on_failure(self._client):
            return page_from(self._client, index, below, limit, "desc", self._records)

    def _records(self, ids: Sequence[str]) -> builtins.list[JobRecord]:
        with self._client.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hgetall(self._keys.job(job_id))
            replies = pipe.execute()
        # A record may have expired since; the sweep takes it off the index soon.
        return [record_of(job_id, fields) for job_id, fields in zip(ids, replies, strict=True) if fields]

    def depths(self) -> Mapping[Priority, int]:
        """Jobs waiting on each level; those of dead workers are counted apart, by `suspects`."""
        queues = self._keys.queues()
        with unavailable_on_failure(self._client), self._client.pipeline(transaction=True) as pipe:
            pipe.hmget(self._keys.waiting, [f"{int(level)}:jobs" for level in queues])
            for queue in queues.values():
                pipe.llen(queue)
                pipe.lindex(queue, -1)
            known, *lists = pipe.execute()
        depths = {}
        for i, level in enumerate(queues):
            length, last = lists[2 * i : 2 * i + 2]
            depths[level] = int(known[i] or 0) + length - (last == BELL)
        return depths

    def suspects(self) -> int:
        """Jobs waiting for another attempt because their worker died."""
        with unavailable_on_failure(self._client):
            return self._client.llen(self._keys.suspect)


def _ms(seconds: float | None) -> int | str:
    return "" if seconds is None else math.ceil(seconds * 1000)


def record_fields(body: JobBody) -> dict[str, str]:
    """What the record keeps of a body, under the record's field names."""
    fields: dict[str, str] = {"kind": body.kind}
    if body.model is not None:
        fields["model"] = body.model
    if body.metadata:
        fields["metadata"] = json.dumps(body.metadata, ensure_ascii=False)
    if body.webhook_url is not None:
        fields["webhook_url"] = body.webhook_url
    return fields


def _idempotency(body: JobBody, priority: Priority, client: str, key: str | None) -> tuple[str, str]:
    """Digests of the client's key and of what it must always come with; ("", "") without a key."""
    if key is None:
        return "", ""
    request = json.dumps([int(priority), body.wire()], sort_keys=True)
    return _sha256(f"{client} {key}"), _sha256(request)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def unknown_job(job_id: str) -> UnknownJob:
    """The error for a job that is not there, or not to be seen by who asks."""
    return UnknownJob(
        f"No job {job_id!r:.140}: it was never accepted, or its record has expired.", param="id"
    )


def record_of(job_id: str, fields: Mapping[bytes, bytes]) -> JobRecord:
    """A record from the fields of its hash. Pure."""
    texts = {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}

    def number(name: str) -> int | None:
        return int(texts[name]) if name in texts else None

    def seconds(name: str) -> float | None:
        return int(texts[name]) / 1000 if int(texts.get(name, -1)) >= 0 else None

    def data(name: str) -> Any:
        return json.loads(texts[name]) if name in texts else None

    return JobRecord(
        id=job_id,
        client=texts.get("client", ""),
        status=cast(JobStatus, texts["status"]),
        kind=texts.get("kind"),
        model=texts.get("model"),
        priority=Priority(int(texts["level"])),
        attempts=number("attempts") or 0,
        position=number("position"),
        estimated_wait_s=seconds("wait_ms"),
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
        retry_of=texts.get("retry_of"),
        webhook_url=texts.get("webhook_url"),
        webhook_status=cast("Any", texts.get("webhook_status")),
        webhook_error=texts.get("webhook_error") or None,
        response=data("response"),
    )
