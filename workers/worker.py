"""The long-lived worker: takes jobs from the queue, steps them through an engine, publishes their events.

Threads
    engine     (the caller of `run`) owns scheduler, engine and every `Generation`; never waits for Redis
               (EngineLoop).
    intake     pops jobs when there is room, tokenises them and compiles their grammars, hands them to the
               engine thread.
    keeper     renews leases, reaps those of dead workers, hears of cancels (LeaseKeeper).
    publisher  writes events and results (Publisher).
    vision     encodes the images of jobs, if the model takes images (Vision).
    look-ahead has the cached prefixes of waiting jobs brought nearer (LookAhead).
    tier-*     copy KV blocks between tiers (TierMover).
    heartbeat  tells the registry that this worker lives.
    relay, celery-control  hear of cancels and of Celery's remote control (control.py).
All that other threads want of the engine thread goes through its `Inbox`.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Sequence

from redis import Redis

from wicore import __version__
from wicore.admission import admit
from wicore.config import Settings
from wicore.engine.base import Engine, VisionEncoder
from wicore.errors import EngineError, Unavailable, WicoreError
from wicore.model import Model
from wicore.queue.consumer import Delivery, LeaseConsumer, LeaseKeeper
from wicore.queue.producer import Producer
from wicore.queue.registry import Heartbeat
from wicore.request import terminal_event, usage_of
from wicore.stream.publisher import Publisher
from wicore.telemetry.tracing import tracer_of
from wicore.tiers.cache import TieredCache
from workers.account import Account
from workers.control import CancelListener, CeleryNode
from workers.inbox import Inbox
from workers.intake import Intake
from workers.lookahead import LookAhead
from workers.loop import EngineLoop
from workers.panel import Panel
from workers.preparation import Preparation

log = logging.getLogger("wicore.worker")

_FLUSH_S = 5.0
"""How long a stopping worker waits for Redis to take what is left to write."""


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
        self._inbox = Inbox()
        self._cache = TieredCache(settings, engine, self._inbox.ring)
        self._preparation = Preparation(
            settings,
            model,
            engine.info.vocab_size,
            self._cache.manager,
            redis,
            sees=encoder is not None and model.checkpoint.config.vision is not None,
        )
        self._held: dict[str, Delivery] = {}
        """Leases that this worker has, by tag, from the pop until the end is stored."""
        self._stopping = threading.Event()
        self._accepted = 0
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
        self._look_ahead = LookAhead(
            self._consumer.peek,
            tokens=lambda body: admit(body, model, settings).token_ids,
            offer=self._prefetch,
            count=settings.hmt.look_ahead if settings.hmt.nvme_path else 0,
            busy=lambda: self._intake.room.full and self._progresses(),
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
            on_room=self._inbox.ring,
            wait_replicas=settings.redis.wait_replicas,
        )
        self._loop = EngineLoop(
            settings,
            model,
            engine,
            self._cache,
            encoder,
            inbox=self._inbox,
            publisher=self._publisher,
            room=self._intake.room,
            trial=self._intake.trial,
            account=self._account,
        )
        self._heartbeat = Heartbeat(redis, owner, self.status, prefix)
        self._cancels = CancelListener(redis, prefix, self._cancel_job)
        assert settings.redis.url is not None
        node = f"wicore@{owner}"
        panel = Panel(node, self, Producer(redis, prefix, leases), settings)
        self._celery = CeleryNode(settings.redis.url, node, panel)

    def run(self) -> None:
        """Serve until `stop`, then drain for `queue.drain_s` and hand back what is left."""
        self._publisher.start()
        self._keeper.start()
        self._heartbeat.start()
        self._cancels.start()
        self._celery.start()
        if self._loop.vision is not None:
            self._loop.vision.start()
        self._intake.start()
        self._look_ahead.start()
        try:
            while not self._stopping.is_set():
                self._loop.advance()
            drain_until = time.monotonic() + self._settings.queue.drain_s
            while self._loop.jobs() and time.monotonic() < drain_until:
                self._loop.advance(drain_until)
            self._loop.end_step()
        finally:
            healthy = sys.exc_info()[0] is None
            self.stop()
            self._intake.join()
            self._look_ahead.join()
            if self._loop.vision is not None:
                self._loop.vision.stop()
            self._leave(healthy=healthy)

    def stop(self) -> None:
        """Take no more jobs; `run` drains and returns. For any thread; idempotent, also when it has ended."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._intake.stop()
        self._look_ahead.stop()
        self._inbox.ring()

    def status(self) -> dict[str, object]:
        """What the registry shows of this worker. For any thread."""
        info = self._engine.info
        return {
            "model": self._model.name,
            "engine": info.name,
            "device": info.device,
            "weights": info.weights,
            "slots": self._settings.scheduler.max_batch,
            "context": self._model.context,
            "global_blocks": info.global_blocks,
            "window_blocks": info.window_blocks,
            "device_memory": dict(info.memory),
            "kv": self._cache.report(),
            "jobs": self._accepted,
            "version": __version__,
            **self._loop.status(len(self._held)),
        }

    def step_lasts_s(self) -> float:
        """How long the engine has been in the step under way; 0 between steps. For any thread."""
        return self._loop.step_lasts_s()

    def image_lasts_s(self) -> float:
        """How long the image under way has been with the encoder; 0 between images. For any thread."""
        return self._loop.image_lasts_s()

    def jobs(self) -> tuple[list[Delivery], list[Delivery]]:
        """The jobs that the engine has, and those popped and not yet there. For any thread."""
        running: list[Delivery] = []
        preparing: list[Delivery] = []
        for delivery in list(self._held.values()):
            (running if self._loop.has(delivery) else preparing).append(delivery)
        return running, preparing

    def check(self) -> None:
        """Raise EngineError when blocks, sequences or slots do not add up. Call it when `run` has ended."""
        self._loop.check()

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
                self._inbox.do()
            except EngineError as err:  # amid the last image
                log.error("the engine failed: %s", err.message)
                healthy = False
            self._loop.offer_room()
        self._loop.tell()
        self._publisher.stop(_FLUSH_S)
        self._keeper.stop()
        for job in self._loop.jobs():
            self._account.left(job.delivery, job.times, "handed_back" if healthy else "failed")
        # What never got to the engine is to be blamed for nothing.
        left = [lease for lease in list(self._held.values()) if healthy or not self._loop.has(lease)]
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
            self._cache.flush(_FLUSH_S, self._inbox.wait)
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
        if self._loop.vision is None or self._loop.vision.close(_FLUSH_S):
            return True
        log.warning("an image is still being encoded")
        return False

    # --- other threads ----------------------------------------------------------------------------

    def _prefetch(self, tokens: Sequence[int]) -> None:
        chain = self._cache.manager.chain(tokens)
        self._inbox.put(lambda: self._cache.manager.prefetch(chain))

    def _cancel_job(self, job_id: str) -> None:
        for delivery in list(self._held.values()):
            if delivery.job_id == job_id:
                self._cancel_soon(delivery)

    def _cancel_soon(self, delivery: Delivery) -> None:
        self._inbox.put(lambda: self._loop.cancel(delivery))

    def _lose(self, delivery: Delivery) -> None:
        self._publisher.forget(delivery)
        self._inbox.put(lambda: self._drop(delivery))

    def _drop(self, delivery: Delivery) -> None:
        """In the engine thread."""
        self._let_go(delivery)
        self._loop.drop(delivery)

    def _let_go(self, delivery: Delivery) -> None:
        self._keeper.release(delivery)
        self._account.let_go(delivery)
        if self._held.get(delivery.tag) is delivery:
            del self._held[delivery.tag]
        self._intake.trial.end(delivery)

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
        self._intake.room.claim(delivery.body.sequences, delivery.level)
        self._look_ahead.wake()
        self._inbox.put(lambda: self._loop.begin(job))
