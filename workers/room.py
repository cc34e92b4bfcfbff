"""How many more sequences the worker may take, shared by the engine thread and the intake thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from wicore.errors import EngineError
from wicore.request import Priority


class Offer(NamedTuple):
    """What may be taken now."""

    room: int
    above: Priority | None
    """Only jobs more urgent than this level, which a running sequence of it will give way to; None: any."""


class Room:
    """Slots of a worker. A slot is claimed when its job is popped and released when its sequence ends.

    A sequence that the step in flight surely ends counts as free already: its successor is fetched
    meanwhile, and the slot is not empty for a step. Without a free slot a more urgent job may still be
    taken: the scheduler preempts for it, and the preempted sequence waits in the worker.
    """

    def __init__(self, slots: int, wake: Callable[[], None]) -> None:
        """`wake` is called when a slot frees while the intake looks for urgent jobs alone."""
        self._slots = slots
        self._wake = wake
        self._claimed = dict.fromkeys(sorted(Priority, reverse=True), 0)
        """Sequences by level, the least urgent first: the order in which they give way."""
        self._ending = 0
        self._closed = False
        self._urgent_only = False
        self._changed = threading.Condition()

    def claim(self, count: int, level: Priority) -> None:
        with self._changed:
            self._claimed[level] += count

    def release(self, freed: Iterable[tuple[int, Priority]] = (), *, ending: int) -> None:
        """So many slots of each level are free, and `ending` other sequences end with the step in flight."""
        with self._changed:
            before = self._free()
            for count, level in freed:
                self._claimed[level] -= count
            self._ending = ending
            if self._free() > before:
                self._tell()

    def wait(self) -> Offer | None:
        """Block until something may be taken; None after `close`."""
        with self._changed:
            self._urgent_only = False
            self._changed.wait_for(lambda: self._closed or self._offer() is not None)
            offer = None if self._closed else self._offer()
            self._urgent_only = offer is not None and offer.above is not None
            return offer

    @property
    def full(self) -> bool:
        """Whether the next job has to wait for a slot, or else displace another. For any thread."""
        with self._changed:
            return self._free() <= 0

    def close(self) -> None:
        """End every `wait`, now and later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def check(self, present: int) -> None:
        """Raise EngineError unless `present` sequences have as many slots claimed."""
        claimed = sum(self._claimed.values())
        if claimed != present:
            raise EngineError(f"{claimed} of {self._slots} slots are claimed for {present} sequences")

    def _free(self) -> int:
        return self._slots - sum(self._claimed.values()) + self._ending

    def _offer(self) -> Offer | None:
        free = self._free()
        if free > 0:
            return Offer(free, None)
        # Those over the slots have given way already; is the next one of a level that would?
        for level, count in self._claimed.items():
            if -free < count:
                return None if level == min(Priority) else Offer(1, level)
            free += count
        return None

    def _tell(self) -> None:
        self._changed.notify_all()
        offer = self._offer()
        if self._urgent_only and offer is not None and offer.above is None:
            self._urgent_only = False
            self._wake()
