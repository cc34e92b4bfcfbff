"""The API as the commands use it: submit, follow, cancel."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import httpx

from wicore.access.keys import is_loopback
from wicore.errors import Cancelled, Expired, Unavailable, WicoreError, error_from_body
from wicore.request import TERMINAL_TYPES, Event

PATIENCE_S = 60.0
"""How long a stream may make no progress, over all attempts to reconnect, before it is given up."""

_PAGE = 100
"""Most dead letters that the service lists at a time."""


KEY_VARIABLE = "WICORE_API_KEY"
"""Where the commands find the key that they send; an option would show in the list of processes."""


class Client:
    """One service. Every failure is a WicoreError: the service's own, or Unavailable."""

    def __init__(self, url: str, patience_s: float = PATIENCE_S, key: str | None = None) -> None:
        """`key`: None is that of the environment, if there is one."""
        key = os.environ.get(KEY_VARIABLE) if key is None else key
        self.url = url.rstrip("/")
        self.patience_s = patience_s
        # The service sends a comment every 15 s, so a silence of 40 s is a dead connection.
        timeout = httpx.Timeout(40, connect=5)
        # A proxy from the environment cannot know this machine's own ports.
        self._http = httpx.Client(
            base_url=self.url,
            timeout=timeout,
            trust_env=not is_loopback(httpx.URL(url).host),
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit(self, body: dict[str, Any]) -> str:
        """Put a job on the queue; returns its id."""
        return str(self._call("POST", "/v1/jobs", json=body)["id"])

    def cancel(self, job: str) -> dict[str, Any]:
        """Wish a job cancelled; returns its record. A job that has ended stays as it is."""
        return self._call("DELETE", f"/v1/jobs/{job}")

    def dead_letters(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """The messages given up, newest first, cut; `limit` of them or all, read page by page."""
        query: dict[str, Any] = {"limit": _PAGE if limit is None else min(limit, _PAGE)}
        left = limit
        while left is None or left > 0:
            page = self._call("GET", "/v1/dead", params=query)
            yield from page["data"][:left]
            if not page["has_more"]:
                return
            left = None if left is None else left - len(page["data"])
            query["after"] = page["data"][-1]["id"]

    def dead_letter(self, letter: str) -> dict[str, Any]:
        """One of them, whole. Raises UnknownDeadLetter."""
        return self._call("GET", f"/v1/dead/{letter}")

    def retry(self, letter: str) -> str:
        """Put a dead letter's job on the queue anew; returns the new job's id; a repeat gives the same."""
        return str(self._call("POST", f"/v1/dead/{letter}/retry")["id"])

    def drop(self, letter: str) -> None:
        """Remove a dead letter for good. Raises UnknownDeadLetter."""
        self._call("DELETE", f"/v1/dead/{letter}")

    def drop_all(self) -> int:
        """Remove all dead letters; returns how many there were."""
        return int(self._call("DELETE", "/v1/dead")["dropped"])

    def events(self, job: str, start: int = 1) -> Iterator[Event]:
        """The job's events from sequence number `start` on, each once and in order.

        Ends after the terminal event. A connection that drops is taken up again after the last event
        received. Raises UnknownJob, or Unavailable after `patience_s` without progress.
        """
        last = start - 1
        deadline = time.monotonic() + self.patience_s
        pause = 0.1
        while True:
            failure = "the stream ended early"
            try:
                for event in self._stream(job, last):
                    if event["seq"] <= last:
                        continue
                    yield event
                    last = event["seq"]
                    deadline, pause = time.monotonic() + self.patience_s, 0.1
                    if event["type"] in TERMINAL_TYPES:
                        return
            except _NothingFollows:
                return
            except httpx.TransportError as err:
                failure = _reason(err)
            except WicoreError as err:
                if not err.retryable:
                    raise
                failure = err.message
            if time.monotonic() + pause > deadline:
                raise Unavailable(
                    f"{self.url}: no event of job {job} for {self.patience_s:g} s ({failure}); the job "
                    f"goes on without you: `wicore watch {job} --from {last + 1}`"
                )
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def _stream(self, job: str, last: int) -> Iterator[Event]:
        headers = {"Last-Event-ID": str(last), "Accept": "text/event-stream"}
        with self._http.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as response:
            if response.status_code == 204:
                raise _NothingFollows
            if response.is_error:
                response.read()
                raise _error(response)
            for data in server_sent_events(response.iter_lines()):
                event: Event = json.loads(data)
                if "seq" not in event:
                    raise error_from_body(event.get("error", {}))
                yield event

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as err:
            raise Unavailable(
                f"{self.url}: not reachable ({_reason(err)}); start the service with `wicore up`, "
                "or say where it is with --url"
            ) from None
        if response.is_error:
            raise _error(response)
        answer: dict[str, Any] = response.json()
        return answer


class _NothingFollows(Exception):
    """The service says that no event follows: the terminal one came before `start`."""


def failure_of(event: Event) -> WicoreError | None:
    """The error that a terminal event stands for; None for `done`."""
    if event["type"] == "done":
        return None
    if "error" in event:
        return error_from_body(event["error"])
    if event["type"] == "cancelled":
        return Cancelled("the job was cancelled")
    if event["type"] == "expired":
        return Expired("the job's deadline passed before it finished")
    return WicoreError("the job failed")


def server_sent_events(lines: Iterable[str]) -> Iterator[str]:
    """The data of each event of a stream, after the WHATWG HTML standard, section 9.2.6.

    An event that the end of the stream cuts off is dropped, as the standard says.
    """
    data: list[str] = []
    for line in lines:
        field, _, value = line.partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []


def _error(response: httpx.Response) -> WicoreError:
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        return error_from_body(response.json()["error"])
    return Unavailable(f"{response.url}: HTTP {response.status_code}, and not from WiCore; check --url")


def _reason(err: httpx.TransportError) -> str:
    return str(err) or type(err).__name__
