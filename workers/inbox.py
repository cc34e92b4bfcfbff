"""What other threads want of the engine thread."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable


class Inbox:
    """Calls to be made in the engine thread, in the order in which they were put."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def put(self, call: Callable[[], None]) -> None:
        """For any thread."""
        self._calls.put(call)

    def ring(self) -> None:
        """Have the engine thread look around, should it wait. For any thread."""
        self._calls.put(lambda: None)

    def empty(self) -> bool:
        return self._calls.empty()

    def do(self, *, block: bool = False, until: float | None = None) -> None:
        """Make all calls that are there; with `block` wait for one, at most until that monotonic time."""
        timeout = None if until is None else max(0.0, until - time.monotonic())
        try:
            self._calls.get(block=block, timeout=timeout)()
            while True:
                self._calls.get_nowait()()
        except queue.Empty:
            return

    def wait(self, seconds: float) -> None:
        """Until a call is put, which is dropped, but no longer. For an engine thread that steps no more."""
        try:
            self._calls.get(timeout=seconds)
        except queue.Empty:
            return
