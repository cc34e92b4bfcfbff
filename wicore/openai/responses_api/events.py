"""A job's events as the Responses API streams them. Pure.

The numbers of the stream follow from the job's log alone, from its first event on: whoever reads the log
again, in whatever process, gives the same events the same numbers. So a stream is resumed by reading the log
from its start and leaving out what the client has.
"""

from __future__ import annotations

from typing import Any

from wicore.openai.responses_api.items import Item
from wicore.openai.responses_api.request import Stored
from wicore.openai.responses_api.response import Status, message_item, response_object, text_part
from wicore.request import TERMINAL_TYPES, Event

StreamEvent = dict[str, Any]
"""{"type", "sequence_number", ...}."""


class EventWriter:
    """Turns one job's events, all of them and in order, into the stream's."""

    def __init__(self, job_id: str, stored: Stored, model: str, created_s: int) -> None:
        self._job_id = job_id
        self._stored = stored
        self._model = model
        self._created_s = created_s
        self._number = 0
        self._text: list[str] = []
        self._logprobs: list[Any] = []
        self._has_item = False
        self._place = {"item_id": f"msg_{job_id}", "output_index": 0, "content_index": 0}

    def opening(self) -> list[StreamEvent]:
        """What a stream starts with, before the job's first event."""
        status: Status = "queued" if self._stored.background else "in_progress"
        events = [self._about("response.created", status)]
        return [*events, self._about("response.queued", status)] if self._stored.background else events

    def events(self, event: Event, finished_s: int | None = None) -> list[StreamEvent]:
        """What one event of the job becomes; `finished_s`, with the last one, is when the job ended."""
        if event["type"] == "started":
            return [self._about("response.in_progress", "in_progress")]
        if event["type"] == "token":
            return self._token(event)
        if event["type"] in TERMINAL_TYPES:
            return self._ending(event, finished_s)
        return []

    def partial(self) -> list[Item]:
        """The output so far, of a job that ended without completing it."""
        if not self._has_item:
            return []
        return [message_item(self._job_id, "incomplete", "".join(self._text), self._logprobs)]

    def error(self, body: dict[str, Any]) -> StreamEvent:
        """That the stream, not the job, failed; `body` as `WicoreError.body` makes it."""
        return self._event("error", {name: body[name] for name in ("code", "message", "param")})

    def _token(self, event: Event) -> list[StreamEvent]:
        text, logprobs = event["text"], event.get("logprobs") or []
        self._text.append(text)
        self._logprobs += logprobs
        events = [] if self._has_item else self._begin_item()
        if text or logprobs:
            delta = {**self._place, "delta": text, "logprobs": logprobs}
            events.append(self._event("response.output_text.delta", delta))
        return events

    def _begin_item(self) -> list[StreamEvent]:
        self._has_item = True
        item = message_item(self._job_id, "in_progress", None)
        return [
            self._event("response.output_item.added", {"output_index": 0, "item": item}),
            self._event("response.content_part.added", {**self._place, "part": text_part("", [])}),
        ]

    def _ending(self, event: Event, finished_s: int | None) -> list[StreamEvent]:
        usage = event.get("usage")
        if event["type"] != "done":
            status: Status = "cancelled" if event["type"] == "cancelled" else "failed"
            # There is no event of OpenAI's for a cancelled response; its status says what it is.
            kind = "response.incomplete" if status == "cancelled" else "response.failed"
            ending = {"output": self.partial(), "usage": usage, "error": event.get("error")}
            return [self._about(kind, status, **ending)]
        events = [] if self._has_item else self._begin_item()
        status = "incomplete" if event.get("finish_reason") == "length" else "completed"
        text = "".join(self._text)
        item = message_item(self._job_id, status, text, self._logprobs)
        part = text_part(text, self._logprobs)
        done = {**self._place, "text": text, "logprobs": self._logprobs}
        return [
            *events,
            self._event("response.output_text.done", done),
            self._event("response.content_part.done", {**self._place, "part": part}),
            self._event("response.output_item.done", {"output_index": 0, "item": item}),
            self._about(f"response.{status}", status, output=[item], usage=usage, completed_s=finished_s),
        ]

    def _about(self, kind: str, status: Status, **more: Any) -> StreamEvent:
        response = response_object(self._job_id, self._stored, self._model, self._created_s, status, **more)
        return self._event(kind, {"response": response})

    def _event(self, kind: str, fields: dict[str, Any]) -> StreamEvent:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event
