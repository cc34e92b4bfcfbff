"""How many more sequences the worker may take, shared by the engine thread and the intake thread."""

from __future__ import annotations

import threading

from wicore.errors import EngineError


class Room:
    """Slots of a worker. A slot is claimed when its job is popped and released when its sequence ends.

    A sequence that the step in flight surely ends counts as free already: its successor is fetched
    meanwhile, and the slot is not empty for a step.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._claimed = 0
        self._ending = 0
        self._closed = False
        self._changed = threading.Condition()

    def claim(self, count: int) -> None:
        with self._changed:
            self._claimed += count

    def release(self, count: int) -> None:
        with self._changed:
            self._claimed -= count
            self._changed.notify_all()

    def expect(self, ending: int) -> None:
        """`ending` sequences end with the step in flight; 0 when it is over."""
        with self._changed:
            self._ending = ending
            if ending:
                self._changed.notify_all()

    def wait(self) -> int:
        """Block until there is room; how much, 0 only after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._free() > 0)
            return 0 if self._closed else self._free()

    def close(self) -> None:
        """End every `wait`, now and later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def check(self, present: int) -> None:
        """Raise EngineError unless `present` sequences have as many slots claimed."""
        if self._claimed != present:
            raise EngineError(f"{self._claimed} of {self._slots} slots are claimed for {present} sequences")

    def _free(self) -> int:
        return self._slots - self._claimed + self._ending
