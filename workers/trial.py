"""The one suspect that a worker tries: a job whose last worker died, perhaps of it."""

from __future__ import annotations

from collections.abc import Callable

from wicore.queue.consumer import Delivery

ACQUITTED_AFTER = 8
"""Tokens past the log of the attempts before, which may lack what a dying worker had not yet written."""


class Trial:
    """Which suspect is on trial, and when the next may be taken: once this one has ended, or is acquitted.

    Without acquittal a killed worker's streams would go on one after the other, each when the one before has
    ended. The last attempt is tried to its end, so that nobody else is near when it kills a worker again.
    Begun and acquitted by the intake thread, observed and ended by others; each method is atomic.
    """

    def __init__(self, max_attempts: int, wake: Callable[[], None]) -> None:
        """`wake` tells the intake that another suspect may be taken, once it has looked at `acquitted`."""
        self._max_attempts = max_attempts
        self._wake = wake
        self._suspect: Delivery | None = None
        self._tokens = 0

    @property
    def suspect(self) -> Delivery | None:
        """Who is on trial."""
        return self._suspect

    @property
    def acquitted(self) -> bool:
        """Whether the suspect has shown enough; the intake then says so to the queue and calls `end`."""
        return self._tokens >= ACQUITTED_AFTER

    def begin(self, suspect: Delivery) -> None:
        self._tokens = 0
        self._suspect = suspect

    def observe(self, delivery: Delivery) -> None:
        """A token of this job came."""
        if delivery is self._suspect and delivery.attempt < self._max_attempts:
            self._tokens += 1
            if self._tokens == ACQUITTED_AFTER:
                self._wake()

    def end(self, delivery: Delivery) -> None:
        """The job is acquitted, has ended or is lost. Idempotent."""
        if delivery is self._suspect:
            self._suspect = None
            self._tokens = 0
            self._wake()
