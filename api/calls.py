"""A client that waits for one job on the connection it sent it by."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from api import http, streams
from api.services import Services
from wicore.errors import Cancelled, Expired
from wicore.queue.producer import JobRecord
from wicore.request import TERMINAL_TYPES, Event

EXPIRY_GRACE_S = 5.0
"""How much longer than the job's own deadline a caller waits before giving the job up."""


class Call:
    """Follows a job for a client, and calls it off when the client leaves."""

    def __init__(
        self,
        services: Services,
        job_id: str,
        environ: Mapping[str, Any],
        *,
        timeout_s: float | None,
        owns_job: bool,
    ) -> None:
        """`environ` is the request's, `timeout_s` the job's; a job that is not owned is never called off."""
        self._services = services
        self.job_id = job_id
        self._environ = environ
        self._timeout_s = timeout_s
        self._owns_job = owns_job
        self._ended = False
        self._give_up_at = None if timeout_s is None else time.monotonic() + timeout_s + EXPIRY_GRACE_S

    def wait(self) -> JobRecord:
        """The job's record when it has succeeded.

        Raises the error that it ended with, Expired when it is long past its deadline, or Cancelled when
        the client left.
        """
        for batch in self.batches():
            if batch and (error := streams.failure(batch[-1])):
                raise error
        return self._services.producer.record(self.job_id)

    def batches(self) -> Iterator[list[Event]]:
        """The job's events up to its end, an empty list for each idle tick. Raises as `wait` does."""
        look_at = time.monotonic() + streams.TICK_S
        for batch in self._services.relay.follow(self.job_id, 0, streams.TICK_S):
            self._ended = bool(batch) and batch[-1]["type"] in TERMINAL_TYPES
            yield batch
            # By the clock, too: a job that never pauses gives no idle tick.
            if not self._ended and (not batch or time.monotonic() >= look_at):
                self._check_waiting()
                look_at = time.monotonic() + streams.TICK_S

    def abandon(self) -> None:
        """Cancel the job if its client left before the end and `api.cancel_on_disconnect` says so.

        A response is also closed early when this process is told to stop; its job lives on then.
        """
        if self._services.settings.api.cancel_on_disconnect and http.client_gone(self._environ):
            self.cancel()

    def cancel(self) -> None:
        """Call the job off, if it is owned and has not ended."""
        if self._owns_job and not self._ended:
            self._services.producer.cancel(self.job_id)

    def _check_waiting(self) -> None:
        if http.client_gone(self._environ):
            self.abandon()
            raise Cancelled("The client closed the connection")
        if self._give_up_at is not None and time.monotonic() > self._give_up_at:
            self.cancel()
            raise Expired(f"timeout_s: the job did not finish within {self._timeout_s:g} s")
