"""Queue messages: Celery's protocol 2 as Kombu writes it to Redis.

https://docs.celeryq.dev/en/stable/internals/protocol.html, version 2; Kombu's virtual transport adds
`properties.delivery_tag`. `body` is base64 (`body_encoding`: "base64") or, without that, plain text, of the
JSON array `[args, kwargs, embed]`. kwargs are the body of `POST /v1/jobs`. Pure; JSON only, never pickle.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from wicore.errors import InvalidRequest
from wicore.request import JOB_ID, JobBody, Priority, parse_job
from wicore.telemetry.tracing import valid_traceparent

TASK = "wicore.generate"


class MalformedMessage(InvalidRequest):
    """A message that no job can be made of.

    Attributes:
        reason: what is wrong, naming the field.
        job_id: the id it claims, None when that cannot be read.
    """

    code = "malformed_message"

    def __init__(self, reason: str, job_id: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.job_id = job_id


@dataclass(frozen=True, slots=True)
class Message:
    """What a message says."""

    job_id: str
    tag: str
    body: JobBody
    expires_ms: int | None
    """Celery's `expires`: ms since 1970 after which the job must not start any more."""
    traceparent: str | None = None
    """The span that the job belongs under, as the W3C writes it."""


def encode(
    body: JobBody,
    *,
    job_id: str,
    tag: str,
    priority: Priority,
    queue: str = "wicore",
    origin: str = "wicore",
    traceparent: str | None = None,
) -> bytes:
    """The message to LPUSH; `body` as plain JSON text. `decode` gives an equal body back."""
    message = {
        "body": json.dumps([[], body.wire(), _EMBED], ensure_ascii=False, separators=(",", ":")),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": TASK,
            "id": job_id,
            "root_id": job_id,
            "parent_id": None,
            "group": None,
            "retries": 0,
            "eta": None,
            "expires": None,
            "origin": origin,
            **({"traceparent": traceparent} if traceparent else {}),
        },
        "properties": {
            "correlation_id": job_id,
            "reply_to": "",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": int(priority),
            "delivery_tag": tag,
        },
    }
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()


_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def decode(raw: bytes) -> Message:
    """Read a message of any client. Raises MalformedMessage, and nothing else, for every other input."""
    message = _json(raw, "message", None)
    headers = _mapping(message, "headers", None)
    job_id = headers.get("id")
    if not isinstance(job_id, str) or not JOB_ID.fullmatch(job_id):
        raise MalformedMessage(
            'headers.id: must be a string of 1 to 128 letters, digits, "_", ".", ":" or "-"'
        )
    properties = _mapping(message, "properties", job_id)
    tag = properties.get("delivery_tag")
    if not isinstance(tag, str) or not tag:
        raise MalformedMessage("properties.delivery_tag: must be a string", job_id)
    _check_form(message, headers, job_id)
    return Message(
        job_id=job_id,
        tag=tag,
        body=_body(message, properties, job_id),
        expires_ms=_expires_ms(headers.get("expires"), job_id),
        traceparent=valid_traceparent(headers.get("traceparent")),
    )


def _check_form(message: Mapping[str, Any], headers: Mapping[str, Any], job_id: str) -> None:
    wanted = {"content-type": "application/json", "content-encoding": "utf-8"}
    for field, value in wanted.items():
        if message.get(field) != value:
            raise MalformedMessage(f"{field}: must be {value!r} (got {_short(message.get(field))})", job_id)
    if headers.get("task") != TASK:
        raise MalformedMessage(f"headers.task: must be {TASK!r} (got {_short(headers.get('task'))})", job_id)
    for field in ("eta", "compression"):
        if headers.get(field) is not None:
            raise MalformedMessage(f"headers.{field}: not supported; leave it out", job_id)


def _body(message: Mapping[str, Any], properties: Mapping[str, Any], job_id: str) -> JobBody:
    text = message.get("body")
    encoding = properties.get("body_encoding")
    if not isinstance(text, str):
        raise MalformedMessage("body: must be a string holding JSON or base64", job_id)
    if encoding == "base64":
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise MalformedMessage("body: is not base64, as body_encoding says", job_id) from None
    elif encoding is None:
        data = text.encode("utf-8", "surrogatepass")
    else:
        raise MalformedMessage(f"properties.body_encoding: base64 or absent (got {_short(encoding)})", job_id)
    parts = _json(data, "body", job_id)
    if not isinstance(parts, list) or len(parts) != 3:
        raise MalformedMessage("body: must be a JSON array [args, kwargs, embed]", job_id)
    args, kwargs, embed = parts
    if args != []:
        raise MalformedMessage("body: args must be empty; give the fields of POST /v1/jobs as kwargs", job_id)
    if not isinstance(embed, Mapping | None) or any((embed or {}).values()):
        raise MalformedMessage("body: callbacks, errbacks, chains and chords are not supported", job_id)
    try:
        return parse_job(kwargs)
    except InvalidRequest as err:
        raise MalformedMessage(err.message, job_id) from None


def _expires_ms(value: Any, job_id: str) -> int | None:
    if value is None:
        return None
    try:
        # Python 3.10's fromisoformat knows no "Z".
        at = datetime.fromisoformat(value.replace("Z", "+00:00"))
        at = at if at.tzinfo else at.replace(tzinfo=timezone.utc)
        return round(at.timestamp() * 1000)
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise MalformedMessage(
            f"headers.expires: must be an ISO 8601 date (got {_short(value)})", job_id
        ) from None


def _json(data: bytes, what: str, job_id: str | None) -> Any:
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError):  # of bad JSON, bad UTF-8, absurd nesting, absurd numbers
        raise MalformedMessage(f"{what}: is not JSON in UTF-8", job_id) from None


def _mapping(message: Any, field: str, job_id: str | None) -> Mapping[str, Any]:
    if not isinstance(message, Mapping):
        raise MalformedMessage("message: must be a JSON object", job_id)
    value = message.get(field)
    if not isinstance(value, Mapping):
        raise MalformedMessage(f"{field}: must be a JSON object", job_id)
    return value


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
