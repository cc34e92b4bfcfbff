"""What both clients do alike: what to send, what answers mean, and how to go on after a loss. No IO.

Server-sent events follow the WHATWG HTML standard, section 9.2.6.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import httpx

from wicore.access.keys import is_loopback
from wicore.errors import Cancelled, Expired, Unavailable, WicoreError, error_from_body
from wicore.request import STATUS_OF_TERMINAL, TERMINAL_TYPES, Event

Body = Mapping[str, Any]

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "WICORE_API_KEY"
PATIENCE_S = 60.0
"""How long a stream may make no progress, over all attempts to reconnect, before it is given up."""
ENDED = frozenset(STATUS_OF_TERMINAL.values())
"""Statuses of a job that has had its last event."""
ATTEMPTS = 3
"""Times that a call is sent whose answer was lost on the way."""
PAGE = 100
"""Most that the service lists at a time."""
NO_CONTENT = 204
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_SILENCE_S = 40
"""The service sends a comment every 15 s, so a longer silence is a dead connection."""


def options_of(url: str, api_key: str | None) -> dict[str, Any]:
    """What both of httpx's clients are made with. `api_key` None: that of the environment, if any."""
    key = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
    return {
        "base_url": url.rstrip("/"),
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        "timeout": httpx.Timeout(_SILENCE_S, connect=5),
        # A proxy from the environment cannot know this machine's own ports.
        "trust_env": not is_loopback(httpx.URL(url).host),
    }


def job_body(fields: Body) -> dict[str, Any]:
    """The body of `POST /v1/jobs`; `kind` follows from whether there is a prompt, unless it is given."""
    kind = "completion" if fields.get("prompt") is not None else "chat"
    return {"kind": kind, **fields}


def submit_headers(key: str | None) -> dict[str, str]:
    """With an idempotency key, so that a repeat after a lost answer finds the first call's job."""
    return {"Idempotency-Key": key or uuid.uuid4().hex}


def answer_of(response: httpx.Response) -> dict[str, Any]:
    """The JSON of a good answer; the body must have been read. Raises the error that it holds."""
    if response.is_error:
        raise error_of(response)
    with suppress(ValueError):
        answer: dict[str, Any] = response.json()
        return answer
    raise _foreign(response)


def error_of(response: httpx.Response) -> WicoreError:
    """The error of an answer whose body has been read."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        err = error_from_body(response.json()["error"])
        with suppress(ValueError):
            err.retry_after = float(response.headers.get("Retry-After", ""))
        return err
    return _foreign(response)


def _foreign(response: httpx.Response) -> WicoreError:
    return Unavailable(f"{response.url}: HTTP {response.status_code}, and not from WiCore; check --url")


def unreachable(url: str, err: httpx.TransportError) -> Unavailable:
    return Unavailable(
        f"{url}: not reachable ({reason(err)}); start the service with `wicore up`, "
        "or say where it is with --url"
    )


def reason(err: httpx.TransportError) -> str:
    return str(err) or type(err).__name__


def may_repeat(err: httpx.TransportError, attempt: int) -> bool:
    """Whether to send a call again: it reached the service, and only its answer was lost."""
    return attempt < ATTEMPTS and not isinstance(err, httpx.ConnectError | httpx.ConnectTimeout)


def failure_of(event: Event) -> WicoreError | None:
    """The error that a last event, or the record of an ended job, stands for; None if it ended well."""
    kind = event.get("status") or event["type"]
    if kind in ("done", "succeeded"):
        return None
    if event.get("error"):
        return error_from_body(event["error"])
    if kind == "cancelled":
        return Cancelled("the job was cancelled")
    if kind == "expired":
        return Expired("the job's deadline passed before it finished")
    return WicoreError("the job failed")


class EventReader:
    """Lines of a stream to the data of its events; one that the end of the stream cuts off is dropped."""

    def __init__(self) -> None:
        self._data: list[str] = []

    def feed(self, line: str) -> str | None:
        """The data of the event that this line ends, if it does."""
        field, _, value = line.partition(":")
        if field == "data":
            self._data.append(value.removeprefix(" "))
        elif not line and self._data:
            data, self._data = "\n".join(self._data), []
            return data
        return None


class Follower:
    """How far a job has been followed, and how long to go on trying when nothing comes."""

    def __init__(
        self, url: str, job: str, start: int, patience_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`start`: the first sequence number wanted."""
        self._url, self._job = url, job
        self.last = start - 1
        self.ended = False
        self._patience_s, self._clock = patience_s, clock
        self._pause = _FIRST_PAUSE_S
        self._deadline = clock() + patience_s

    @property
    def path(self) -> str:
        return f"/v1/jobs/{self._job}/events"

    @property
    def headers(self) -> dict[str, str]:
        return {"Last-Event-ID": str(self.last), "Accept": "text/event-stream"}

    def take(self, data: str) -> Event | None:
        """An event that was not there yet. Raises the error that the service sends instead of one."""
        event: Event = json.loads(data)
        if "seq" not in event:
            raise error_from_body(event.get("error", {}))
        if event["seq"] <= self.last:
            return None
        self.last = event["seq"]
        self.ended = event["type"] in TERMINAL_TYPES
        self._progressed()
        return event

    def opened(self, status: int) -> bool:
        """Whether a stream was opened; no content means that the last event came before."""
        self.ended = self.ended or status == NO_CONTENT
        return not self.ended

    def pause(self, err: Exception | None) -> float:
        """Seconds to wait before the next attempt; `err` ended this one, or nothing did.

        Raises `err` when trying again cannot help, Unavailable when patience is at its end.
        """
        if isinstance(err, WicoreError) and not err.retryable:
            raise err
        if self._clock() + self._pause > self._deadline:
            why = err.message if isinstance(err, WicoreError) else str(err or "") or "the stream ended early"
            raise Unavailable(
                f"{self._url}: no event of job {self._job} for {self._patience_s:g} s ({why}); the job goes "
                f"on without you: `wicore watch {self._job} --from {self.last + 1}`"
            )
        pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE_S)
        return pause

    def _progressed(self) -> None:
        self._deadline = self._clock() + self._patience_s
        self._pause = _FIRST_PAUSE_S
