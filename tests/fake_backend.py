"""Producer and relay in memory, for tests of the doors that need no Redis.

A test plays the worker: it says what happens to a job with `run`, `emit` and `finish`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from wicore.errors import Conflict, UnknownJob, WicoreError
from wicore.openai import ChoiceResult, result_object
from wicore.request import (
    STATUS_OF_TERMINAL,
    Event,
    JobBody,
    Priority,
    new_job_id,
    started_event,
    terminal_event,
    token_event,
    usage_of,
)


class FakeJob:
    """One job: its body, record and log."""

    def __init__(self, job_id: str, body: JobBody, priority: Priority) -> None:
        self.id = job_id
        self.body = body
        self.priority = priority
        self.status = "queued"
        self.result: dict[str, Any] | None = None
        self.events: list[Event] = []

    def public(self) -> dict[str, Any]:
        return {"id": self.id, "status": self.status, "result": self.result}


class FakeSubmission:
    def __init__(self, job: FakeJob, created: bool, position: int) -> None:
        self.id, self.created, self.position, self.status = job.id, created, position, job.status


class FakeBackend:
    """Both a producer and a relay. `script(job)` runs on a thread of its own for each new job."""

    def __init__(self, script: Any = None) -> None:
        self.jobs: dict[str, FakeJob] = {}
        self.keys: dict[str, FakeJob] = {}
        self.cancelled: list[str] = []
        self.fault: Exception | None = None
        self.changed = threading.Condition()
        self._script = script

    # --- producer -------------------------------------------------------------------------------

    def submit(
        self, body: JobBody, priority: Priority, *, idempotency_key: str | None, prompt_tokens: int
    ) -> FakeSubmission:
        self._fail()
        if idempotency_key in self.keys:
            job = self.keys[idempotency_key]
            if job.body != body:
                raise Conflict("Idempotency-Key: used before with another body")
            return FakeSubmission(job, False, 0)
        job = FakeJob(new_job_id(), body, priority)
        with self.changed:
            self.jobs[job.id] = job
            if idempotency_key is not None:
                self.keys[idempotency_key] = job
            self.changed.notify_all()
        if self._script is not None:
            threading.Thread(target=self._script, args=(self, job), daemon=True).start()
        return FakeSubmission(job, True, len(self.jobs))

    def cancel(self, job_id: str) -> None:
        self._fail()
        job = self.record(job_id)
        with self.changed:
            self.cancelled.append(job_id)
            self.changed.notify_all()
        if job.status == "queued":
            self.finish(job, "cancelled")

    def record(self, job_id: str) -> FakeJob:
        self._fail()
        if job_id not in self.jobs:
            raise UnknownJob(f"No job has the id {job_id!r}", param="job")
        return self.jobs[job_id]

    def estimated_wait_s(self, job: FakeSubmission) -> float:
        return 1.5

    # --- relay ----------------------------------------------------------------------------------

    def follow(self, job_id: str, after_seq: int, idle_s: float) -> Iterator[list[Event]]:
        job = self.record(job_id)
        while True:
            with self.changed:
                self.changed.wait_for(lambda: len(job.events) > after_seq or job.result, idle_s)
                batch = job.events[after_seq:]
            self._fail()
            if batch:
                after_seq = batch[-1]["seq"]
            yield batch
            if job.events and after_seq >= len(job.events) and job.status in STATUS_OF_TERMINAL.values():
                return

    # --- the worker's part ----------------------------------------------------------------------

    def emit(self, job: FakeJob, texts: list[str]) -> None:
        for text in texts:
            if not job.events:
                job.status = "running"
                self._add(job, started_event(job.id, 1, 1))
            finish = "stop" if text is texts[-1] else None
            self._add(job, token_event(job.id, len(job.events) + 1, 0, text, [7], finish_reason=finish))

    def finish(self, job: FakeJob, type: Any = "done", error: WicoreError | None = None) -> None:
        texts = [event["text"] for event in job.events if event["type"] == "token"]
        usage = usage_of(3, len(texts))
        if type == "done":
            choice = ChoiceResult("".join(texts), "stop")
            job.result = result_object(job.id, job.body, "tiny", 1_700_000_000, [choice], usage)
        job.status = STATUS_OF_TERMINAL[type]
        seq = len(job.events) + 1
        self._add(
            job, terminal_event(job.id, seq, type, usage=usage, error=None if error is None else error.body())
        )

    def _add(self, job: FakeJob, event: Event) -> None:
        with self.changed:
            job.events.append(event)
            self.changed.notify_all()

    def _fail(self) -> None:
        if self.fault is not None:
            raise self.fault
