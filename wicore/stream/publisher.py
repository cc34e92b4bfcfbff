"""The worker's side of the event stream: a thread that writes events and results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import redis

from wicore.config import QueueSettings
from wicore.queue.consumer import Delivery
from wicore.request import Event


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
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def publish(self, delivery: Delivery, events: Sequence[Event]) -> None:
        """Append events with consecutive `seq`, the first being the log's last plus one.

        Returns at once; blocks only while the buffer is full.
        """
        raise NotImplementedError

    def finish(self, delivery: Delivery, event: Event, result: dict[str, Any] | None = None) -> None:
        """End the job: ack, record, result for `AsyncResult.get` and terminal event in one atomic step.

        `event` is a `terminal_event` with the next `seq`; `result` goes with type "done".
        """
        raise NotImplementedError

    def flush(self, timeout: float) -> bool:
        """Wait until everything handed over so far is written or lost; False when it took longer."""
        raise NotImplementedError

    def stop(self, timeout: float = 10.0) -> bool:
        """Flush, stop the thread and wait for it; False when something was left unwritten."""
        raise NotImplementedError
