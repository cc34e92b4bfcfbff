"""Dead letters: messages that were given up, to be looked at, tried again or thrown away."""

from __future__ import annotations

import builtins
import json
import re
import uuid
from dataclasses import asdict, dataclass
from typing import Any

import redis

from wicore.config import QueueSettings
from wicore.errors import InvalidRequest, UnknownDeadLetter, UnknownJob
from wicore.queue.codec import MalformedMessage, decode
from wicore.queue.connection import unavailable_on_failure
from wicore.queue.producer import Producer, Submission
from wicore.queue.schema import Keys
from wicore.queue.scripts import Scripts
from wicore.request import Priority

_ID = re.compile(r"[0-9]{1,15}-[0-9]{1,15}")
_EXCERPT = 4000
"""Bytes of a message that a listing shows, counted in its JSON form."""
_WHOLE_ESCAPES = re.compile(rb"(?:[^\\]|\\u[0-9A-Fa-f]{4}|\\[^u])*")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was given up."""

    id: str
    """Never used for another."""
    at_ms: int
    """When it was given up, ms of Redis TIME."""
    job: str | None
    """The id that it claims; None when none can be read."""
    priority: Priority
    """The level it waited on."""
    client: str
    """Whose turn it took there."""
    reason: str
    message: str
    """As it was pushed; bytes that are no UTF-8 are shown as Latin-1."""
    truncated: bool
    """Whether `message` is only its beginning: in listings."""

    def public(self) -> dict[str, Any]:
        """JSON form for clients."""
        return {**asdict(self), "priority": self.priority.name.lower()}


class DeadLetters:
    """The dead list. Thread-safe; holds nothing but the client. Every method raises Unavailable."""

    def __init__(
        self, client: redis.Redis, prefix: str = "wicore", settings: QueueSettings | None = None
    ) -> None:
        self._client = client
        self._keys = Keys(prefix)
        self._producer = Producer(client, prefix, settings)
        self._scripts = Scripts(client, self._keys, settings or QueueSettings())

    def list(self, limit: int = 20, after: str | None = None) -> builtins.list[DeadLetter]:
        """Newest first, messages cut; `after` is the last id of the page before, which may be gone by now.

        Raises InvalidRequest for an `after` that is no id.
        """
        if after is not None and not _ID.fullmatch(after):
            raise InvalidRequest(
                f"after: must be the id of a dead letter, as listed (got {after!r:.60})", param="after"
            )
        with unavailable_on_failure(self._client):
            page = self._scripts.call("dead_list", limit, after or "", _EXCERPT)
        return [_letter(json.loads(head), _text(start), length > len(start)) for head, start, length in page]

    def get(self, letter_id: str) -> DeadLetter:
        """With its whole message. Raises UnknownDeadLetter."""
        entry = None
        if _ID.fullmatch(letter_id):
            with unavailable_on_failure(self._client):
                entry = self._scripts.call("dead_get", letter_id)
        if entry is None:
            raise _unknown(letter_id)
        fields = json.loads(entry)
        return _letter(fields, fields.pop("message"), False)

    def retry(self, letter_id: str) -> Submission:
        """Submit the message's body as a new job, at its old priority, and remove the letter.

        A new job, because the old one has had its terminal event; `timeout_s` counts anew, Celery's
        `expires` is left behind. The job's id follows from the letter's and the letter goes after the
        submit: a repeat, also one after a crash between the two, finds the same job.
        Raises UnknownDeadLetter, InvalidRequest when no job can be made of the message, QueueFull; then
        the letter stays.
        """
        job_id = str(uuid.uuid5(_NAMESPACE, f"{self._keys.dead} {letter_id}"))
        try:
            letter = self.get(letter_id)
        except UnknownDeadLetter:
            return self._retried(job_id, letter_id)
        try:
            body = decode(letter.message.encode()).body
        except MalformedMessage as err:
            raise InvalidRequest(
                f"id: dead letter {letter_id} holds no valid job and cannot be tried again ({err.reason}); "
                "submit a corrected job, then drop it",
                param="id",
            ) from None
        job = self._producer.submit(
            body, letter.priority, job_id=job_id, client=letter.client, fields={"retry_of": letter_id}
        )
        self._remove(letter_id)
        return job

    def drop(self, letter_id: str) -> None:
        """Remove one for good. Raises UnknownDeadLetter."""
        if not (_ID.fullmatch(letter_id) and self._remove(letter_id)):
            raise _unknown(letter_id)

    def drop_all(self) -> int:
        """Remove all; returns how many there were."""
        with unavailable_on_failure(self._client), self._client.pipeline(transaction=True) as pipe:
            pipe.llen(self._keys.dead)
            pipe.delete(self._keys.dead)
            return int(pipe.execute()[0])

    def _retried(self, job_id: str, letter_id: str) -> Submission:
        """What an earlier call made of a letter that is gone."""
        try:
            record = self._producer.record(job_id)
        except UnknownJob:
            raise _unknown(letter_id) from None
        return Submission(record.id, False, record.status, record.position or 0, record.estimated_wait_s)

    def _remove(self, letter_id: str) -> bool:
        with unavailable_on_failure(self._client):
            return bool(self._scripts.call("dead_drop", letter_id))


_NAMESPACE = uuid.UUID("6d9a8f0e-6c0b-5f43-9d55-2b1f0d3c7a11")


def _letter(fields: dict[str, Any], message: str, truncated: bool) -> DeadLetter:
    level = Priority(fields.pop("level"))
    return DeadLetter(**fields, priority=level, message=message, truncated=truncated)


def _text(start: bytes) -> str:
    """The beginning of a JSON string as text; a character or an escape that is cut in two is left out."""
    whole = _WHOLE_ESCAPES.match(start)
    assert whole is not None  # it matches nothing at least
    return str(json.loads(f'"{whole.group().decode(errors="ignore")}"'))


def _unknown(letter_id: str) -> UnknownDeadLetter:
    return UnknownDeadLetter(
        f"No dead letter {letter_id!r:.60}: it never was, was retried, dropped, or pushed out by newer ones; "
        "`wicore dead list` shows them.",
        param="id",
    )
