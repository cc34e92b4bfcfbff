"""Bounds on what is open, and on what is held in memory, at once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from api import traffic
from wicore.errors import RateLimited, Unavailable

RETRY_S = 5.0


class Slots:
    """Counts open streams and calls that wait. Thread-safe."""

    def __init__(self, limit: int, limit_a_client: int) -> None:
        self._limit, self._limit_a_client = limit, limit_a_client
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, client: str) -> None:
        """Raises Unavailable when all are taken, RateLimited when the client has its share; '' has none.

        Each `take` needs one `give`.
        """
        with self._lock:
            if self._taken.total() >= self._limit:
                raise Unavailable(
                    f"All {self._limit} streams that api.max_sockets allows are open; try again",
                    retry_after=RETRY_S,
                )
            if client and self._taken[client] >= self._limit_a_client:
                raise RateLimited(
                    f"All {self._limit_a_client} streams of this client are open (api.max_client_sockets)",
                    retry_after=RETRY_S,
                )
            self._taken[client] += 1
        traffic.streams_changed(1)

    @contextmanager
    def taken_for_response(self, client: str) -> Iterator[None]:
        """Take a slot that the response made inside will give back; it is given back here on an error."""
        self.take(client)
        try:
            yield
        except BaseException:
            self.give(client)
            raise

    @contextmanager
    def taken(self, client: str) -> Iterator[None]:
        """Take a slot for as long as the block lasts."""
        self.take(client)
        try:
            yield
        finally:
            self.give(client)

    def give(self, client: str) -> None:
        with self._lock:
            self._taken[client] -= 1
            if not self._taken[client]:
                del self._taken[client]
        traffic.streams_changed(-1)


class Budget:
    """Bytes of what clients have sent a part of: bodies and frames that are not whole yet. Thread-safe.

    Bounds the sum: each by itself may be as large as `api.max_body_bytes`, but not all of them together.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._lock = threading.Lock()

    def change(self, count: int) -> None:
        """Hold so many bytes more, or less. Raises Unavailable when more would be too many; then none."""
        with self._lock:
            if count > 0 and self._held + count > self._limit:
                raise Unavailable("Too much is being sent here at once; try again", retry_after=RETRY_S)
            self._held += count
