"""The thread that takes jobs from the queue while the worker has room."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from wicore.errors import WicoreError
from wicore.queue.consumer import Delivery, LeaseConsumer
from workers.room import Offer, Room
from workers.trial import Trial

log = logging.getLogger("wicore.worker")

_POLL_S = 1.0
"""How often it looks whether it should stop, when nothing wakes it."""


class Intake:
    """Pops what the room offers, one suspect at a time, and hands each delivery to `accept` in its thread.

    `room` and `trial` are told by the engine thread what became of the jobs.
    """

    def __init__(
        self,
        consumer: LeaseConsumer,
        slots: int,
        max_attempts: int,
        *,
        held: Callable[[], Iterable[Delivery]],
        accept: Callable[[Delivery], None],
        may_pop: Callable[[], bool],
    ) -> None:
        """`held` gives all leases of this worker; while `may_pop()` is false none is added."""
        self._consumer = consumer
        self.room = Room(slots, consumer.interrupt)
        self.trial = Trial(max_attempts, consumer.interrupt)
        self._held = held
        self._accept = accept
        self._may_pop = may_pop
        self._stopping = threading.Event()
        self._cut_off = False
        self._thread = threading.Thread(target=self._run, name="intake")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Take no more; for any thread."""
        self._stopping.set()
        self.room.close()
        self._consumer.interrupt()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while (offer := self.room.wait()) is not None:
            if not self._may_pop():
                self._stopping.wait(_POLL_S)
                continue
            try:
                # Without a free slot the bell comes first: it costs no round trip, and slots free often.
                if offer.above is None or self._consumer.wait(_POLL_S, above=offer.above):
                    self._pop(offer)
            except WicoreError as err:
                if not self._cut_off:
                    log.warning("the queue is out of reach, trying again: %s", err.message)
                self._cut_off = True
                self._stopping.wait(_POLL_S)

    def _pop(self, offer: Offer) -> None:
        if (suspect := self.trial.suspect) is not None and self.trial.acquitted:
            self._consumer.acquit(suspect)
            self.trial.end(suspect)
        suspects = self.trial.suspect is None
        deliveries = self._consumer.pop(offer.room, held=self._held(), suspects=suspects, above=offer.above)
        if self._cut_off:
            log.info("the queue is back")
            self._cut_off = False
        for delivery in deliveries:
            if delivery.suspect:
                self.trial.begin(delivery)
            self._accept(delivery)
        if not deliveries and offer.above is None:
            self._consumer.wait(_POLL_S, suspects=suspects)
