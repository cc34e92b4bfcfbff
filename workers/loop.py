"""The engine thread's part of a worker: jobs, their sequences, and the steps that give them tokens.

While a step runs the loop publishes what the step before gave, and empties the inbox. Between a step's result
and the next one's start it does only what the next plan depends on: it takes the result over, ends the
choices that it finishes, and does what the inbox has got meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from wicore.config import Settings
from wicore.engine.base import Engine, ImageRows, PendingStep, StepPlan, VisionEncoder
from wicore.errors import Cancelled, EngineError, Expired, WicoreError
from wicore.model import Model
from wicore.queue.consumer import Delivery
from wicore.request import Priority, TerminalType
from wicore.scheduler import Limits, Scheduler, TokenOut
from wicore.stream.publisher import Publisher
from wicore.tiers.cache import TieredCache
from workers.account import Account
from workers.inbox import Inbox
from workers.job import Job
from workers.room import Room
from workers.trial import Trial
from workers.vision import Vision

log = logging.getLogger("wicore.worker")


class _Step(NamedTuple):
    """The step under way."""

    plan: StepPlan
    pending: PendingStep
    started: float


class _Mean:
    """A decayed mean, over about the last hundred."""

    def __init__(self) -> None:
        self.mean = 0.0
        self._weight = 1.0

    def add(self, value: float) -> None:
        self.mean += (value - self.mean) * self._weight
        self._weight = max(0.01, self._weight / (1 + self._weight))


class EngineLoop:
    """Owns the scheduler and every `Generation`, and steps the engine; never waits for Redis.

    Of the engine thread, but for what says that it is for any thread.
    """

    def __init__(
        self,
        settings: Settings,
        model: Model,
        engine: Engine,
        cache: TieredCache,
        encoder: VisionEncoder | None,
        *,
        inbox: Inbox,
        publisher: Publisher,
        room: Room,
        trial: Trial,
        account: Account,
    ) -> None:
        """`encoder`: None where images are not served. Room, trial and account are told what becomes of jobs;
        all that other threads want comes through `inbox`."""
        self._settings, self._model, self._engine, self._cache = settings, model, engine, cache
        self._inbox, self._publisher, self._account = inbox, publisher, account
        self._room, self._trial = room, trial
        eyes = None if encoder is None else model.checkpoint.config.vision
        limits = Limits(
            settings.scheduler.max_batch,
            settings.scheduler.token_budget,
            image_tokens=0 if eyes is None else eyes.tokens,
        )
        self._scheduler = Scheduler(limits, cache.manager)
        self.vision: Vision | None = None
        """The thread that encodes images; None: no job has any."""
        if encoder is not None and eyes is not None:
            self.vision = self._vision(encoder, eyes.image_size)
        self._jobs: dict[str, Job] = {}
        """By delivery tag."""
        self._by_key: dict[int, Job] = {}
        self._step: _Step | None = None
        self._untold: dict[Job, None] = {}
        """Those with something to publish, in order."""
        self._freed: list[tuple[int, Priority]] = []
        """Slots to be released, with their level."""
        self._step_started: float | None = None
        self._step_ended = 0.0
        self._awaits_blocks = False
        """Every sequence waits for blocks under way."""
        self._steps = 0
        self._sampled: list[int] = []
        """Keys of the sequences to which the last step gave a token."""
        self._between = _Mean()
        """Seconds from a step's result to the start of one that follows at once."""

    def _vision(self, encoder: VisionEncoder, side: int) -> Vision:
        return Vision(
            encoder,
            side,
            self._settings.model.image_cache_bytes,
            wanted=lambda job: self._jobs.get(job.delivery.tag) is job,
            seen=lambda job, rows: self._inbox.put(lambda: self._see(job, rows)),
            refused=lambda job, err: self._inbox.put(lambda: self._refuse(job, err)),
            failed=lambda err: self._inbox.put(lambda: self._raise(err)),
        )

    def jobs(self) -> list[Job]:
        """Those that have not ended. For any thread."""
        return list(self._jobs.values())

    def has(self, delivery: Delivery) -> bool:
        """For any thread."""
        return delivery.tag in self._jobs

    def status(self, held: int) -> dict[str, object]:
        """What the registry shows of steps and sequences, of a worker with so many jobs. For any thread."""
        return {
            "running": self._scheduler.running,
            "waiting": self._scheduler.waiting,
            "steps": self._steps,
            "sequences": self._sequences(),
            "between_ms": round(self._between.mean * 1e3, 3),
            "preemptions": self._scheduler.preemptions,
            "images": None if self.vision is None else self.vision.report(),
            **self._account.stats.report(
                time.monotonic(),
                running=held,
                sequences=self._scheduler.running,
                waiting=self._scheduler.waiting,
                num_preemptions=self._scheduler.preemptions,
            ),
        }

    def _sequences(self) -> list[dict[str, object]]:
        """What is told of each choice that the engine has, oldest first: of those that run, and of as many
        that wait, as may when more urgent ones came."""
        known = list(self._by_key.items())[: 2 * self._settings.scheduler.max_batch]
        told = (job.told_of(key, self._scheduler.waits) for key, job in known)
        return [sequence for sequence in told if sequence is not None]

    def step_lasts_s(self) -> float:
        """How long the engine has been in the step under way; 0 between steps. For any thread."""
        started = self._step_started
        return 0.0 if started is None else time.monotonic() - started

    def image_lasts_s(self) -> float:
        """How long the image under way has been with the encoder; 0 between images. For any thread."""
        return 0.0 if self.vision is None else self.vision.lasts_s()

    def check(self) -> None:
        """Raise EngineError when blocks, sequences or slots do not add up. Call it when nothing runs."""
        self._scheduler.check()
        self._room.check(sum(len(job.keys) for job in self._jobs.values()))

    # --- steps ------------------------------------------------------------------------------------

    def advance(self, until: float | None = None) -> None:
        """End the step under way and start the next, then do what can be done while that one runs.

        With nothing to step, wait for the inbox, at most `until`. While Redis is away and the publisher full,
        nothing is stepped either. Blocks that have moved ring in the inbox, too.
        """
        ended = self.end_step()
        idle = self._scheduler.idle
        if ended is None:
            if idle:
                self._cache.tend()
            waits = idle or self._publisher.full or self._awaits_blocks
            self._inbox.do(block=waits, until=self._soonest(until) if waits else None)
        else:
            self._inbox.do()
        self._expire()
        self._start_step(following=ended is not None)
        self.offer_room()
        self.tell()
        self._scheduler.catch_up()
        if ended is not None:
            self._observe(*ended)
        if self._step is not None:
            self._inbox.do()
            self.offer_room()
            self.tell()

    def _start_step(self, *, following: bool) -> None:
        """Start the next step, if there is one; `following` says whether another has just ended."""
        if self._publisher.full:
            return
        plan = self._scheduler.plan()
        self._awaits_blocks = plan is None and self._cache.manager.busy
        if plan is not None:
            self._step_started = started = time.monotonic()
            if following:
                self._between.add(started - self._step_ended)
            self._step = _Step(plan, self._engine.start(plan), started)
            for sequence in plan.sequences:
                job = self._by_key.get(sequence.key)
                if job is not None and job.times.scheduled is None:
                    job.times.scheduled = started

    def end_step(self) -> tuple[StepPlan, float] | None:
        """Wait for the step under way, if any, and take its result over; the plan, and how long it took."""
        if self._step is None:
            return None
        plan, pending, started = self._step
        result = pending.result()
        # Only now: a step that fails stays under way, for the watchdog, until this process has ended.
        self._step = self._step_started = None
        self._step_ended = time.monotonic()
        self._steps += 1
        tokens = self._scheduler.apply(result)
        for out in tokens:
            self._take(out)
        self._sampled = [out.key for out in tokens]
        return plan, self._step_ended - started

    def _observe(self, plan: StepPlan, seconds: float) -> None:
        """What a step tells of the cache and of how jobs are served."""
        self._cache.observe(plan, seconds)
        computed = sum(len(sequence.tokens) for sequence in plan.sequences)
        self._account.stats.step(self._sampled, computed, self._step_ended)

    def _take(self, out: TokenOut) -> None:
        job = self._by_key.get(out.key)
        if job is None:
            return
        if job.times.first_token is None:
            job.times.first_token = self._step_ended
            self._account.stats.started(job.times, len(job.generation.prompt.token_ids))
        self._trial.observe(job.delivery)
        self._untold[job] = None
        ended = job.generation.take(job.keys[out.key], out.token)
        if job.generation.error is not None:
            self._end(job, "failed", job.generation.error)
        elif ended:
            self._end_choice(job, out.key)

    def tell(self) -> None:
        """Publish what the jobs have to say."""
        untold, self._untold = self._untold, {}
        if untold:
            with self._publisher.gathered():
                for job in untold:
                    self._publish(job)

    def offer_room(self) -> None:
        """Let the intake fetch what will take the slots that are free, or will be when the step ends."""
        freed, self._freed = self._freed, []
        self._room.release(freed, ending=self._scheduler.ending_soon())

    def _publish(self, job: Job) -> None:
        self._publisher.publish(job.delivery, job.generation.events())
        if job.ending is None:
            return
        kind, error = job.ending
        event = job.generation.end(kind, error.body() if error else None)
        outcome = event.get("finish_reason") or kind
        self._account.ended(job.delivery, job.times, outcome, job.generation.usage())
        created_s = job.delivery.created_ms // 1000
        model = self._model
        result = job.generation.result(model.name, created_s, model.fingerprint) if kind == "done" else None
        self._publisher.finish(job.delivery, event, result)

    def _soonest(self, until: float | None) -> float | None:
        """The first deadline of a job, or `until`."""
        ends = (*(job.deadline for job in self._jobs.values()), until)
        return min((end for end in ends if end is not None), default=None)

    def begin(self, job: Job) -> None:
        earlier = self._jobs.get(job.delivery.tag)
        if earlier is not None:
            # We lost the lease, nobody told us yet, and got the job anew.
            self._publisher.forget(earlier.delivery)
            self._abandon(earlier)
        self._jobs[job.delivery.tag] = job
        self._untold[job] = None
        for index, request in job.requests:
            job.keys[request.key] = index
            self._by_key[request.key] = job
        # Choices that an earlier attempt finished need no slot; all of them, if it died before the end.
        self._release(job, job.generation.body.sequences - len(job.requests))
        if job.generation.finished:
            self._end(job, "done")
        elif not job.generation.prompt.images:
            self._schedule(job, ())
        else:
            assert self.vision is not None
            job.seeing = True
            job.times.seeing = time.monotonic()
            if (rows := self.vision.look(job)) is not None:
                self._see(job, rows)

    def _see(self, job: Job, rows: Sequence[ImageRows]) -> None:
        """The images of a job are encoded; it may have ended meanwhile."""
        if self._jobs.get(job.delivery.tag) is job:
            job.seeing = False
            job.times.seen = time.monotonic()
            self._schedule(job, rows)

    def _refuse(self, job: Job, err: WicoreError) -> None:
        if self._jobs.get(job.delivery.tag) is job:
            self._end(job, "failed", err)

    @staticmethod
    def _raise(err: EngineError) -> None:
        raise err

    def _schedule(self, job: Job, images: Sequence[ImageRows]) -> None:
        try:
            for _, request in job.requests:
                self._scheduler.add(replace(request, images=images) if images else request)
        except WicoreError as err:
            self._end(job, "failed", err)

    def _end_choice(self, job: Job, key: int) -> None:
        job.generation.found_cached(self._scheduler.cached(key))
        self._scheduler.remove(key)
        self._account.stats.gone(key)
        del job.keys[key], self._by_key[key]
        self._release(job, 1)
        if job.generation.finished:
            self._end(job, "done")

    def _end(self, job: Job, kind: TerminalType, error: WicoreError | None = None) -> None:
        job.ending = kind, error
        job.times.last_token = self._step_ended
        self._untold[job] = None
        self._forget(job)

    def _abandon(self, job: Job) -> None:
        """Forget a job that is another worker's now, and what was to be said of it."""
        self._untold.pop(job, None)
        self._account.left(job.delivery, job.times, "lost")
        self._forget(job)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.delivery.tag, None)
        for key in job.keys:
            self._scheduler.remove(key)
            self._account.stats.gone(key)
            del self._by_key[key]
        self._release(job, len(job.keys))
        job.keys.clear()

    def _release(self, job: Job, slots: int) -> None:
        """The room is told later: that wakes the intake, which would compete with the next plan."""
        self._freed.append((slots, job.delivery.level))

    def drop(self, delivery: Delivery) -> None:
        """The lease is lost: another worker has the job, and nothing of ours may be written."""
        job = self._jobs.get(delivery.tag)
        if job is not None and job.delivery is delivery:
            log.warning("job %s: lease lost in attempt %d; dropped", delivery.job_id, delivery.attempt)
            self._abandon(job)

    def cancel(self, delivery: Delivery) -> None:
        job = self._jobs.get(delivery.tag)
        if job is not None:
            self._end(job, "cancelled", Cancelled("cancelled by the client"))

    def _expire(self) -> None:
        now = time.monotonic()
        for job in [j for j in self._jobs.values() if j.deadline is not None and j.deadline <= now]:
            self._end(job, "expired", Expired("timeout_s: the job's deadline passed while it ran"))
