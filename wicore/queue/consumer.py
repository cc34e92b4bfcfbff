"""Taking jobs out under a lease, and keeping the lease."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import redis

from wicore.config import QueueSettings
from wicore.errors import Unavailable
from wicore.queue.codec import MalformedMessage, decode
from wicore.queue.connection import is_outage, unavailable_on_failure
from wicore.queue.doorbell import Doorbell
from wicore.queue.lifeline import DeathWatch
from wicore.queue.producer import record_fields
from wicore.queue.schema import Keys
from wicore.queue.scripts import Arg, Call, Scripts
from wicore.request import JobBody, Priority

log = logging.getLogger(__name__)

_EVERY_LEVEL = max(Priority) + 1
_REAPED_AT_ONCE = 100
"""Leases that one sweep takes: BATCH in reap.lua."""
_SWEEP_S = 1.0
"""How often the sweep runs at most: how late a dead worker or a passed deadline may be noticed."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One job leased to this worker."""

    job_id: str
    tag: str
    """Kombu's delivery tag: the name of the lease."""
    attempt: int
    """1 for the first; attempts handed back do not count."""
    fence: str
    """`owner:n` for the job's n-th lease; every write on behalf of the job must carry it."""
    level: Priority
    suspect: bool
    """Its last worker died: a worker tries one such job at a time."""
    raw: bytes
    body: JobBody
    created_ms: int
    popped_ms: int
    """Redis TIME of the pop; `deadline_ms - popped_ms` is what is left, whatever the local clock says."""
    deadline_ms: int | None
    seq: int
    """Last sequence number in the log; over 0 when an earlier attempt left events to go on from."""
    traceparent: str | None = None
    """The span of the submit, if it is traced."""


@dataclass(frozen=True, slots=True)
class Peeked:
    """A job that waits, and that nobody has been given."""

    job_id: str
    body: JobBody
    level: Priority


class LeaseConsumer:
    """What a worker pulls from. One thread calls `pop`, `wait`, `hand_back` and `give_up`; `interrupt` and
    `peek` are for any.

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
        settings = settings or QueueSettings()
        self._scripts = Scripts(client, keys, settings)
        self._max_wait_s = settings.max_wait_s
        self._lists = {keys.queue(level): level for level in keys.queues()}
        self._doorbell = Doorbell(client, [*self._lists, keys.suspect])
        self._suspect = keys.suspect
        self._taken = 0
        self._uncertain = False
        """A pop's answer was lost: there may be leases we know nothing of."""

    def pop(
        self,
        n: int,
        *,
        held: Iterable[Delivery] = (),
        suspects: bool = True,
        above: Priority | None = None,
    ) -> list[Delivery]:
        """Take up to n jobs by priority, the clients of a level in turn, each under a lease of `lease_s`.

        `held` are all the deliveries the worker still has. One suspect at most is taken, and none without
        `suspects`, which is right while one is on trial. With `above` only levels more urgent than that one
        are looked at, and no suspects.
        Jobs that must not run (cancelled, expired, finished, malformed) are ended here and not returned, so
        fewer than n may come although more wait.
        """
        suspects = suspects and above is None
        levels = _EVERY_LEVEL if above is None else int(above)
        try:
            with unavailable_on_failure(self._client):
                if self._uncertain:
                    self._scripts.call("recover", self._owner, *(delivery.tag for delivery in held))
                    self._uncertain = False
                rows = self._scripts.call("pop", self._owner, n, int(suspects), self._taken, levels)
                self._taken += len(rows)
                return self._admit(rows)
        except Unavailable:
            self._uncertain = True
            raise

    def _admit(self, rows: list[list[Any]]) -> list[Delivery]:
        """Read the bodies; end what is malformed or late, complete the records that the pop made."""
        deliveries: list[Delivery] = []
        calls: list[Call] = []
        adopted: set[int] = set()
        for row in rows:
            raw, tag, job_id, attempt = row[0], row[1].decode(), row[2].decode(), row[3]
            fence = row[10].decode()
            try:
                message = decode(raw)
            except MalformedMessage as err:
                calls.append(("finish", _rejection(job_id, fence, err)))
                continue
            deadline = int(row[7]) if row[7] else None
            if row[11]:
                created_ms, body = row[6], message.body
                fields = [part for item in record_fields(body).items() for part in item]
                deadline = _after(created_ms, body.timeout_s)
                start_by = _sooner(
                    message.expires_ms, _after(created_ms, body.queue_timeout_s or self._max_wait_s)
                )
                calls.append(("adopt", [job_id, fence, *map(_or_empty, (deadline, start_by)), *fields]))
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
                    traceparent=message.traceparent,
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

    def peek(self, count: int) -> list[Peeked]:
        """The next `count` jobs in about the order in which `pop` would take them; takes and changes nothing.

        The order is that of now: levels and clients in turn, without the share of pops that starts at the
        bottom. Fewer come although more wait when many are to be skipped (cancelled, late, malformed) or the
        bodies are large. Suspects, and messages of other clients that no pop has come by yet, are not seen.
        """
        with unavailable_on_failure(self._client):
            rows = self._scripts.call("peek", count)
        peeked = []
        for job_id, raw, level in rows:
            try:
                peeked.append(Peeked(job_id.decode(), decode(raw).body, Priority(level)))
            except MalformedMessage:
                continue  # the pop that comes to it ends it
        return peeked

    def wait(self, timeout: float, *, suspects: bool = True, above: Priority | None = None) -> bool:
        """Block until a `pop` with the same arguments may find something; False: timeout or `interrupt`.

        Wakes on pushes from any client, takes nothing itself, and may wake for nothing.
        """
        ignored = [name for name, level in self._lists.items() if above is not None and level >= above]
        if not suspects or above is not None:
            ignored.append(self._suspect)
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

    def give_up(self) -> int:
        """End all leases of this worker, known to it or not, as if it had died: the attempts count, and the
        jobs are suspects. How many there were. The writes of their deliveries are refused from here on.
        """
        with unavailable_on_failure(self._client):
            count = int(self._scripts.call("abandon", self._owner, ""))
            for _ in range(0, count, _REAPED_AT_ONCE):
                self._scripts.call("reap")
        return count

    def acquit(self, suspect: Delivery) -> None:
        """End the suspect's trial: it went on past where its last worker died, and another may be taken.

        From here on the death of this worker is not blamed on it alone.
        """
        with unavailable_on_failure(self._client):
            self._scripts.call("acquit", self._owner, suspect.tag)

    def close(self) -> None:
        """Close the connections; leases are left to `hand_back` or expiry."""
        self._doorbell.close()


def new_owner() -> str:
    """A name for this process that no other ever has: host, then a random part."""
    return f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"


def _after(created_ms: int, seconds: float | None) -> int | None:
    return None if seconds is None else created_ms + round(seconds * 1000)


def _sooner(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _or_empty(value: int | None) -> Arg:
    return "" if value is None else value


def _rejection(job_id: str, fence: str, err: MalformedMessage) -> list[Arg]:
    """Arguments of finish.lua that fail the job and bury its message."""
    error = json.dumps(err.body())
    return [job_id, fence, "failed", "", "", "", "", error, "", "InvalidRequest", err.message, err.reason]


class LeaseKeeper:
    """Thread that renews the leases held, every third of a lease, and sweeps for those of dead workers.

    It uses connections of its own. When `progress()` returns False (the engine hangs) it stops renewing,
    so that another worker takes over. `on_lost(delivery)` and `on_cancel(delivery)` are called from its
    thread: the lease is gone, drop all work on the job; or someone called the job off, finish it as
    cancelled (may come more than once). It goes on through any outage of Redis; after one it renews first
    and lets a whole lease pass before it takes jobs from others, who may have been cut off just as well.
    """

    def __init__(
        self,
        client: redis.Redis,
        owner: str,
        prefix: str = "wicore",
        settings: QueueSettings | None = None,
        *,
        on_lost: Callable[[Delivery], None],
        on_cancel: Callable[[Delivery], None],
        progress: Callable[[], bool] = lambda: True,
    ) -> None:
        self._owner = owner
        self._settings = settings or QueueSettings()
        self._scripts = Scripts(client, Keys(prefix), self._settings)
        self._watch = DeathWatch(client, self._scripts, owner, Keys(prefix))
        self._on_lost = on_lost
        self._on_cancel = on_cancel
        self._progress = progress
        self._lock = threading.Lock()
        self._held: dict[str, Delivery] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hold(self, delivery: Delivery) -> None:
        """Renew this lease from now on."""
        with self._lock:
            self._held[delivery.tag] = delivery

    def release(self, delivery: Delivery) -> None:
        """Stop renewing: the job ended, was lost or was handed back. Idempotent."""
        with self._lock:
            if self._held.get(delivery.tag) is delivery:
                del self._held[delivery.tag]

    def held(self) -> list[Delivery]:
        """All leases being renewed."""
        with self._lock:
            return list(self._held.values())

    def stop(self) -> None:
        """Stop the thread and wait for it. Idempotent; leases still held run out."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        lease = self._settings.lease_s
        renew_every, sweep_every = lease / 3, min(_SWEEP_S, lease / 3)
        next_renewal = next_sweep = time.monotonic()
        told = False
        while not self._stop.wait(max(0.0, min(next_renewal, next_sweep) - time.monotonic())):
            now = time.monotonic()
            try:
                if now >= next_renewal:
                    next_renewal = now + renew_every
                    self._renew()
                if now >= next_sweep:
                    next_sweep = now + sweep_every
                    self._watch.look()
                    self._scripts.call("reap")
                told = False
            except redis.RedisError as err:
                if not is_outage(err):
                    log.error("%s: leases cannot be renewed: %s", self._owner, err)
                elif not told:
                    log.warning("%s: leases cannot be renewed, Redis is away: %s", self._owner, err)
                told = True
                next_renewal = time.monotonic() + sweep_every
                next_sweep = time.monotonic() + lease
                self._watch.reset()

    def _renew(self) -> None:
        held = self.held()
        if not held or not self._progress():
            return
        triples = [part for d in held for part in (d.job_id, d.tag, d.fence)]
        lost, cancelled = self._scripts.call("renew", *triples)
        by_tag = {delivery.tag.encode(): delivery for delivery in held}
        for tag in lost:
            # A job that ended between the snapshot and the renewal has been released: not lost.
            if self._drop(by_tag[tag]):
                self._on_lost(by_tag[tag])
        for tag in cancelled:
            self._on_cancel(by_tag[tag])

    def _drop(self, delivery: Delivery) -> bool:
        with self._lock:
            return self._held.pop(delivery.tag, None) is delivery
