"""The client for code that waits."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpx

from wicore.client import wire
from wicore.client.wire import Body
from wicore.errors import QueueFull, RateLimited, WicoreError
from wicore.request import TERMINAL_TYPES, Event


class Client:
    """One service. Thread-safe. Every failure is a WicoreError: the service's own, or Unavailable."""

    def __init__(
        self, url: str = wire.DEFAULT_URL, api_key: str | None = None, *, patience_s: float = wire.PATIENCE_S
    ) -> None:
        """`api_key` is the service's; None: what the variable WICORE_API_KEY holds. `patience_s`: how long a
        stream may make no progress, reconnecting, before it raises Unavailable."""
        self.url = url.rstrip("/")
        self.patience_s = patience_s
        self._http = httpx.Client(**wire.options_of(url, api_key))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit(self, body: Body | None = None, *, idempotency_key: str | None = None, **fields: Any) -> Job:
        """Put a job on the queue: the fields of `POST /v1/jobs`, as a mapping or one by one.

        When the answer is lost the call is repeated, under a key that makes that one job.
        Raises InvalidRequest, QueueFull and what else the service answers.
        """
        headers = wire.submit_headers(idempotency_key)
        sent = wire.job_body({**(body or {}), **fields})
        return self.job(str(self.call("POST", "/v1/jobs", json=sent, headers=headers)["id"]))

    def job(self, job_id: str) -> Job:
        """A job that was submitted before, by whomever. Asks nothing of the service."""
        return Job(self, job_id)

    def batch(self, bodies: Iterable[Body], *, return_errors: bool = False) -> list[Any]:
        """Submit many jobs, at priority `batch` unless they say otherwise; their results, in order.

        While the queue is full it waits. Raises the first error of a job, unless they are to be returned in
        the results' places.
        """
        jobs = [self._submit_patiently({"priority": "batch", **body}) for body in bodies]
        results: list[Any] = []
        for job in jobs:
            try:
                results.append(job.result())
            except WicoreError as err:
                if not return_errors:
                    raise
                results.append(err)
        return results

    def call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Any other door: the JSON that it answers. `options` are those of httpx's `request`."""
        for attempt in range(1, wire.ATTEMPTS + 1):
            try:
                return wire.answer_of(self._http.request(method, path, **options))
            except httpx.TransportError as err:
                if not wire.may_repeat(err, attempt):
                    raise wire.unreachable(self.url, err) from None
        raise AssertionError("the last attempt returns or raises")

    def dead_letters(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """The messages given up, newest first, cut; `limit` of them or all, read page by page."""
        query: dict[str, Any] = {"limit": wire.PAGE if limit is None else min(limit, wire.PAGE)}
        left = limit
        while left is None or left > 0:
            page = self.call("GET", "/v1/dead", params=query)
            yield from page["data"][:left]
            if not page["has_more"]:
                return
            left = None if left is None else left - len(page["data"])
            query["after"] = page["data"][-1]["id"]

    def dead_letter(self, letter: str) -> dict[str, Any]:
        """One of them, whole. Raises UnknownDeadLetter."""
        return self.call("GET", f"/v1/dead/{letter}")

    def retry(self, letter: str) -> Job:
        """Put a dead letter's job on the queue anew; a repeat gives the same job."""
        return self.job(str(self.call("POST", f"/v1/dead/{letter}/retry")["id"]))

    def drop(self, letter: str) -> None:
        """Remove a dead letter for good. Raises UnknownDeadLetter."""
        self.call("DELETE", f"/v1/dead/{letter}")

    def drop_all(self) -> int:
        """Remove all dead letters; returns how many there were."""
        return int(self.call("DELETE", "/v1/dead")["dropped"])

    def _submit_patiently(self, body: Body) -> Job:
        while True:
            try:
                return self.submit(body)
            except (QueueFull, RateLimited) as err:
                time.sleep(err.retry_after or 1)

    def _events(self, job_id: str, start: int) -> Iterator[Event]:
        follower = wire.Follower(self.url, job_id, start, self.patience_s)
        while not follower.ended:
            failure: Exception | None = None
            try:
                with self._http.stream("GET", follower.path, headers=follower.headers) as response:
                    if response.is_error:
                        response.read()
                        raise wire.error_of(response)
                    if follower.opened(response.status_code):
                        yield from self._read(response, follower)
            except (httpx.TransportError, WicoreError) as err:
                failure = err
            if not follower.ended:
                time.sleep(follower.pause(failure))

    @staticmethod
    def _read(response: httpx.Response, follower: wire.Follower) -> Iterator[Event]:
        reader = wire.EventReader()
        for line in response.iter_lines():
            data = reader.feed(line)
            event = None if data is None else follower.take(data)
            if event is not None:
                yield event
            if follower.ended:
                return


class Job:
    """One job of a service."""

    def __init__(self, client: Client, job_id: str) -> None:
        self._client = client
        self.id = job_id

    def events(self, start: int = 1) -> Iterator[Event]:
        """Its events from sequence number `start` on, each once and in order, to the last.

        A connection that drops is taken up again after the last event received, also when the API restarts.
        Raises UnknownJob, or Unavailable after `patience_s` without progress.
        """
        return self._client._events(self.id, start)

    def stream(self) -> Iterator[str]:
        """The text of its first choice as it comes. Raises as `events`, and the error that it ends with."""
        for event in self.events():
            if event["type"] == "token" and event["index"] == 0:
                yield event["text"]
            elif event["type"] in TERMINAL_TYPES and (err := wire.failure_of(event)) is not None:
                raise err

    def result(self) -> dict[str, Any]:
        """Wait for its end; what a completion door would answer. Raises the error that it ends with."""
        record = self.record()
        if record["status"] not in wire.ENDED:
            for _ in self.events(record["seq"] + 1):
                pass
            record = self.record()
        if (err := wire.failure_of(record)) is not None:
            raise err
        result: dict[str, Any] = record["result"]
        return result

    def record(self) -> dict[str, Any]:
        """All that is known of it. Raises UnknownJob."""
        return self._client.call("GET", f"/v1/jobs/{self.id}")

    def cancel(self) -> dict[str, Any]:
        """Wish it cancelled; returns its record. A job that has ended stays as it is."""
        return self._client.call("DELETE", f"/v1/jobs/{self.id}")

    def __repr__(self) -> str:
        return f"Job({self.id!r})"
