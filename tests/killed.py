"""A job whose worker is killed in the middle of it, beside the same job undisturbed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.services import follow, running_worker, worker_process
from wicore.config import Settings
from wicore.queue.producer import Producer
from wicore.request import Event

KILLED_AT = 25
"""The event after which the first worker is killed."""


class Outcome(NamedTuple):
    """What a client saw of the job, and what its record says."""

    events: list[Event]
    result: dict[str, Any]
    attempts: int


def undisturbed_and_killed(
    redis_client: Any, settings: Settings, submit: Callable[[], str]
) -> tuple[Outcome, Outcome]:
    """The outcomes of what `submit` hands in, by its id, under one worker and under two of which the first is
    killed. Fails unless the second sequence of events is gapless, with one that says it was resumed."""
    with running_worker(settings, "undisturbed"):
        undisturbed = _outcome(redis_client, job := submit(), list(follow(redis_client, job)))
    redis_client.flushall()

    job, first = submit(), worker_process(settings)
    events: list[Event] = []
    for event in follow(redis_client, job):
        events.append(event)
        if event["seq"] == KILLED_AT:
            first.kill()
            first.wait()
            second = worker_process(settings)
    second.send_signal(signal.SIGTERM)
    assert second.wait(30) == 0

    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    kinds = [event["type"] for event in events if event["type"] != "token"]
    assert kinds == ["started", "resumed", "done"]
    return undisturbed, _outcome(redis_client, job, events)


def _outcome(redis_client: Any, job: str, events: list[Event]) -> Outcome:
    record = Producer(redis_client).record(job)
    assert record.result is not None
    return Outcome(events, dict(record.result), record.attempts)
