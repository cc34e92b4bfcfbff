"""The worker's side of the event stream: a thread that writes events and results."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

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
_KEPT_EVENTS = 4096
"""Events of a delivery that can be written again: seconds of them, as a failover loses a second's."""
_EVENTS_A_CALL = 500
"""So that no script holds Redis up for long, however much an outage has gathered."""
_REPLICATION_MS = 1000
"""How long a batch waits for replicas; after one for which too few answered, a tenth."""


@dataclass(slots=True)
class _Work:
    """What is to be written for one delivery in one round trip: events, then perhaps its end."""

    delivery: Delivery
    events: list[Event] = field(default_factory=list)
    ending: Event | None = None
    result: dict[str, Any] | None = None
    rewound_to: int = 0
    """The first event, when it is there because the log came back shorter than it had been."""

    @property
    def size(self) -> int:
        return len(self.events) + (self.ending is not None)


class _Kept:
    """The last events written of a delivery, as JSON text."""

    def __init__(self) -> None:
        self._texts: deque[bytes] = deque(maxlen=_KEPT_EVENTS)
        self._next = 0

    def add(self, first: int, texts: Iterable[bytes]) -> None:
        """Those of consecutive numbers from `first` that are not here yet."""
        for seq, text in enumerate(texts, first):
            if seq >= self._next:
                self._texts.append(text)
                self._next = seq + 1

    def since(self, seq: int) -> list[Event] | None:
        """The events from `seq` on; None when that one is not here."""
        behind = self._next - seq
        if not 0 < behind <= len(self._texts):
            return None
        return [json.loads(text) for text in list(self._texts)[-behind:]]


class Publisher:
    """Writes what the engine thread hands over, in order for each job.

    While one round trip is under way everything handed over gathers, and goes out as the next one
    (one pipeline, one call a job): light load adds no delay, heavy load makes larger batches. When Redis is
    away everything is kept and tried again; sequence numbers and fences make repeats harmless. Nothing
    here ever blocks: from `buffer_events` on the publisher is `full`, and who makes events should pause.

    When Redis comes back without its last writes (a failover, a crash of its machine), the events that its
    log misses are written again, as long as the lease is still there.

    Callbacks come from its thread: `on_lost(delivery)`, this worker no longer has the job and nothing
    more of it will be written; `on_cancel(delivery)`, someone called the job off, finish it as cancelled
    (may come more than once); `on_finished(delivery)`, the terminal event and result are stored;
    `on_room()`, it is no longer full.
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
        on_room: Callable[[], None] = lambda: None,
        buffer_events: int = 100_000,
        wait_replicas: int = 0,
    ) -> None:
        """`wait_replicas`: how many should hold a batch before the next one goes out."""
        self._scripts = Scripts(client, Keys(prefix), settings or QueueSettings())
        self._on_lost = on_lost
        self._on_cancel = on_cancel
        self._on_finished = on_finished
        self._on_room = on_room
        self._limit = buffer_events
        self._replicas = wait_replicas
        self._replicated = True
        """Whether enough replicas confirmed the last batch."""
        self._changed = threading.Condition()
        self._waiting: dict[str, _Work] = {}
        """By delivery (`_key`), in order of arrival."""
        self._writing: dict[str, _Work] = {}
        self._kept: dict[str, _Kept] = {}
        """Of the deliveries that have not ended."""
        self._unwritten = 0
        """Events and endings in `_waiting` and `_writing`."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    @property
    def full(self) -> bool:
        """Whether as much waits to be written as should."""
        return self._unwritten >= self._limit

    def start(self) -> None:
        self._thread.start()

    def publish(self, delivery: Delivery, events: Sequence[Event]) -> None:
        """Append events with consecutive `seq`, the first being the log's last plus one. Returns at once."""
        if events:
            self._hand_over(delivery, events, None, None)

    def finish(self, delivery: Delivery, event: Event, result: dict[str, Any] | None = None) -> None:
        """End the job: ack, record, result for `AsyncResult.get` and terminal event in one atomic step.

        `event` is a `terminal_event` with the next `seq`; `result` goes with type "done". An `error` in
        the event becomes the exception that Celery clients get. Returns at once.
        """
        if event["type"] not in TERMINAL_TYPES:
            raise ValueError(
                f"event: its type must be one of {sorted(TERMINAL_TYPES)} (got {event['type']!r})"
            )
        self._hand_over(delivery, (), event, result)

    def forget(self, delivery: Delivery) -> None:
        """Drop what is not written yet: the lease is lost. For any thread; idempotent."""
        key = _key(delivery)
        with self._changed:
            was_full = self.full
            self._kept.pop(key, None)
            for works in (self._waiting, self._writing):
                if key in works:
                    self._unwritten -= works.pop(key).size
            self._changed.notify_all()
        if was_full and not self.full:
            self._on_room()

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
        with self._changed:
            work = self._waiting.setdefault(_key(delivery), _Work(delivery))
            work.events += events
            if ending is not None:
                work.ending, work.result = ending, result
            self._unwritten += len(events) + (ending is not None)
            self._changed.notify_all()

    def _run(self) -> None:
        while self._take():
            written = self._write()
            if written is None:
                return
            for key, replies in written.items():
                self._report(key, replies)
            with self._changed:
                was_full = self.full
                self._unwritten -= sum(work.size for work in self._writing.values())
                self._writing = {}
                self._changed.notify_all()
            if was_full and not self.full:
                self._on_room()

    def _take(self) -> bool:
        """Turn to everything handed over since the last time; False to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            self._writing, self._waiting = self._waiting, {}
            return not self._stopping

    def _write(self) -> dict[str, list[Any]] | None:
        """Write what was taken, repeating it as a whole through outages; replies. None when stopped."""
        calls = {key: self._prepare(key, work) for key, work in list(self._writing.items())}
        for attempt in range(2**63):
            with self._changed:  # what was forgotten meanwhile is passed over
                keys = [key for key in calls if key in self._writing]
            if not keys:
                return {}
            try:
                replies = self._send([call for key in keys for call in calls[key]])
                outage = next((r for r in replies if isinstance(r, Exception) and is_outage(r)), None)
            except redis.RedisError as err:
                outage = err
            if outage is None:
                break
            if attempt == 0:
                log.warning("events wait, Redis is away: %s", outage)
            if self._pause(_BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)]):
                return None
        remaining = iter(replies)
        return {key: [next(remaining) for _ in calls[key]] for key in keys}

    def _prepare(self, key: str, work: _Work) -> list[Call]:
        """The calls that write it; its events are kept from here on."""
        calls = _calls(work)
        with self._changed:
            if key in self._writing:
                kept = self._kept.setdefault(key, _Kept())
                for name, args in calls:
                    if name == "append":
                        kept.add(cast(int, args[2]), cast("list[bytes]", args[5:]))
        return calls

    def _send(self, calls: list[Call]) -> list[Any]:
        timeout_ms = _REPLICATION_MS if self._replicated else _REPLICATION_MS // 10
        replies, holders = self._scripts.call_replicated(calls, self._replicas, timeout_ms)
        if self._replicated != (holders >= self._replicas):
            self._replicated = not self._replicated
            say = log.info if self._replicated else log.warning
            say("events are held by %d replicas of %d (redis.wait_replicas)", holders, self._replicas)
        return replies

    def _pause(self, seconds: float) -> bool:
        """Wait; True when stopped meanwhile."""
        with self._changed:
            return self._changed.wait_for(lambda: self._stopping, seconds)

    def _report(self, key: str, replies: list[Any]) -> None:
        work = self._writing.get(key)
        if work is None:
            return  # forgotten
        refused = next((reply for reply in replies if isinstance(reply, Exception)), None)
        # The last reply decides: after a repeat, the append of a job that ended finds its fence gone.
        reply = 0 if refused else replies[-1]
        if refused:
            log.error("job %s: events refused: %s", work.delivery.job_id, refused)
        if reply < 0 and self._rewind(key, work, -reply):
            return
        try:
            if reply <= 0:
                self.forget(work.delivery)
                self._on_lost(work.delivery)
            elif work.ending is not None:
                self._kept.pop(key, None)
                self._on_finished(work.delivery)
            elif reply == 2:
                self._on_cancel(work.delivery)
        except Exception:
            log.exception("job %s: a callback failed", work.delivery.job_id)

    def _rewind(self, key: str, work: _Work, seq: int) -> bool:
        """Queue the events from `seq` on once more, which the log needs; False when that cannot help."""
        with self._changed:
            events = self._kept[key].since(seq) if key in self._kept else None
            if events is None or work.rewound_to == seq:
                log.error("job %s: its log needs event %d, which is gone", work.delivery.job_id, seq)
                return False
            again = _Work(work.delivery, events, work.ending, work.result, rewound_to=seq)
            self._unwritten += again.size
            if later := self._waiting.pop(key, None):
                again.events += later.events
                if later.ending is not None:
                    again.ending, again.result = later.ending, later.result
            self._waiting = {key: again, **self._waiting}
        log.warning(
            "job %s: Redis lost its log from event %d on; %d are written again",
            work.delivery.job_id,
            seq,
            len(events),
        )
        return True


def _key(delivery: Delivery) -> str:
    return f"{delivery.tag} {delivery.fence}"


def _calls(work: _Work) -> list[Call]:
    """Appends of consecutive events, and one finish at most."""
    calls: list[Call] = []
    delivery = work.delivery
    for start in range(0, len(work.events), _EVENTS_A_CALL):
        events = work.events[start : start + _EVENTS_A_CALL]
        kinds = {event["type"] for event in events}
        started = int(bool(kinds & {"started", "resumed"}))
        first = events[0]["seq"]
        texts = map(_text, events)
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


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _text(value: Any) -> bytes:
    return _encode(value).encode("utf-8", "replace")


def _classes(root: type[errors.WicoreError]) -> Iterable[type[errors.WicoreError]]:
    yield root
    for child in root.__subclasses__():
        yield from _classes(child)


_EXCEPTIONS = {
    cls.code: cls.__name__ for cls in _classes(errors.WicoreError) if cls.__module__ == errors.__name__
}
"""Class names, for Celery clients, by the code of an error."""
