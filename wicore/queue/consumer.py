"""Taking jobs out under a lease. `keeper.py` keeps the lease."""

from __future__ import annotations

import json
import select
import socket
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import redis

from wicore.config import QueueSettings
from wicore.errors import Unavailable
from wicore.queue.codec import MalformedMessage, Message, decode
from wicore.queue.connection import dedicated_connection, unavailable_on_failure
from wicore.queue.producer import record_fields
from wicore.queue.schema import Keys
from wicore.queue.scripts import Arg, Scripts
from wicore.request import JobBody, Priority


@dataclass(frozen=True, slots=True)
class Delivery:
    """One job leased to this worker."""

    job_id: str
    tag: str
    """Kombu's delivery tag: the name of the lease."""
    attempt: int
    """1 for the first; attempts handed back do not count."""
    fence: str
    """`owner:attempt`; every write on behalf of the job must carry it."""
    level: Priority
    suspect: bool
    """Its last worker died: at most one such job runs in a worker at a time."""
    raw: bytes
    body: JobBody
    created_ms: int
    popped_ms: int
    """Redis TIME of the pop; `deadline_ms - popped_ms` is what is left, whatever the local clock says."""
    deadline_ms: int | None
    seq: int
    """Last sequence number in the log; over 0 when an earlier attempt left events to go on from."""


class LeaseConsumer:
    """What a worker pulls from. One thread calls `pop`, `wait` and `hand_back`; `interrupt` is for any.

    Every method raises Unavailable when Redis is away; calling it again later is safe.
    """

    def __init__(
        self,
        client: redis.Redis,
        owner: str,
        prefix: str = "wicore",
        settings: QueueSettings | None = None,
    ) -> None:
        """`owner` names this process and must never be used by another one, not even later: `new_owner`."""
        self._client = client
        self._owner = owner
        keys = Keys(prefix)
        self._scripts = Scripts(client, keys, settings or QueueSettings())
        self._doorbell = Doorbell(client, [*keys.queues().values(), keys.suspect])
        self._suspect = keys.suspect
        self._taken = 0
        self._uncertain = False
        """A pop's answer was lost: there may be leases we know nothing of."""
        self._suspects_allowed = True

    def pop(self, n: int, *, held: Iterable[Delivery] = ()) -> list[Delivery]:
        """Take up to n messages in priority order, each under a lease of `lease_s`.

        `held` are all the deliveries the worker still has: while one of them is a suspect, no other
        suspect is taken. Jobs that must not run (cancelled, expired, finished, malformed) are ended here
        and not returned, so fewer than n may come although more wait.
        """
        holding = list(held)
        self._suspects_allowed = not any(delivery.suspect for delivery in holding)
        try:
            with unavailable_on_failure(self._client):
                if self._uncertain:
                    self._scripts.call("recover", self._owner, *(delivery.tag for delivery in holding))
                    self._uncertain = False
                rows = self._scripts.call("pop", self._owner, n, int(self._suspects_allowed), self._taken)
                self._taken += len(rows)
                return self._admit(rows)
        except Unavailable:
            self._uncertain = True
            raise

    def _admit(self, rows: list[list[Any]]) -> list[Delivery]:
        """Read the bodies; end what is malformed or late, complete the records that the pop made."""
        deliveries, calls, adopted = [], [], set()
        for row in rows:
            raw, tag, job_id, attempt = row[0], row[1].decode(), row[2].decode(), row[3]
            fence = f"{self._owner}:{attempt}"
            try:
                message = decode(raw)
            except MalformedMessage as err:
                calls.append(("finish", _rejection(job_id, fence, err)))
                continue
            deadline = int(row[7]) if row[7] else None
            if row[10]:
                deadline = _deadline_ms(message, created_ms=row[6])
                fields = [part for item in record_fields(message.body).items() for part in item]
                calls.append(("adopt", [job_id, fence, "" if deadline is None else deadline, *fields]))
                adopted.add(len(calls) - 1)
            deliveries.append(
                Delivery(
                    job_id=job_id,
                    tag=tag,
                    attempt=attempt,
                    fence=fence,
                    level=Priority(row[4]),
                    suspect=bool(row[5]),
                    raw=raw,
                    body=message.body,
                    created_ms=row[6],
                    popped_ms=row[9],
                    deadline_ms=deadline,
                    seq=row[8],
                )
            )
        if not calls:
            return deliveries
        ended = set()
        for i, ((_, args), reply) in enumerate(zip(calls, self._scripts.call_many(calls), strict=True)):
            if isinstance(reply, Exception):
                raise reply
            if i in adopted and reply == 0:
                ended.add(args[0])
        return [delivery for delivery in deliveries if delivery.job_id not in ended]

    def wait(self, timeout: float) -> bool:
        """Block until a message can be popped; True: call `pop`; False: timeout or `interrupt`.

        Wakes on pushes from any client, takes nothing itself, and may wake for nothing.
        """
        ignored = () if self._suspects_allowed else (self._suspect,)
        with unavailable_on_failure(self._client):
            return self._doorbell.wait(timeout, ignored)

    def interrupt(self) -> None:
        """Make the `wait` under way, or the next one, return at once."""
        self._doorbell.interrupt()

    def hand_back(self, deliveries: Iterable[Delivery]) -> None:
        """Put jobs back at the head of their queue, their attempt not counted; lost ones are skipped.

        Flush the publisher first: a handed-back delivery can append nothing more.
        """
        triples = [part for d in deliveries for part in (d.job_id, d.tag, d.fence)]
        if triples:
            with unavailable_on_failure(self._client):
                self._scripts.call("hand_back", *triples)

    def close(self) -> None:
        """Close the connections; leases are left to `hand_back` or expiry."""
        self._doorbell.close()


def new_owner() -> str:
    """A name for this process that no other ever has: host, then a random part."""
    return f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"


def _deadline_ms(message: Message, created_ms: int) -> int | None:
    """The sooner of Celery's `expires` and `timeout_s` counted from when the message was first seen."""
    timeout = message.body.timeout_s
    limits = [message.expires_ms, None if timeout is None else created_ms + round(timeout * 1000)]
    return min((limit for limit in limits if limit is not None), default=None)


def _rejection(job_id: str, fence: str, err: MalformedMessage) -> list[Arg]:
    """Arguments of finish.lua that fail the job and bury its message."""
    error = json.dumps(err.body())
    return [job_id, fence, "failed", "", "", "", "", error, "", type(err).__name__, err.message, err.reason]


class Doorbell:
    """Tells when one of several lists has something in it, without polling and without taking it.

    `BLMOVE list list RIGHT RIGHT` blocks until the list has an element and then moves its last element to
    where it was: one atomic command that changes nothing, so that no crash can lose a message. One
    connection a list stays blocked in it; `select` waits for all. Not thread-safe but for `interrupt`.
    """

    _BLOCK_S = 10.0
    """How long the server blocks before it answers "nothing" and is asked anew: finds dead connections."""

    def __init__(self, client: redis.Redis, lists: Iterable[str]) -> None:
        self._client = client
        self._lists = list(lists)
        self._pending: dict[str, tuple[Any, float]] = {}
        """By list: the connection blocked in BLMOVE, and when it should have answered at the latest."""
        self._idle: dict[str, Any] = {}
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)

    def wait(self, timeout: float, ignored: Iterable[str] = ()) -> bool:
        """True when a list that is not ignored may have something. Raises redis.ConnectionError."""
        lists = [name for name in self._lists if name not in set(ignored)]
        end = time.monotonic() + timeout
        try:
            while True:
                for name in lists:
                    self._ask(name)
                now = time.monotonic()
                if self._overdue(now):
                    raise redis.ConnectionError("no answer to a blocking read")
                waiting = {self._pending[name][0]._sock: name for name in lists}
                soonest = min(self._pending[name][1] for name in lists)
                left = max(0.0, min(end, soonest) - now)
                ready, _, _ = select.select([self._wake_out, *waiting], [], [], left)
                if self._wake_out in ready:
                    self._drain()
                    return False
                if any([self._answer(waiting[sock]) for sock in ready]):
                    return True
                if not ready and time.monotonic() >= end:
                    return False
        except BaseException:
            self._disconnect()
            raise

    def interrupt(self) -> None:
        try:
            self._wake_in.send(b"!")
        except BlockingIOError:  # full of wake-ups already
            pass

    def close(self) -> None:
        self._disconnect()
        self._wake_out.close()
        self._wake_in.close()

    def _ask(self, name: str) -> None:
        if name in self._pending:
            return
        connection = self._idle.pop(name, None) or dedicated_connection(self._client)
        connection.send_command("BLMOVE", name, name, "RIGHT", "RIGHT", self._BLOCK_S, check_health=False)
        self._pending[name] = (connection, time.monotonic() + 2 * self._BLOCK_S)

    def _answer(self, name: str) -> bool:
        connection, _ = self._pending.pop(name)
        self._idle[name] = connection
        return connection.read_response(disable_decoding=True) is not None

    def _overdue(self, now: float) -> bool:
        return any(latest <= now for _, latest in self._pending.values())

    def _drain(self) -> None:
        try:
            while self._wake_out.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _disconnect(self) -> None:
        for connection in [*self._idle.values(), *(connection for connection, _ in self._pending.values())]:
            connection.disconnect()
        self._idle.clear()
        self._pending.clear()
