"""The least of HTTP, server-sent events, websocket and Redis clients: cheap beside what they test.

HTTP/1.0, so that a stream is what comes until the end of the connection. Every stream yields events with
`seq` from `last + 1` on; `Broken` says that the connection failed, so that trying again is right.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import redis
from redis.asyncio import Redis
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Ping, RejectConnection, Request, TextMessage
from wsproto.utilities import ProtocolError

from wicore.queue.schema import Keys
from wicore.request import Event

IDLE_S = 40.0
"""Longer than the silence after which the service sends a comment or a ping."""
ANSWER_S = 80.0
"""A call that waits for its job's end says nothing before it."""
_HOST = "127.0.0.1"
_T = TypeVar("_T")


class Broken(Exception):
    """The connection failed or ended early."""


class Refused(Exception):
    """The service answered, but not with what was asked for."""

    def __init__(self, status: int, body: bytes | str) -> None:
        super().__init__(f"HTTP {status} {body!r:.300}")
        self.status = status
        self.retryable = status in (429, 503)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


async def _soon(reading: Coroutine[Any, Any, _T], within_s: float = IDLE_S) -> _T:
    """Raises TimeoutError. Cheaper than `wait_for`, which makes a task of every read."""
    async with asyncio.timeout(within_s):
        return await reading


@asynccontextmanager
async def _connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is reset at the end; failures inside, and silence while opening, are Broken."""
    writer = None
    try:
        reader, writer = await _soon(asyncio.open_connection(_HOST, port))
        yield reader, writer
    except (OSError, EOFError, asyncio.TimeoutError, ProtocolError) as err:
        raise Broken(str(err)) from None
    finally:
        if writer is not None:
            writer.transport.abort()


async def _ask(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, str]]:
    """Send a request, read the answer's head."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.0", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    writer.write("\r\n".join([*lines, "", ""]).encode() + data)
    head = (await _soon(reader.readuntil(b"\r\n\r\n"), ANSWER_S)).decode().split("\r\n")
    fields = (line.partition(": ") for line in head[1:] if line)
    return int(head[0].split()[1]), {name.lower(): value for name, _, value in fields}


async def ask(
    port: int, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> Answer:
    """One call. Raises Broken."""
    async with _connection(port) as (reader, writer):
        status, fields = await _ask(reader, writer, method, path, body, headers)
        text = await _soon(reader.readexactly(int(fields.get("content-length", 0))))
        return Answer(status, fields, text)


async def events(port: int, job: str, last: int) -> AsyncIterator[Event]:
    """`GET /v1/jobs/{id}/events`. Raises Broken, Refused; 204, nothing follows, is refused, too."""
    async with _connection(port) as (reader, writer):
        headers = {"Last-Event-ID": str(last)} if last else {}
        status, _ = await _ask(reader, writer, "GET", f"/v1/jobs/{job}/events", None, headers)
        if status != 200:
            raise Refused(status, await _soon(reader.read()))
        while line := await _soon(reader.readline()):
            if line.startswith(b"data: ") and line.endswith(b"\n"):
                event = json.loads(line[6:])
                if "seq" not in event:
                    raise Broken(str(event))
                yield event


class Socket:
    """A websocket that speaks JSON."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._protocol = WSConnection(ConnectionType.CLIENT)
        self._text = ""
        self._frames: list[Any] = []
        self._closed = False

    async def open(self, target: str) -> None:
        self._writer.write(self._protocol.send(Request(host=_HOST, target=target)))
        for event in await self._read():
            if isinstance(event, RejectConnection):
                raise Refused(event.status_code, "")
            if not isinstance(event, AcceptConnection):
                self._handle(event)

    def send(self, frame: Mapping[str, Any]) -> None:
        self._writer.write(self._protocol.send(TextMessage(json.dumps(frame))))

    async def receive(self) -> Any:
        """The next frame; None once the service has closed."""
        while not self._frames:
            if self._closed:
                return None
            for event in await self._read():
                self._handle(event)
        return self._frames.pop(0)

    async def _read(self) -> list[Any]:
        found: list[Any] = []
        while not found:
            data = await _soon(self._reader.read(65_536))
            if not data:
                raise Broken("the websocket ended without a close")
            self._protocol.receive_data(data)
            found = list(self._protocol.events())
        return found

    def _handle(self, event: Any) -> None:
        if isinstance(event, TextMessage):
            self._text += event.data
            if event.message_finished:
                self._frames.append(json.loads(self._text))
                self._text = ""
        elif isinstance(event, Ping):
            self._writer.write(self._protocol.send(event.response()))
        elif isinstance(event, CloseConnection):
            self._closed = True


@asynccontextmanager
async def socket(port: int, target: str) -> AsyncIterator[Socket]:
    """An open websocket. Raises Broken, Refused."""
    async with _connection(port) as streams:
        opened = Socket(*streams)
        await opened.open(target)
        yield opened


async def socket_events(port: int, job: str, last: int) -> AsyncIterator[Event]:
    """`WS /v1/jobs/{id}/stream`."""
    async with socket(port, f"/v1/jobs/{job}/stream?from={last + 1}") as opened:
        while (event := await opened.receive()) is not None:
            if "seq" not in event:
                raise Broken(str(event))
            yield event


async def redis_events(client: Redis, job: str, last: int) -> AsyncIterator[Event]:
    """Log, then channel; the log again whenever the channel was subscribed anew or has a gap."""
    keys = Keys()
    try:
        async with client.pubsub() as channel:
            await channel.subscribe(keys.events(job))
            while True:
                heard = await channel.get_message(timeout=IDLE_S)
                if heard is None:
                    raise Broken(f"no event for {IDLE_S:g} s")
                found = [json.loads(heard["data"])] if heard["type"] == "message" else []
                found = [event for event in found if event["seq"] > last]
                if heard["type"] == "subscribe" or (found and found[0]["seq"] != last + 1):
                    entries = await client.xrange(keys.log(job), f"(0-{last}", "+")
                    found = [json.loads(fields[b"event"]) for _, fields in entries]
                for event in found:
                    yield event
                    last = event["seq"]
    except (redis.ConnectionError, redis.TimeoutError, OSError) as err:
        raise Broken(str(err)) from None
