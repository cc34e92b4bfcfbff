"""Taking jobs out under a lease, and keeping the lease."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import redis

from wicore.config import QueueSettings
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
        """`owner` names this process and must never be used by another one, not even later."""
        raise NotImplementedError

    def pop(self, n: int, *, held: Iterable[Delivery] = ()) -> list[Delivery]:
        """Take up to n messages in priority order, each under a lease of `lease_s`.

        `held` are the deliveries the worker still has: while one of them is a suspect, no other suspect
        is taken. Jobs that must not run (cancelled, expired, finished, malformed) are ended here and not
        returned, so fewer than n may come although more wait.
        """
        raise NotImplementedError

    def wait(self, timeout: float) -> bool:
        """Block until a message can be popped; True: call `pop`; False: timeout or `interrupt`.

        Wakes on pushes from any client, takes nothing itself, and may wake for nothing.
        """
        raise NotImplementedError

    def interrupt(self) -> None:
        """Make the `wait` under way, or the next one, return at once."""
        raise NotImplementedError

    def hand_back(self, deliveries: Iterable[Delivery]) -> None:
        """Put jobs back at the head of their queue, their attempt not counted; lost ones are skipped.

        Flush the publisher first: a handed-back delivery can append nothing more.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close the connections; leases are left to `hand_back` or expiry."""
        raise NotImplementedError


class LeaseKeeper:
    """Thread that renews the leases held, every third of a lease, and reaps those of dead workers.

    It has its own connection. When `progress()` returns False (the engine hangs) it stops renewing, so
    that another worker takes over. `on_lost(delivery)` and `on_cancel(delivery)` are called from its
    thread: the lease is gone, drop all work on the job; or someone called the job off, finish it as
    cancelled. It goes on through any outage of Redis.
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
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def hold(self, delivery: Delivery) -> None:
        """Renew this lease from now on."""
        raise NotImplementedError

    def release(self, delivery: Delivery) -> None:
        """Stop renewing: the job ended or was handed back."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop the thread and wait for it."""
        raise NotImplementedError
