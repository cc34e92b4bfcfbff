"""The worker's side of the event stream: a thread that writes events and results."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import redis

from wicore import errors
from wicore.config import QueueSettings
from wicore.queue.connection import is_outage
from wicore.queue.consumer import Delivery
from wicore.queue.schema import Keys
from wicore.queue.scripts import Arg, Call, Scripts
from wicore.request import TERMINAL_TYPES, Event

log = logging.getLogger(__name__)

_BACKOFF_S = (0.02, 0.1, 0.5, 1.0)
"""Waits between attempts while Redis is away; the last one repeats."""


@dataclass(slots=True)
class _Work:
    """What is to be written for one delivery in one round trip: events, then perhaps its end."""

    delivery: Delivery
    events: list[Event] = field(default_factory=list)
    ending: Event | None = None
    result: dict[str, Any] | None = None

    @property
    def size(self) -> int:
        return len(self.events) + (self.ending is not None)


class Publisher:
    """Writes what the engine thread hands over, in order for each job.

    While one round trip is under way everything handed over gathers, and goes out as the next one
    (one pipeline, one call a job): light load adds no delay, heavy load makes larger batches. When Redis is
    away it keeps up to `buffer_events` and retries; sequence numbers and fences make repeats harmless.

    Callbacks come from its thread: `on_lost(delivery)`, this worker no longer has the job and nothing
    more of it will be written; `on_cancel(delivery)`, someone called the job off, finish it as cancelled
    (may come more than once); `on_finished(delivery)`, the terminal event and result are stored.
    """

    def __init__(
        self,
        client: redis.Redis,
        prefix: str = "wicore",
        settings: QueueSettings | None = None,
        *,
        on_lost: Callable[[Delivery], None],
        on_cancel: Callable[[Delivery], None],
        on_finished: Callable[[Delivery], None] = lambda delivery: None,
        buffer_events: int = 100_000,
    ) -> None:
        self._scripts = Scripts(client, Keys(prefix), settings or QueueSettings())
        self._on_lost = on_lost
        self._on_cancel = on_cancel
        self._on_finished = on_finished
        self._limit = buffer_events
        self._changed = threading.Condition()
        self._waiting: dict[str, _Work] = {}
        """By delivery tag and attempt, in order of arrival."""
        self._unwritten = 0
        """Events and endings handed over and not yet written or lost."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def publish(self, delivery: Delivery, events: Sequence[Event]) -> None:
        """Append events with consecutive `seq`, the first being the log's last plus one.

        Returns at once; blocks only while the buffer is full. Raises RuntimeError once stopped.
        """
        if events:
            self._hand_over(delivery, events, None, None)

    def finish(self, delivery: Delivery, event: Event, result: dict[str, Any] | None = None) -> None:
        """End the job: ack, record, result for `AsyncResult.get` and terminal event in one atomic step.

        `event` is a `terminal_event` with the next `seq`; `result` goes with type "done". An `error` in
        the event becomes the exception that Celery clients get.
        """
        if event["type"] not in TERMINAL_TYPES:
            raise ValueError(
                f"event: its type must be one of {sorted(TERMINAL_TYPES)} (got {event['type']!r})"
            )
        self._hand_over(delivery, (), event, result)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """What one thread hands over inside goes out together, and wakes the thread once."""
        with self._changed:
            yield

    def flush(self, timeout: float) -> bool:
        """Wait until everything handed over so far is written or lost; False when it took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: self._unwritten == 0, timeout)

    def stop(self, timeout: float = 10.0) -> bool:
        """Flush, stop the thread and wait for it; False when something was left unwritten. Idempotent."""
        flushed = self.flush(timeout)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        return flushed

    def _hand_over(
        self, delivery: Delivery, events: Sequence[Event], ending: Event | None, result: dict[str, Any] | None
    ) -> None:
        size = len(events) + (ending is not None)
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or not self._unwritten or self._unwritten + size <= self._limit
            )
            if self._stopping:
                raise RuntimeError("the publisher is stopped")
            work = self._waiting.setdefault(f"{delivery.tag} {delivery.fence}", _Work(delivery))
            work.events += events
            if ending is not None:
                work.ending, work.result = ending, result
            self._unwritten += size
            self._changed.notify_all()

    def _run(self) -> None:
        while batch := self._take():
            if not self._write(batch):
                return
            with self._changed:
                self._unwritten -= sum(work.size for work in batch)
                self._changed.notify_all()

    def _take(self) -> list[_Work]:
        """Everything handed over since the last time; [] to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            batch = [] if self._stopping else list(self._waiting.values())
            self._waiting = {}
            return batch

    def _write(self, batch: list[_Work]) -> bool:
        """Write a batch, repeating it as a whole through outages. False when stopped meanwhile."""
        calls = [_calls(work) for work in batch]
        flat = [call for group in calls for call in group]
        for attempt in range(2**63):
            try:
                replies = self._scripts.call_many(flat)
                outage = next((r for r in replies if isinstance(r, Exception) and is_outage(r)), None)
            except redis.RedisError as err:
                outage = err
            if outage is None:
                break
            if attempt == 0:
                log.warning("events wait, Redis is away: %s", outage)
            if self._pause(_BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)]):
                return False
        remaining = iter(replies)
        for work, group in zip(batch, calls, strict=True):
            self._report(work, [next(remaining) for _ in group])
        return True

    def _pause(self, seconds: float) -> bool:
        """Wait; True when stopped meanwhile."""
        with self._changed:
            return self._changed.wait_for(lambda: self._stopping, seconds)

    def _report(self, work: _Work, replies: list[Any]) -> None:
        try:
            # The last reply decides: after a repeat, the append of a job that ended finds its fence gone.
            match replies[-1]:
                case Exception() as err:
                    log.error("job %s: events refused: %s", work.delivery.job_id, err)
                    self._on_lost(work.delivery)
                case 0:
                    self._on_lost(work.delivery)
                case _ if work.ending is not None:
                    self._on_finished(work.delivery)
                case 2:
                    self._on_cancel(work.delivery)
        except Exception:
            log.exception("job %s: a callback failed", work.delivery.job_id)


def _calls(work: _Work) -> list[Call]:
    """One append and one finish at most."""
    calls: list[Call] = []
    delivery = work.delivery
    if work.events:
        kinds = {event["type"] for event in work.events}
        started = int(bool(kinds & {"started", "resumed"}))
        first = work.events[0]["seq"]
        texts = map(_text, work.events)
        calls.append(
            ("append", [delivery.job_id, delivery.fence, first, started, int("token" in kinds), *texts])
        )
    if work.ending is not None:
        calls.append(("finish", _finish_args(delivery, work.ending, work.result)))
    return calls


def _finish_args(delivery: Delivery, event: Event, result: dict[str, Any] | None) -> list[Arg]:
    """Arguments of finish.lua, in its order; absent ones are ''."""
    error = event.get("error") or {}
    return [
        delivery.job_id,
        delivery.fence,
        event["type"],
        event["seq"],
        _text(event),
        _text(result) if result is not None else "",
        _text(event["usage"]) if "usage" in event else "",
        _text(error) if error else "",
        event.get("finish_reason") or "",
        _EXCEPTIONS.get(error.get("code", ""), "WicoreError"),
        error.get("message", ""),
        "",
    ]


def _text(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _classes(root: type[errors.WicoreError]) -> Iterable[type[errors.WicoreError]]:
    yield root
    for child in root.__subclasses__():
        yield from _classes(child)


_EXCEPTIONS = {
    cls.code: cls.__name__ for cls in _classes(errors.WicoreError) if cls.__module__ == errors.__name__
}
"""Class names, for Celery clients, by the code of an error."""
