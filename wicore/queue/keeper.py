"""Keeping leases alive, and taking over those of dead workers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import redis

from wicore.config import QueueSettings
from wicore.queue.connection import is_outage
from wicore.queue.consumer import Delivery
from wicore.queue.schema import Keys
from wicore.queue.scripts import Scripts

log = logging.getLogger(__name__)

_SWEEP_S = 1.0
"""How often the sweep runs at most: how late a dead worker or a passed deadline may be noticed."""


class LeaseKeeper:
    """Thread that renews the leases held, every third of a lease, and sweeps for those of dead workers.

    It uses connections of its own. When `progress()` returns False (the engine hangs) it stops renewing,
    so that another worker takes over. `on_lost(delivery)` and `on_cancel(delivery)` are called from its
    thread: the lease is gone, drop all work on the job; or someone called the job off, finish it as
    cancelled (may come more than once). It goes on through any outage of Redis; after one it renews first
    and lets a whole lease pass before it takes jobs from others, who may have been cut off just as well.
    """

    def __init__(
        self,
        client: redis.Redis,
        prefix: str = "wicore",
        settings: QueueSettings | None = None,
        *,
        on_lost: Callable[[Delivery], None],
        on_cancel: Callable[[Delivery], None],
        progress: Callable[[], bool] = lambda: True,
    ) -> None:
        self._settings = settings or QueueSettings()
        self._scripts = Scripts(client, Keys(prefix), self._settings)
        self._on_lost = on_lost
        self._on_cancel = on_cancel
        self._progress = progress
        self._lock = threading.Lock()
        self._held: dict[str, Delivery] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hold(self, delivery: Delivery) -> None:
        """Renew this lease from now on."""
        with self._lock:
            self._held[delivery.tag] = delivery

    def release(self, delivery: Delivery) -> None:
        """Stop renewing: the job ended, was lost or was handed back. Idempotent."""
        with self._lock:
            if self._held.get(delivery.tag) is delivery:
                del self._held[delivery.tag]

    def held(self) -> list[Delivery]:
        """All leases being renewed."""
        with self._lock:
            return list(self._held.values())

    def stop(self) -> None:
        """Stop the thread and wait for it. Idempotent; leases still held run out."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        lease = self._settings.lease_s
        renew_every, sweep_every = lease / 3, min(_SWEEP_S, lease / 3)
        next_renewal = next_sweep = time.monotonic()
        while not self._stop.wait(max(0.0, min(next_renewal, next_sweep) - time.monotonic())):
            now = time.monotonic()
            try:
                if now >= next_renewal:
                    next_renewal = now + renew_every
                    self._renew()
                if now >= next_sweep:
                    next_sweep = now + sweep_every
                    self._scripts.call("reap")
            except redis.RedisError as err:
                level = logging.WARNING if is_outage(err) else logging.ERROR
                log.log(level, "leases cannot be renewed: %s", err)
                next_renewal = time.monotonic() + sweep_every
                next_sweep = time.monotonic() + lease

    def _renew(self) -> None:
        held = self.held()
        if not held or not self._progress():
            return
        triples = [part for d in held for part in (d.job_id, d.tag, d.fence)]
        lost, cancelled = self._scripts.call("renew", *triples)
        by_tag = {delivery.tag.encode(): delivery for delivery in held}
        for tag in lost:
            # A job that ended between the snapshot and the renewal has been released: not lost.
            if self._drop(by_tag[tag]):
                self._on_lost(by_tag[tag])
        for tag in cancelled:
            self._on_cancel(by_tag[tag])

    def _drop(self, delivery: Delivery) -> bool:
        with self._lock:
            return self._held.pop(delivery.tag, None) is delivery
