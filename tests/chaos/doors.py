"""Clients: each takes a ticket through one door to its terminal event, whatever breaks meanwhile.

socket   POST /v1/jobs with an idempotency key, then WS /v1/jobs/{id}/stream
events   the same, then GET /v1/jobs/{id}/events
answer   POST /v1/completions or /v1/chat/completions with an idempotency key, no stream
redis    LPUSH of a message, then its log and channel
shared   WS /v1/stream, several jobs on one socket
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any

import redis
from redis.asyncio import Redis

from tests.chaos import wire
from tests.chaos.jobs import Ticket
from tests.messages import raw
from wicore.queue.schema import Keys
from wicore.request import Event, Priority

PATIENCE_S = 90.0
"""How long a job may make no progress for its client: far longer than any fault lasts."""
_LINGER_S = 0.2
"""How long a shared socket is read on after its last job's end: nothing may come."""


class _GivenUp(Exception):
    """The service said something final that it must not say; it has been noted."""


class Clients:
    """All clients of a run. What a client should never see is noted in `faults`."""

    def __init__(self, ports: Sequence[int], store: Redis, rng: random.Random) -> None:
        self._ports = ports
        self._redis = store
        self._rng = rng
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._cancels: set[asyncio.Task[None]] = set()

    async def serve(self, tickets: list[Ticket]) -> None:
        """Take one ticket, or several of the door `shared`, to the end."""
        door = tickets[0].door
        serving = self._by_shared(tickets) if door == "shared" else getattr(self, f"_by_{door}")(tickets[0])
        await self._within_patience(tickets, serving)

    async def close(self) -> None:
        """Wait for the cancels under way."""
        await asyncio.gather(*self._cancels)

    def _blame(self, ticket: Ticket, what: str) -> None:
        self.faults.append(f"ticket {ticket.number} (door {ticket.door}, job {ticket.job}): {what}")

    async def _within_patience(self, tickets: Sequence[Ticket], serving: Coroutine[Any, Any, None]) -> None:
        """Watch that events keep coming: a job that stands still is a fault, and is given up."""
        task = asyncio.create_task(serving)
        seen, since = -1, time.monotonic()
        try:
            while not task.done():
                await asyncio.wait([task], timeout=1.0)
                total = sum(ticket.heard.last for ticket in tickets)
                if total != seen:
                    seen, since = total, time.monotonic()
                elif time.monotonic() - since > PATIENCE_S:
                    self._blame(tickets[0], f"no event for {PATIENCE_S:g} s, after {seen}")
                    return
            with suppress(_GivenUp):
                task.result()
        finally:
            while not task.done():
                # More than once: redis-py, closing a broken connection, may put its error in place of ours.
                task.cancel()
                await asyncio.wait([task], timeout=1.0)

    # --- one job ----------------------------------------------------------------------------------

    async def _by_socket(self, ticket: Ticket) -> None:
        await self._submit(ticket)
        await self._follow(ticket, lambda last: wire.socket_events(self._port(), str(ticket.job), last))

    async def _by_events(self, ticket: Ticket) -> None:
        await self._submit(ticket)
        await self._follow(ticket, lambda last: wire.events(self._port(), str(ticket.job), last))

    async def _by_answer(self, ticket: Ticket) -> None:
        body = {name: value for name, value in ticket.body.items() if name != "kind"}
        answer = await self._persist(
            ticket, "POST", str(ticket.kind.openai_path), body, wanted={200, 409, 504}
        )
        ticket.job = answer.headers.get("x-job-id")
        ticket.answer = answer.json()

    async def _by_redis(self, ticket: Ticket) -> None:
        ticket.job = f"pushed-{ticket.number}"
        body = json.dumps([[], ticket.body, {}])
        tag = {"delivery_tag": f"tag-{ticket.job}"}
        message = raw(body=body, headers__id=ticket.job, properties=tag)
        queue = Keys().queue(Priority[ticket.priority.upper()])
        for _ in range(ticket.copies):
            await self._push(ticket, queue, message)
        await self._follow(ticket, lambda last: wire.redis_events(self._redis, str(ticket.job), last))

    async def _push(self, ticket: Ticket, queue: str, message: bytes) -> None:
        """LPUSH until it is confirmed: each try may have taken effect."""
        while True:
            ticket.sends += 1
            try:
                await self._redis.lpush(queue, message)
                return
            except (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError, OSError):
                await self._pause()

    async def _submit(self, ticket: Ticket) -> None:
        answer = await self._persist(ticket, "POST", "/v1/jobs", ticket.body, wanted={202})
        ticket.job = answer.json()["id"]

    async def _persist(
        self, ticket: Ticket, method: str, path: str, body: Any, *, wanted: set[int]
    ) -> wire.Answer:
        """Call until the answer is other than "try again". Raises _GivenUp when it is not wanted."""
        headers = {"Idempotency-Key": f"ticket-{ticket.number}"} if method == "POST" else {}
        while True:
            try:
                answer = await wire.ask(self._port(), method, path, body, headers)
                if answer.status in wanted:
                    return answer
                if answer.status not in (429, 503):
                    self._blame(ticket, f"{method} {path} answered {answer.status}: {answer.body!r:.200}")
                    raise _GivenUp
                self.counts[f"HTTP {answer.status} answers, tried again"] += 1
            except wire.Broken:
                self.counts["calls that broke, tried again"] += 1
            await self._pause()

    async def _follow(self, ticket: Ticket, stream: Callable[[int], AsyncIterator[Event]]) -> None:
        """Read to the terminal event and on to the end of the stream; leave and come back as planned."""
        heard = ticket.heard
        while heard.ended is None:
            self._maybe_cancel(ticket)
            try:
                async with aclosing(stream(heard.last)) as events:  # type: ignore[type-var]
                    async for event in events:
                        heard.take(event, time.monotonic())
                        self._maybe_cancel(ticket)
                        if heard.ended and ticket.door == "redis":
                            return
                        if heard.last in ticket.leave_at and not heard.ended:
                            ticket.leave_at.remove(heard.last)
                            self.counts["streams left by their client"] += 1
                            break
            except wire.Broken:
                self.counts["streams that broke"] += heard.ended is None
            except wire.Refused as err:
                if not err.retryable:
                    self._blame(ticket, f"asked for what follows event {heard.last}: {err}")
                    raise _GivenUp from None
            if heard.ended is None:
                self.counts["reconnects"] += 1
                await self._pause()

    # --- several jobs on one socket ---------------------------------------------------------------

    async def _by_shared(self, tickets: list[Ticket]) -> None:
        while any(ticket.heard.ended is None for ticket in tickets):
            try:
                async with wire.socket(self._port(), "/v1/stream") as socket:
                    await self._converse(socket, tickets)
            except wire.Broken:
                self.counts["streams that broke"] += 1
            except wire.Refused as err:
                if not err.retryable:
                    self._blame(tickets[0], f"WS /v1/stream: {err}")
                    raise _GivenUp from None
            if any(ticket.heard.ended is None for ticket in tickets):
                self.counts["reconnects"] += 1
                await self._pause()

    async def _converse(self, socket: wire.Socket, tickets: list[Ticket]) -> None:
        """Submit or resume each job, then read until all have ended, the socket closes or is left."""
        for ticket in tickets:
            if ticket.job is None:
                ticket.sends += 1
                socket.send({"type": "submit", "ref": ticket.number, **ticket.body})
            elif ticket.heard.ended is None:
                socket.send({"type": "resume", "job": ticket.job, "from": ticket.heard.last + 1})
        while any(ticket.heard.ended is None for ticket in tickets):
            frame = await socket.receive()
            if frame is None or self._hear(frame, tickets):
                return
            for ticket in tickets:
                if ticket.job is not None and self._wants_cancel(ticket):
                    socket.send({"type": "cancel", "job": ticket.job})
                    # The command may be lost with the socket, so call, too.
                    self._maybe_cancel(ticket)
        await self._hear_nothing(socket, tickets[0])

    def _hear(self, frame: dict[str, Any], tickets: list[Ticket]) -> bool:
        """Take one frame; whether to leave the socket after it."""
        if "seq" in frame:
            ticket = next(ticket for ticket in tickets if ticket.job == frame["job"])
            ticket.heard.take(frame, time.monotonic())
            if ticket.heard.last in ticket.leave_at:
                ticket.leave_at.remove(ticket.heard.last)
                self.counts["streams left by their client"] += 1
                return True
        elif frame["type"] == "accepted":
            next(ticket for ticket in tickets if ticket.number == frame["ref"]).job = frame["job"]
        elif frame["type"] == "error":
            self.counts["error frames"] += 1
            if frame["error"]["code"] != "unavailable":
                self._blame(tickets[0], f"WS /v1/stream: {json.dumps(frame):.200}")
                raise _GivenUp
            return True
        return False

    async def _hear_nothing(self, socket: wire.Socket, ticket: Ticket) -> None:
        try:
            frame = await asyncio.wait_for(socket.receive(), _LINGER_S)
        except asyncio.TimeoutError:
            return
        if frame is not None and "seq" in frame:
            self._blame(ticket, f"after the end of all jobs of the socket came {json.dumps(frame):.200}")

    # --- cancelling -------------------------------------------------------------------------------

    def _wants_cancel(self, ticket: Ticket) -> bool:
        return ticket.cancel_at is not None and ticket.heard.last >= ticket.cancel_at

    def _maybe_cancel(self, ticket: Ticket) -> None:
        if not self._wants_cancel(ticket):
            return
        ticket.cancel_at = None

        async def call() -> None:
            # A pushed message that no worker has seen has no record yet; the wish is kept all the same.
            wanted = {200, 404} if ticket.door == "redis" else {200}
            with suppress(_GivenUp):
                await self._persist(ticket, "DELETE", f"/v1/jobs/{ticket.job}", None, wanted=wanted)

        task = asyncio.create_task(call())
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    def _port(self) -> int:
        return self._rng.choice(self._ports)

    async def _pause(self) -> None:
        await asyncio.sleep(self._rng.uniform(0.02, 0.2))
