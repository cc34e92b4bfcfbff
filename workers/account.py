"""A worker's account of its jobs: when each reached which stage, for metrics and, if wanted, traces."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

from wicore.queue.consumer import Delivery
from wicore.telemetry.serving import ServingStats, Times
from wicore.telemetry.tracing import Tracer

_MS = 1000


class _End(NamedTuple):
    """How a job ended that is not stored yet."""

    times: Times
    at: float
    outcome: str
    tokens: int


class Account:
    """Times are of `time.monotonic`.

    A worker that dies tells nothing of the attempts it had; the next one tells of its own, in the same trace.
    """

    def __init__(self, context: int, owner: str, tracer: Tracer | None) -> None:
        """`context` as in ServingStats; `owner` is the worker's name."""
        self.stats = ServingStats(context)
        self._owner = owner
        self._tracer = tracer
        self._endings: dict[str, _End] = {}
        """By fence, of jobs that are traced."""

    @staticmethod
    def popped(delivery: Delivery) -> Times:
        """The account of a delivery that has just come."""
        queued_s = max(0, delivery.popped_ms - delivery.created_ms) / _MS
        return Times(time.monotonic(), queued_s, delivery.attempt, resumes=delivery.seq > 0)

    def ended(self, delivery: Delivery, times: Times, outcome: str, usage: Mapping[str, int]) -> None:
        """A job ended as `outcome`: stop, length, tool_calls, cancelled, expired or failed."""
        now, tokens = time.monotonic(), usage["completion_tokens"]
        self.stats.ended(times, outcome, usage["prompt_tokens"], tokens, now)
        if self._tracer is not None:
            self._endings[delivery.fence] = _End(times, now, outcome, tokens)

    def let_go(self, delivery: Delivery) -> None:
        """The end of a job is stored, or the lease is lost."""
        ending = self._endings.pop(delivery.fence, None)
        if self._tracer is None or ending is None:
            return
        stored = time.monotonic()
        attempt = self._attempt(self._tracer, delivery, ending.times, stored, ending.outcome, ending.tokens)
        self._span(self._tracer, "publish", attempt, ending.at, stored)

    def left(self, delivery: Delivery, times: Times, outcome: str) -> None:
        """The attempt ended without ending the job: lost, or handed back."""
        if self._tracer is not None:
            self._attempt(self._tracer, delivery, times, time.monotonic(), outcome, 0)

    def close(self) -> None:
        if self._tracer is not None:
            self._tracer.close()

    def _attempt(
        self, tracer: Tracer, delivery: Delivery, times: Times, end: float, outcome: str, tokens: int
    ) -> str:
        """The spans of an attempt, of the stages that it reached, and of the wait before the first.

        Returns the attempt's traceparent.
        """
        if delivery.fence.endswith(":1"):
            queued = times.popped - times.queued_s
            self._span(tracer, "queue", delivery.traceparent, queued, times.popped)
        attempt = tracer.record(
            "attempt",
            delivery.traceparent,
            _unix(times.popped),
            _unix(end),
            {
                "wicore.job": delivery.job_id,
                "wicore.worker": self._owner,
                "wicore.attempt": times.attempt,
                "wicore.priority": delivery.level.name.lower(),
                "wicore.outcome": outcome,
                "gen_ai.usage.output_tokens": tokens,
            },
            kind="consumer",
            error=outcome if outcome in ("failed", "lost") else None,
        )
        if times.seeing is not None:
            self._span(tracer, "images", attempt, times.seeing, times.seen or end)
        if times.scheduled is not None:
            self._span(tracer, "prefill", attempt, times.scheduled, times.first_token or end)
        if times.first_token is not None:
            self._span(tracer, "decode", attempt, times.first_token, times.last_token or end)
        return attempt

    @staticmethod
    def _span(tracer: Tracer, name: str, parent: str | None, start: float, end: float) -> None:
        tracer.record(name, parent, _unix(start), _unix(end))


def _unix(monotonic: float) -> float:
    return monotonic + time.time() - time.monotonic()
