"""A job's events as the Responses API streams them. Pure.

The numbers of the stream follow from the job's log alone, from its first event on: whoever reads the log
again, in whatever process, gives the same events the same numbers. So a stream is resumed by reading the log
from its start and leaving out what the client has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wicore.openai.responses_api.items import Item
from wicore.openai.responses_api.request import Stored
from wicore.openai.responses_api.response import (
    Status,
    call_item,
    message_item,
    response_object,
    text_part,
)
from wicore.request import TERMINAL_TYPES, Event
from wicore.text.calls import AnswerReader, CallPiece

StreamEvent = dict[str, Any]
"""{"type", "sequence_number", ...}."""


class EventWriter:
    """Turns one job's events, all of them and in order, into the stream's.

    The output is one message, or the calls of functions, one item each.
    """

    def __init__(self, job_id: str, stored: Stored, model: str, created_s: int) -> None:
        self._job_id = job_id
        self._stored = stored
        self._model = model
        self._created_s = created_s
        self._number = 0
        self._reader = AnswerReader() if stored.may_call else None
        self._text: list[str] = []
        self._logprobs: list[Any] = []
        self._untold_logprobs: list[Any] = []
        self._has_message = False
        self._calls: list[tuple[str, list[str]]] = []
        """(name, pieces of arguments) of each."""

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
        if event["type"] == "done":
            return self._done(event, finished_s)
        if event["type"] in TERMINAL_TYPES:
            return self._failure(event)
        return []

    def partial(self) -> list[Item]:
        """The output so far, of a job that ended without completing it."""
        return self._items("incomplete") if self._has_message or self._calls else []

    def error(self, body: dict[str, Any]) -> StreamEvent:
        """That the stream, not the job, failed; `body` as `WicoreError.body` makes it."""
        return self._event("error", {name: body[name] for name in ("code", "message", "param")})

    def _token(self, event: Event) -> list[StreamEvent]:
        logprobs = event.get("logprobs") or []
        if self._reader is None:
            return self._say(event["text"], logprobs)
        said, pieces = self._reader.read(event["text"])
        if said or self._has_message:
            return self._say(said, logprobs)
        if not pieces:
            # Until it is known what the answer is; what a call is made of has no place for them.
            self._untold_logprobs += logprobs
        return [told for piece in pieces for told in self._call(piece)]

    # --- the message ----------------------------------------------------------------------------

    def _say(self, text: str, logprobs: Sequence[Any]) -> list[StreamEvent]:
        events = [] if self._has_message else self._begin_message()
        told, self._untold_logprobs = [*self._untold_logprobs, *logprobs], []
        self._text.append(text)
        self._logprobs += told
        if text or told:
            delta = {**self._place(), "delta": text, "logprobs": told}
            events.append(self._event("response.output_text.delta", delta))
        return events

    def _begin_message(self) -> list[StreamEvent]:
        self._has_message = True
        item = message_item(self._job_id, "in_progress", None)
        return [
            self._event("response.output_item.added", {"output_index": 0, "item": item}),
            self._event("response.content_part.added", {**self._place(), "part": text_part("", [])}),
        ]

    def _end_message(self, item: Item) -> list[StreamEvent]:
        (part,) = item["content"]
        done = {**self._place(), "text": part["text"], "logprobs": part["logprobs"]}
        return [
            self._event("response.output_text.done", done),
            self._event("response.content_part.done", {**self._place(), "part": part}),
            self._event("response.output_item.done", {"output_index": 0, "item": item}),
        ]

    def _place(self) -> dict[str, Any]:
        return {"item_id": message_item(self._job_id, "in_progress", None)["id"], **_FIRST_PART}

    # --- calls ----------------------------------------------------------------------------------

    def _call(self, piece: CallPiece) -> list[StreamEvent]:
        if piece.name is not None:
            ended = self._end_call(len(self._calls) - 1, "completed") if self._calls else []
            self._calls.append((piece.name, []))
            item = call_item(self._job_id, piece.index, "in_progress", piece.name, "")
            added = {"output_index": piece.index, "item": item}
            return [*ended, self._event("response.output_item.added", added)]
        self._calls[piece.index][1].append(piece.arguments)
        place = {"item_id": self._item_of_call(piece.index, "in_progress")["id"], "output_index": piece.index}
        return [self._event("response.function_call_arguments.delta", {**place, "delta": piece.arguments})]

    def _end_call(self, index: int, status: str) -> list[StreamEvent]:
        item = self._item_of_call(index, status)
        done = {"item_id": item["id"], "output_index": index, "name": item["name"]}
        done["arguments"] = item["arguments"]
        return [
            self._event("response.function_call_arguments.done", done),
            self._event("response.output_item.done", {"output_index": index, "item": item}),
        ]

    def _item_of_call(self, index: int, status: str) -> Item:
        name, arguments = self._calls[index]
        return call_item(self._job_id, index, status, name, "".join(arguments))

    # --- the end --------------------------------------------------------------------------------

    def _items(self, status: str) -> list[Item]:
        """The output as it is now; of several calls only the last can be anything but completed."""
        if not self._calls:
            return [message_item(self._job_id, status, "".join(self._text), self._logprobs)]
        last = len(self._calls) - 1
        return [self._item_of_call(i, status if i == last else "completed") for i in range(last + 1)]

    def _done(self, event: Event, finished_s: int | None) -> list[StreamEvent]:
        status: Status = "incomplete" if event.get("finish_reason") == "length" else "completed"
        events: list[StreamEvent] = []
        if not self._calls:
            events += self._say("", []) if self._untold_logprobs or not self._has_message else []
        items = self._items(status)
        if self._calls:
            events += self._end_call(len(self._calls) - 1, status)
        else:
            events += self._end_message(items[0])
        ending = {"output": items, "usage": event.get("usage"), "completed_s": finished_s}
        return [*events, self._about(f"response.{status}", status, **ending)]

    def _failure(self, event: Event) -> list[StreamEvent]:
        status: Status = "cancelled" if event["type"] == "cancelled" else "failed"
        # There is no event of OpenAI's for a cancelled response; its status says what it is.
        kind = "response.incomplete" if status == "cancelled" else "response.failed"
        ending = {"output": self.partial(), "usage": event.get("usage"), "error": event.get("error")}
        return [self._about(kind, status, **ending)]

    def _about(self, kind: str, status: Status, **more: Any) -> StreamEvent:
        response = response_object(self._job_id, self._stored, self._model, self._created_s, status, **more)
        return self._event(kind, {"response": response})

    def _event(self, kind: str, fields: dict[str, Any]) -> StreamEvent:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event


_FIRST_PART = {"output_index": 0, "content_index": 0}
