"""A bound on what is open at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from api import traffic
from wicore.errors import Unavailable


class Slots:
    """Counts open streams. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._lock = threading.Lock()

    def take(self) -> None:
        """Raises Unavailable when all are taken. Each `take` needs one `give`."""
        with self._lock:
            if self._taken >= self._limit:
                raise Unavailable(
                    f"All {self._limit} streams that api.max_sockets allows are open; try again",
                    retry_after=5,
                )
            self._taken += 1
        traffic.streams_changed(1)

    @contextmanager
    def taken_for_response(self) -> Iterator[None]:
        """Take a slot that the response made inside will give back; it is given back here on an error."""
        self.take()
        try:
            yield
        except BaseException:
            self.give()
            raise

    def give(self) -> None:
        with self._lock:
            self._taken -= 1
        traffic.streams_changed(-1)
