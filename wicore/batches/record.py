"""A batch as it is kept in Redis, and as OpenAI's batch object. Pure."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from wicore.access.keys import Limits
from wicore.openai.responses_api import response_usage
from wicore.request import usage_of

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
Which = Literal["output", "error"]

ENDED: frozenset[Status] = frozenset({"failed", "completed", "expired", "cancelled"})
WINDOW_S = 86_400
"""The one completion window, "24h"."""


@dataclass(frozen=True, slots=True)
class Output:
    """One of a batch's two files, as far as it is written."""

    file: str
    """The id that it has when the batch has ended."""
    pieces: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Times are ms of Redis TIME."""

    id: str
    client: str
    """Whose it is. Not shown."""
    status: Status
    endpoint: Endpoint
    input_file_id: str
    model: str
    metadata: dict[str, str]
    limits: Limits
    """Its client's when it was made."""
    lifetime_s: int
    """Of its output files."""
    created_ms: int
    deadline_ms: int
    times: dict[str, int]
    """When it came to a status: `in_progress` and those after it."""
    next: int
    """Number of the first line that is no job and has no answer, counting requests from 0."""
    total: int
    completed: int
    failed: int
    expired: int
    """Lines whose window closed."""
    input_tokens: int
    output_tokens: int
    errors: list[dict[str, Any]]
    """Why its file was refused."""
    output: Output
    error: Output

    def public(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        tokens = usage_of(self.input_tokens, self.output_tokens)
        at = {
            f"{status}_at": self.times[status] // 1000 if status in self.times else None for status in _DATED
        }
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": self._published(self.output),
            "error_file_id": self._published(self.error),
            "created_at": self.created_ms // 1000,
            "expires_at": self.deadline_ms // 1000,
            **at,
            "request_counts": {
                "total": self.total,
                "completed": self.completed,
                "failed": self.failed + self.expired,
            },
            "usage": response_usage(tokens),
            "metadata": self.metadata or None,
        }

    def _published(self, output: Output) -> str | None:
        return output.file if output.bytes and self.status in ENDED else None


_DATED: tuple[Status, ...] = (
    *("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"),
)


def new_batch_id() -> str:
    return f"batch_{uuid.uuid4().hex}"


def job_id(batch_id: str, line: int) -> str:
    """Of the job that a line becomes: always the same, so that no line becomes two."""
    return f"{batch_id}-{line}"


def batch_of(batch_id: str, fields: Mapping[bytes, bytes]) -> Batch:
    """A batch from the fields of its hash."""
    texts = {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}

    def number(name: str) -> int:
        return int(texts.get(name, 0))

    def output(which: Which) -> Output:
        return Output(texts[f"{which}_file"], number(f"{which}_pieces"), number(f"{which}_bytes"))

    return Batch(
        id=batch_id,
        client=texts["client"],
        status=cast(Status, texts["status"]),
        endpoint=cast(Endpoint, texts["endpoint"]),
        input_file_id=texts["input_file_id"],
        model=texts["model"],
        metadata=json.loads(texts["metadata"]),
        limits=Limits.model_validate_json(texts["limits"]),
        lifetime_s=number("lifetime_s"),
        created_ms=number("created_ms"),
        deadline_ms=number("deadline_ms"),
        times={status: number(f"{status}_ms") for status in _DATED if f"{status}_ms" in texts},
        next=number("next"),
        total=number("total"),
        completed=number("completed"),
        failed=number("failed"),
        expired=number("expired"),
        input_tokens=number("input_tokens"),
        output_tokens=number("output_tokens"),
        errors=json.loads(texts.get("errors", "[]")),
        output=output("output"),
        error=output("error"),
    )
