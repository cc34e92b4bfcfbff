"""The listener's side of the event stream: the log first, then the live channel, no gap, no repeat."""

from __future__ import annotations

from collections.abc import Iterator

import redis

from wicore.request import Event


def read_log(client: redis.Redis, job_id: str, after: int = 0, prefix: str = "wicore") -> list[Event]:
    """The job's events with `seq > after` that are in the log, in order; [] for an unknown job."""
    raise NotImplementedError


class Relay:
    """One subscriber connection for all listeners of a process. Works with threads and under gevent.

    Create it after the fork. The thread and its connection start with the first listener.
    """

    def __init__(self, client: redis.Redis, prefix: str = "wicore", buffer: int = 1024) -> None:
        """`buffer`: live events held for one listener; one that falls behind reads the log instead."""
        raise NotImplementedError

    def follow(
        self, job_id: str, after_seq: int = 0, *, heartbeat: float | None = None
    ) -> Iterator[Event | None]:
        """Every event with `seq > after_seq`, once and in order, ending after the terminal one.

        Raises UnknownJob at the call, not at the first `next`. With `heartbeat`, None is yielded whenever
        that many seconds bring no event (a chance to notice a client that left). Closing the iterator
        unsubscribes. While Redis is away the iterator waits; it goes on when Redis is back.
        Raises Unavailable at the call when Redis is away, and from the iterator after `close`.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End the thread and all iterators."""
        raise NotImplementedError
