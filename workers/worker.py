"""The long-lived worker: takes jobs from the queue, steps them through an engine, publishes their events.

Threads
    engine     (the caller of `run`) owns scheduler, engine and every `Generation`; never waits for Redis.
    intake     pops jobs when there is room, tokenises them and compiles their grammars, hands them to the
               engine thread.
    keeper     renews leases, reaps those of dead workers, hears of cancels (LeaseKeeper).
    publisher  writes events and results (Publisher).
    vision     encodes the images of jobs, if the model takes images (Vision).
    look-ahead has the cached prefixes of waiting jobs brought nearer (LookAhead).
    tier-*     copy KV blocks between tiers (TierMover).
    heartbeat  tells the registry that this worker lives.
    relay, celery-control  hear of cancels and of Celery's remote control (control.py).
All that other threads want of the engine thread goes through `_inbox`.

While a step runs the engine thread publishes what the step before gave, and empties the inbox. Between a
step's result and the next one's start it does only what the next plan depends on: it takes the result over,
ends the choices that it finishes, and does what the inbox has got meanwhile.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from redis import Redis

from wicore import __version__
from wicore.admission import admit
from wicore.config import Settings
from wicore.engine.base import Engine, ImageRows, PendingStep, StepPlan, VisionEncoder
from wicore.errors import Cancelled, EngineError, Expired, Unavailable, WicoreError
from wicore.model import Model
from wicore.queue.consumer import Delivery, LeaseConsumer, LeaseKeeper
from wicore.queue.producer import Producer
from wicore.queue.registry import Heartbeat
from wicore.request import Priority, TerminalType, terminal_event, usage_of
from wicore.scheduler import Limits, Scheduler, TokenOut
from wicore.stream.publisher import Publisher
from wicore.telemetry.tracing import tracer_of
from wicore.tiers.cache import TieredCache
from workers.account import Account
from workers.control import CancelListener, CeleryNode
from workers.intake import Intake
from workers.job import Job
from workers.lookahead import LookAhead
from workers.panel import Panel
from workers.preparation import Preparation
from workers.vision import Vision

log = logging.getLogger("wicore.worker")

_FLUSH_S = 5.0
"""How long a stopping worker waits for Redis to take what is left to write."""


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


class Worker:
    """One engine and the queue it serves. `run` blocks until `stop` and the drain after it."""

    def __init__(
        self,
        settings: Settings,
        model: Model,
        engine: Engine,
        redis: Redis,
        owner: str,
        encoder: VisionEncoder | None = None,
    ) -> None:
        """`owner` names this process in leases and must never be used again by another. Engine and `encoder`,
        None where images are not served, are closed at the end of `run`."""
        self._settings, self._model, self._engine, self._redis = settings, model, engine, redis
        self._owner = owner
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._cache = TieredCache(settings, engine, self._wake)
        self._vision = self._eyes(encoder)
        self._preparation = Preparation(
            settings,
            model,
            engine.info.vocab_size,
            self._cache.manager,
            redis,
            sees=self._vision is not None,
        )
        eyes = model.checkpoint.config.vision if self._vision is not None else None
        limits = Limits(
            settings.scheduler.max_batch,
            settings.scheduler.token_budget,
            image_tokens=0 if eyes is None else eyes.tokens,
        )
        self._scheduler = Scheduler(limits, self._cache.manager)
        self._jobs: dict[str, Job] = {}
        """By delivery tag."""
        self._by_key: dict[int, Job] = {}
        self._held: dict[str, Delivery] = {}
        """Leases that this worker has, by tag, from the pop until the end is stored."""
        self._step: _Step | None = None
        self._untold: dict[Job, None] = {}
        """Those with something to publish, in order."""
        self._freed: list[tuple[int, Priority]] = []
        """Slots to be released, with their level."""
        self._stopping = threading.Event()
        self._step_started: float | None = None
        self._step_ended = 0.0
        self._awaits_blocks = False
        """Every sequence waits for blocks under way."""
        self._steps = self._accepted = 0
        self._sampled: list[int] = []
        """Keys of the sequences to which the last step gave a token."""
        self._between = _Mean()
        """Seconds from a step's result to the start of one that follows at once."""
        self._account = Account(model.context, owner, tracer_of(settings.telemetry, "wicore-worker"))
        prefix, leases = settings.redis.prefix, settings.queue
        self._consumer = LeaseConsumer(redis, owner, prefix, leases)
        self._intake = Intake(
            self._consumer,
            settings.scheduler.max_batch,
            leases.max_attempts,
            held=lambda: list(self._held.values()),
            accept=self._accept,
            may_pop=self._progresses,
        )
        self._room, self._trial = self._intake.room, self._intake.trial
        self._look_ahead = LookAhead(
            self._consumer.peek,
            tokens=lambda body: admit(body, model, settings).token_ids,
            offer=self._prefetch,
            count=settings.hmt.look_ahead if settings.hmt.nvme_path else 0,
            busy=lambda: self._room.full and self._progresses(),
        )
        self._keeper = LeaseKeeper(
            redis,
            owner,
            prefix,
            leases,
            on_lost=self._lose,
            on_cancel=self._cancel_soon,
            progress=self._progresses,
        )
        self._publisher = Publisher(
            redis,
            prefix,
            leases,
            on_lost=self._lose,
            on_cancel=self._cancel_soon,
            on_finished=self._let_go,
            on_room=self._wake,
            wait_replicas=settings.redis.wait_replicas,
        )
        self._heartbeat = Heartbeat(redis, owner, self.status, prefix)
        self._cancels = CancelListener(redis, prefix, self._cancel_job)
        assert settings.redis.url is not None
        node = f"wicore@{owner}"
        panel = Panel(node, self, Producer(redis, prefix, leases), settings)
        self._celery = CeleryNode(settings.redis.url, node, panel)

    def _eyes(self, encoder: VisionEncoder | None) -> Vision | None:
        shape = self._model.checkpoint.config.vision
        if encoder is None or shape is None:
            return None
        return Vision(
            encoder,
            shape.image_size,
            self._settings.model.image_cache_bytes,
            wanted=lambda job: self._jobs.get(job.delivery.tag) is job,
            seen=lambda job, rows: self._inbox.put(lambda: self._see(job, rows)),
            refused=lambda job, err: self._inbox.put(lambda: self._refuse(job, err)),
            failed=lambda err: self._inbox.put(lambda: self._raise(err)),
        )

    def run(self) -> None:
        """Serve until `stop`, then drain for `queue.drain_s` and hand back what is left."""
        self._publisher.start()
        self._keeper.start()
        self._heartbeat.start()
        self._cancels.start()
        self._celery.start()
        if self._vision is not None:
            self._vision.start()
        self._intake.start()
        self._look_ahead.start()
        try:
            while not self._stopping.is_set():
                self._advance()
            drain_until = time.monotonic() + self._settings.queue.drain_s
            while self._jobs and time.monotonic() < drain_until:
                self._advance(drain_until)
            self._end_step()
        finally:
            healthy = sys.exc_info()[0] is None
            self.stop()
            self._intake.join()
            self._look_ahead.join()
            if self._vision is not None:
                self._vision.stop()
            self._leave(healthy=healthy)

    def stop(self) -> None:
        """Take no more jobs; `run` drains and returns. For any thread; idempotent, also when it has ended."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._intake.stop()
        self._look_ahead.stop()
        self._wake()

    def status(self) -> dict[str, object]:
        """What the registry shows of this worker. For any thread."""
        info = self._engine.info
        return {
            "model": self._model.name,
            "engine": info.name,
            "device": info.device,
            "weights": info.weights,
            "slots": self._settings.scheduler.max_batch,
            "running": self._scheduler.running,
            "waiting": self._scheduler.waiting,
            "context": self._model.context,
            "global_blocks": info.global_blocks,
            "window_blocks": info.window_blocks,
            "device_memory": dict(info.memory),
            "steps": self._steps,
            "sequences": self._sequences(),
            "between_ms": round(self._between.mean * 1e3, 3),
            "preemptions": self._scheduler.preemptions,
            "kv": self._cache.report(),
            "images": None if self._vision is None else self._vision.report(),
            "jobs": self._accepted,
            "version": __version__,
            **self._account.stats.report(
                time.monotonic(),
                running=len(self._held),
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
        return 0.0 if self._vision is None else self._vision.lasts_s()

    def jobs(self) -> tuple[list[Delivery], list[Delivery]]:
        """The jobs that the engine has, and those popped and not yet there. For any thread."""
        running: list[Delivery] = []
        preparing: list[Delivery] = []
        for delivery in list(self._held.values()):
            (running if delivery.tag in self._jobs else preparing).append(delivery)
        return running, preparing

    def check(self) -> None:
        """Raise EngineError when blocks, sequences or slots do not add up. Call it when `run` has ended."""
        self._scheduler.check()
        self._room.check(sum(len(job.keys) for job in self._jobs.values()))

    # --- engine thread ----------------------------------------------------------------------------

    def _advance(self, until: float | None = None) -> None:
        """End the step under way and start the next, then do what can be done while that one runs.

        With nothing to step, wait for the inbox, at most `until`. While Redis is away and the publisher full,
        nothing is stepped either. Blocks that have moved ring in the inbox, too.
        """
        ended = self._end_step()
        idle = self._scheduler.idle
        if ended is None:
            if idle:
                self._cache.tend()
            self._empty_inbox(until, block=idle or self._publisher.full or self._awaits_blocks)
        else:
            self._empty_inbox(None, block=False)
        self._expire()
        self._start_step(following=ended is not None)
        self._offer_room()
        self._tell()
        self._scheduler.catch_up()
        if ended is not None:
            self._observe(*ended)
        if self._step is not None:
            self._empty_inbox(None, block=False)
            self._offer_room()
            self._tell()

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

    def _end_step(self) -> tuple[StepPlan, float] | None:
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

    def _tell(self) -> None:
        """Publish what the jobs have to say."""
        untold, self._untold = self._untold, {}
        if untold:
            with self._publisher.gathered():
                for job in untold:
                    self._publish(job)

    def _offer_room(self) -> None:
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

    def _empty_inbox(self, until: float | None, *, block: bool) -> None:
        ends = [job.deadline for job in self._jobs.values()] if block else []
        soonest = min((end for end in (*ends, until) if end is not None), default=None)
        timeout = None if soonest is None else max(0.0, soonest - time.monotonic())
        try:
            self._inbox.get(block=block, timeout=timeout)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return

    def _begin(self, job: Job) -> None:
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
            assert self._vision is not None
            job.seeing = True
            job.times.seeing = time.monotonic()
            if (rows := self._vision.look(job)) is not None:
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

    def _drop(self, delivery: Delivery) -> None:
        """The lease is lost: another worker has the job, and nothing of ours may be written."""
        self._let_go(delivery)
        job = self._jobs.get(delivery.tag)
        if job is not None and job.delivery is delivery:
            log.warning("job %s: lease lost in attempt %d; dropped", delivery.job_id, delivery.attempt)
            self._abandon(job)

    def _cancel(self, delivery: Delivery) -> None:
        job = self._jobs.get(delivery.tag)
        if job is not None:
            self._end(job, "cancelled", Cancelled("cancelled by the client"))

    def _expire(self) -> None:
        now = time.monotonic()
        for job in [j for j in self._jobs.values() if j.deadline is not None and j.deadline <= now]:
            self._end(job, "expired", Expired("timeout_s: the job's deadline passed while it ran"))

    def _leave(self, *, healthy: bool) -> None:
        """Flush, hand back what is unfinished, stop the threads.

        After a failure the jobs that the engine had come back at once as those of a dead worker do: the
        attempt counts, so that a job that brings engines down does so a bounded number of times. Nothing is
        saved of the device's blocks then.
        """
        self._celery.stop()
        self._cancels.stop()
        if healthy:  # so that the slots of jobs popped amid the stop are accounted for
            try:
                self._empty_inbox(None, block=False)
            except EngineError as err:  # amid the last image
                log.error("the engine failed: %s", err.message)
                healthy = False
            self._offer_room()
        self._tell()
        self._publisher.stop(_FLUSH_S)
        self._keeper.stop()
        for job in self._jobs.values():
            self._account.left(job.delivery, job.times, "handed_back" if healthy else "failed")
        # What never got to the engine is to be blamed for nothing.
        left = [delivery for tag, delivery in list(self._held.items()) if healthy or tag not in self._jobs]
        try:
            self._consumer.hand_back(left)
            log.info("stopped; %d jobs handed back", len(left))
            if not healthy:
                log.error("%d jobs given up to other workers", self._consumer.give_up())
        except Unavailable as err:
            log.warning("stopped; the leases of %d jobs run out, for %s", len(self._held), err.message)
        self._heartbeat.stop()
        self._consumer.close()
        self._account.close()
        if healthy:
            self._cache.flush(_FLUSH_S, self._wait)
            self._cache.close()
            if self._close_vision():
                self._engine.close()
            return
        self._cache.abandon()
        try:
            if self._close_vision():
                self._engine.close()
        except EngineError as err:
            log.error("the engine did not close: %s", err.message)

    def _close_vision(self) -> bool:
        """False while an image is still being encoded: then the device is left to the end of the process."""
        if self._vision is None or self._vision.close(_FLUSH_S):
            return True
        log.warning("an image is still being encoded")
        return False

    def _wait(self, seconds: float) -> None:
        """Until the inbox rings, but no longer."""
        try:
            self._inbox.get(timeout=seconds)
        except queue.Empty:
            return

    # --- other threads ----------------------------------------------------------------------------

    def _wake(self) -> None:
        self._inbox.put(lambda: None)

    def _prefetch(self, tokens: Sequence[int]) -> None:
        chain = self._cache.manager.chain(tokens)
        self._inbox.put(lambda: self._cache.manager.prefetch(chain))

    def _cancel_job(self, job_id: str) -> None:
        for delivery in list(self._held.values()):
            if delivery.job_id == job_id:
                self._cancel_soon(delivery)

    def _cancel_soon(self, delivery: Delivery) -> None:
        self._inbox.put(lambda: self._cancel(delivery))

    def _lose(self, delivery: Delivery) -> None:
        self._publisher.forget(delivery)
        self._inbox.put(lambda: self._drop(delivery))

    def _let_go(self, delivery: Delivery) -> None:
        self._keeper.release(delivery)
        self._account.let_go(delivery)
        if self._held.get(delivery.tag) is delivery:
            del self._held[delivery.tag]
        self._trial.end(delivery)

    def _progresses(self) -> bool:
        """Whether engine and encoder still make progress; a hung one must lose its leases."""
        limits = self._settings.queue
        return self.step_lasts_s() < limits.stall_s and self.image_lasts_s() < limits.image_stall_s

    def _accept(self, delivery: Delivery) -> None:
        """Turn a delivery into a job for the engine thread, or into its failure."""
        self._held[delivery.tag] = delivery
        self._accepted += 1
        self._keeper.hold(delivery)
        times = self._account.popped(delivery)
        try:
            job = self._preparation.job(delivery, times)
        except WicoreError as err:
            self._account.ended(delivery, times, "failed", usage_of(0, 0))
            event = terminal_event(delivery.job_id, delivery.seq + 1, "failed", error=err.body())
            self._publisher.finish(delivery, event)
            return
        self._room.claim(delivery.body.sequences, delivery.level)
        self._look_ahead.wake()
        self._inbox.put(lambda: self._begin(job))
