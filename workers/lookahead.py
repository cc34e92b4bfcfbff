"""The thread that looks at the jobs next in line while the worker has no slot for them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from wicore.errors import WicoreError
from wicore.queue.consumer import Peeked
from wicore.request import JobBody

log = logging.getLogger("wicore.worker")

_REMEMBERED = 4096
"""Jobs whose turn may still be far: more than any count of jobs looked at."""
_PAUSE_S = 0.05
"""Least time between two looks, however often it is woken: the engine needs the processor more."""


class LookAhead:
    """Offers the prompt of each waiting job once, so that what the cache has of it can be raised in time.

    It takes no job and promises nothing: a job that cannot be tokenised is left to fail at its turn, one that
    another worker takes was looked at in vain, and while Redis is away nothing is looked at.
    """

    def __init__(
        self,
        peek: Callable[[int], list[Peeked]],
        *,
        tokens: Callable[[JobBody], Sequence[int]],
        offer: Callable[[Sequence[int]], None],
        count: int,
        busy: Callable[[], bool],
        interval_s: float = 1.0,
    ) -> None:
        """All are called in its thread. `peek` gives the jobs next in line, at most so many (LeaseConsumer);
        `tokens` those of a job's prompt, or raises; while `busy()` is false the jobs are about to be popped
        anyway. `count`: how many jobs ahead it looks; 0: nothing is ever done. It looks every `interval_s`,
        and when woken.
        """
        self._peek = peek
        self._tokens = tokens
        self._offer = offer
        self._count = count
        self._busy = busy
        self._interval_s = interval_s
        self._offered: dict[str, None] = {}
        """Ids of the jobs that were looked at, the oldest first."""
        self._cut_off = False
        self._bell = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="look-ahead")

    def start(self) -> None:
        if self._count > 0:
            self._thread.start()

    def wake(self) -> None:
        """Look now: a job was taken, so the worker may be busy, and the line has moved. For any thread."""
        self._bell.set()

    def stop(self) -> None:
        """Look no more; for any thread, idempotent. What is under way ends with the prompt at hand."""
        self._stopping.set()
        self._bell.set()

    def join(self) -> None:
        """Wait for the thread, if it was started."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._bell.wait(self._interval_s)
            self._bell.clear()
            if not self._stopping.is_set() and self._busy():
                self._look()
            self._stopping.wait(self._interval_s if self._cut_off else _PAUSE_S)

    def _look(self) -> None:
        try:
            jobs = self._peek(self._count)
        except WicoreError as err:
            if not self._cut_off:
                log.warning("cannot look ahead in the queue, trying again: %s", err.message)
            self._cut_off = True
            return
        self._cut_off = False
        for job in jobs:
            if self._stopping.is_set():
                return
            if job.job_id not in self._offered:
                self._remember(job.job_id)
                self._consider(job)

    def _consider(self, job: Peeked) -> None:
        try:
            tokens = self._tokens(job.body)
        except Exception as err:  # whatever it is, the job meets it again at its turn
            log.debug("job %s: not looked ahead at: %s", job.job_id, err)
            return
        self._offer(tokens)

    def _remember(self, job_id: str) -> None:
        self._offered[job_id] = None
        if len(self._offered) > max(_REMEMBERED, self._count):
            del self._offered[next(iter(self._offered))]
