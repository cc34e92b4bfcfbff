"""The lines of a batch: what a file must hold, the job that a line means, and the line that answers it. Pure.

Forms after OpenAI's Batch API reference: request input object, request output object.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from wicore.access.keys import Limits
from wicore.batches.record import Batch, Endpoint, Which, job_id
from wicore.errors import Forbidden, InvalidRequest, WicoreError, error_from_body
from wicore.openai import chat_request, completion_request
from wicore.openai.responses_api import Stored, own_words, response_of, response_request
from wicore.queue.producer import JobRecord
from wicore.request import JobBody, Priority, Text, parse_model
from wicore.text.prompt import Prompt

MAX_LINES = 50_000
MAX_ERRORS = 100
"""How many faults of a file are told."""

Outcome = Literal["completed", "failed", "expired"]
Why = Literal["batch_expired", "batch_cancelled", "request_cancelled", "request_timeout", "request_lost"]

_REASONS: Mapping[Why, str] = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "The batch was cancelled before this request was executed.",
    "request_cancelled": "This request's job was cancelled.",
    "request_timeout": "This request did not finish within its own timeout.",
    "request_lost": "This request's job is gone; Redis lost it.",
}


class Line(BaseModel):
    """One request of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    custom_id: Annotated[Text, Field(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


def split(pieces: Iterable[bytes], longest: int) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, content) of every line that is not blank, of a file that comes in pieces.

    A line over `longest` bytes is cut to one byte more, so that it is found too long without being held.
    """
    number, rest = 1, b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for content in whole:
            if content.strip():
                yield number, content
            number += 1
        rest = rest[: longest + 1]
    if rest.strip():
        yield number, rest


class Checker:
    """Checks the lines of one file, in order."""

    def __init__(self, endpoint: Endpoint, longest: int) -> None:
        """`longest`: bytes that a line may have."""
        self._endpoint = endpoint
        self._longest = longest
        self._seen: set[str] = set()
        self.errors: list[dict[str, Any]] = []

    def check(self, number: int, content: bytes) -> bool:
        """Whether the line is a request; if not, `errors` says why."""
        if len(content) > self._longest:
            message = f"The line is longer than the {self._longest} bytes that api.max_body_bytes allows."
            return self._refuse("line_too_long", message, number, None)
        try:
            line = parse_line(content)
        except ValueError as err:
            return self._refuse(
                "invalid_json_line", f"This line is not parseable as valid JSON: {err}", number, None
            )
        except InvalidRequest as err:
            return self._refuse("invalid_request_line", err.message, number, err.param)
        if line.url != self._endpoint:
            message = f"url: must be the batch's endpoint, {self._endpoint!r} (got {line.url!r:.60})"
            return self._refuse("mismatched_url", message, number, "url")
        if line.custom_id in self._seen:
            message = f"custom_id: {line.custom_id!r:.60} is used by an earlier line"
            return self._refuse("duplicate_custom_id", message, number, "custom_id")
        self._seen.add(line.custom_id)
        if len(self._seen) > MAX_LINES:
            return self._refuse(
                "too_many_requests", f"The file holds over {MAX_LINES} requests.", number, None
            )
        return True

    @property
    def is_full(self) -> bool:
        """Whether enough is known of the file to stop here."""
        return len(self.errors) >= MAX_ERRORS or len(self._seen) > MAX_LINES

    def finish(self) -> None:
        """All lines were checked."""
        if not self._seen and not self.errors:
            self._refuse("empty_file", "The file holds no requests.", None, None)

    def _refuse(self, code: str, message: str, line: int | None, param: str | None) -> bool:
        self.errors.append({"code": code, "message": message, "line": line, "param": param})
        return False


def parse_line(content: bytes) -> Line:
    """Raises ValueError when it is no JSON in UTF-8, InvalidRequest when it is no request."""
    try:
        data = json.loads(content.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return parse_model(Line, data)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


@dataclass(frozen=True, slots=True)
class LineJob:
    """The job that a line asks for."""

    custom_id: str
    body: JobBody
    priority: Priority
    prompt: Prompt
    stored: Stored | None
    """Of a response; also of one that asked not to be stored, until it is answered."""

    def fields(self) -> dict[str, str]:
        """What goes into the job's record beside the batch."""
        if self.stored is None:
            return {"custom_id": self.custom_id}
        kept = json.dumps(self.stored.as_json(), ensure_ascii=False)
        return {"custom_id": self.custom_id, "response": kept}


def job_of(endpoint: Endpoint, line: Line, limits: Limits, check: Callable[[JobBody], Prompt]) -> LineJob:
    """The job that a line asks for, of a client with these limits; `check` raises for one that cannot run.

    Raises InvalidRequest or Forbidden naming the field, or what `check` raises.
    """
    stored = None
    if endpoint == "/v1/responses":
        asked = response_request(line.body)
        for name in ("stream", "background", "previous_response_id"):
            _refuse_set(name, getattr(asked.form, name))
        body, stored = asked.job([], check), asked.stored([])
        with own_words():
            prompt = check(body)
    else:
        request = (chat_request if endpoint == "/v1/chat/completions" else completion_request)(line.body)
        _refuse_set("stream", request.stream)
        body, prompt = request.body, check(request.body)
    return LineJob(line.custom_id, body, _priority(body.priority, limits), prompt, stored)


def _priority(wanted: Priority | None, limits: Limits) -> Priority:
    """Never above batch, nor above what the client may use."""
    if wanted not in (None, Priority.BATCH, Priority.BACKGROUND):
        raise InvalidRequest("priority: of a batch's request must be batch or background", param="priority")
    if wanted is not None and wanted < limits.level:
        raise Forbidden(
            f"priority: {wanted.name.lower()} is above this key's highest, {limits.priority}",
            param="priority",
        )
    return max(Priority.BATCH, limits.level) if wanted is None else wanted


def _refuse_set(name: str, value: Any) -> None:
    if value:
        raise InvalidRequest(f"{name}: unsupported in a batch; leave it out", param=name)


# --- answers --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """A line of one of a batch's two files."""

    which: Which
    outcome: Outcome
    custom_id: str
    text: str
    """With its newline."""
    input_tokens: int = 0
    output_tokens: int = 0


def refused(batch_id: str, number: int, custom_id: str, err: WicoreError) -> Answer:
    """Of a request that was no job."""
    return _response(batch_id, number, custom_id, err.status, {"error": err.body()}, "error")


def called_off(batch_id: str, number: int, custom_id: str, why: Why) -> Answer:
    """Of a request that was not, or not wholly, executed."""
    error = {"code": why, "message": _REASONS[why]}
    text = _line(batch_id, number, custom_id, None, error)
    return Answer("error", "expired" if why == "batch_expired" else "failed", custom_id, text)


def answered(batch: Batch, number: int, record: JobRecord, custom_id: str) -> Answer:
    """Of a request whose job has ended."""
    usage = record.usage or {}
    tokens = (usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))
    return replace(_ended(batch, number, record, custom_id), input_tokens=tokens[0], output_tokens=tokens[1])


def _ended(batch: Batch, number: int, record: JobRecord, custom_id: str) -> Answer:
    if record.result is not None:
        body = record.result
        if record.response is not None:
            body = response_of(record, Stored.from_json(record.response), batch.model)
        return _response(batch.id, number, custom_id, 200, body, "output")
    if record.status == "expired":
        closed = record.finished_ms is not None and record.finished_ms >= batch.deadline_ms
        return called_off(batch.id, number, custom_id, "batch_expired" if closed else "request_timeout")
    if record.status == "cancelled":
        by_batch = batch.status == "cancelling"
        return called_off(batch.id, number, custom_id, "batch_cancelled" if by_batch else "request_cancelled")
    error = record.error or WicoreError("The job failed.").body()
    return _response(batch.id, number, custom_id, error_from_body(error).status, {"error": error}, "error")


def _response(
    batch_id: str, number: int, custom_id: str, status: int, body: Mapping[str, Any], which: Which
) -> Answer:
    response = {"status_code": status, "request_id": job_id(batch_id, number), "body": body}
    text = _line(batch_id, number, custom_id, response, None)
    return Answer(which, "completed" if which == "output" else "failed", custom_id, text)


def _line(batch_id: str, number: int, custom_id: str, response: Any, error: Any) -> str:
    data = {
        "id": f"batch_req_{batch_id.removeprefix('batch_')}_{number}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n"
