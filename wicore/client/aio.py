"""The client for asyncio: as sync.py, with `await`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx

from wicore.client import wire
from wicore.client.wire import Body
from wicore.errors import QueueFull, RateLimited, WicoreError
from wicore.request import TERMINAL_TYPES, Event


class AsyncClient:
    """One service. Every failure is a WicoreError: the service's own, or Unavailable."""

    def __init__(
        self, url: str = wire.DEFAULT_URL, api_key: str | None = None, *, patience_s: float = wire.PATIENCE_S
    ) -> None:
        """As `Client`."""
        self.url = url.rstrip("/")
        self.patience_s = patience_s
        self._http = httpx.AsyncClient(**wire.options_of(url, api_key))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def submit(
        self, body: Body | None = None, *, idempotency_key: str | None = None, **fields: Any
    ) -> AsyncJob:
        """As `Client.submit`."""
        headers = wire.submit_headers(idempotency_key)
        sent = wire.job_body({**(body or {}), **fields})
        return self.job(str((await self.call("POST", "/v1/jobs", json=sent, headers=headers))["id"]))

    def job(self, job_id: str) -> AsyncJob:
        """A job that was submitted before, by whomever. Asks nothing of the service."""
        return AsyncJob(self, job_id)

    async def batch(self, bodies: Iterable[Body], *, return_errors: bool = False) -> list[Any]:
        """As `Client.batch`."""
        jobs = [await self._submit_patiently({"priority": "batch", **body}) for body in bodies]
        results: list[Any] = []
        for job in jobs:
            try:
                results.append(await job.result())
            except WicoreError as err:
                if not return_errors:
                    raise
                results.append(err)
        return results

    async def call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """As `Client.call`."""
        for attempt in range(1, wire.ATTEMPTS + 1):
            try:
                return wire.answer_of(await self._http.request(method, path, **options))
            except httpx.TransportError as err:
                if not wire.may_repeat(err, attempt):
                    raise wire.unreachable(self.url, err) from None
        raise AssertionError("the last attempt returns or raises")

    async def _submit_patiently(self, body: Body) -> AsyncJob:
        while True:
            try:
                return await self.submit(body)
            except (QueueFull, RateLimited) as err:
                await asyncio.sleep(err.retry_after or 1)

    async def _events(self, job_id: str, start: int) -> AsyncIterator[Event]:
        follower = wire.Follower(self.url, job_id, start, self.patience_s)
        while not follower.ended:
            failure: Exception | None = None
            try:
                async with self._http.stream("GET", follower.path, headers=follower.headers) as response:
                    if response.is_error:
                        await response.aread()
                        raise wire.error_of(response)
                    if follower.opened(response.status_code):
                        async for event in self._read(response, follower):
                            yield event
            except (httpx.TransportError, WicoreError) as err:
                failure = err
            if not follower.ended:
                await asyncio.sleep(follower.pause(failure))

    @staticmethod
    async def _read(response: httpx.Response, follower: wire.Follower) -> AsyncIterator[Event]:
        reader = wire.EventReader()
        async for line in response.aiter_lines():
            data = reader.feed(line)
            event = None if data is None else follower.take(data)
            if event is not None:
                yield event
            if follower.ended:
                return


class AsyncJob:
    """One job of a service."""

    def __init__(self, client: AsyncClient, job_id: str) -> None:
        self._client = client
        self.id = job_id

    def events(self, start: int = 1) -> AsyncIterator[Event]:
        """As `Job.events`."""
        return self._client._events(self.id, start)

    async def stream(self) -> AsyncIterator[str]:
        """As `Job.stream`."""
        async for event in self.events():
            if event["type"] == "token" and event["index"] == 0:
                yield event["text"]
            elif event["type"] in TERMINAL_TYPES and (err := wire.failure_of(event)) is not None:
                raise err

    async def result(self) -> dict[str, Any]:
        """As `Job.result`."""
        record = await self.record()
        if record["status"] not in wire.ENDED:
            async for _ in self.events(record["seq"] + 1):
                pass
            record = await self.record()
        if (err := wire.failure_of(record)) is not None:
            raise err
        result: dict[str, Any] = record["result"]
        return result

    async def record(self) -> dict[str, Any]:
        """As `Job.record`."""
        return await self._client.call("GET", f"/v1/jobs/{self.id}")

    async def cancel(self) -> dict[str, Any]:
        """As `Job.cancel`."""
        return await self._client.call("DELETE", f"/v1/jobs/{self.id}")

    def __repr__(self) -> str:
        return f"AsyncJob({self.id!r})"
