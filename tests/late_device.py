"""An emulated device whose copies of many blocks are made only when something waits for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.emulation.device import EmulatedDevice, EmulatedEvent, EmulatedStream


class LateStream(EmulatedStream):
    """Notes copies down; what waits for an event has those before it made."""

    def __init__(self, handle: int, waits: list[int]) -> None:
        super().__init__(handle)
        self.late: list[Callable[[], None]] = []
        self.made = 0
        self.waits = waits

    def make(self, count: int) -> None:
        """The first `count` copies, as far as they have not been made."""
        for work in self.late[self.made : count]:
            work()
        self.made = max(self.made, count)

    def wait(self, event: Any) -> None:
        if not event.done():
            self.waits.append(event.copies - event.stream.made)
        event.wait()

    def synchronize(self) -> None:
        self.make(len(self.late))


class LateEvent(EmulatedEvent):
    """After so many copies of a stream."""

    stream: LateStream | None = None
    copies = 0

    def record(self, stream: Any) -> None:
        super().record(stream)
        self.stream, self.copies = stream, len(stream.late)

    def done(self) -> bool:
        return self.stream is None or self.copies <= self.stream.made

    def wait(self) -> None:
        if self.stream is not None:
            self.stream.make(self.copies)


class LateDevice(EmulatedDevice):
    """`waits`: of each wait of a stream that found copies unmade, how many calls' there were."""

    def __init__(self) -> None:
        super().__init__(capability=(8, 0))
        self.waits: list[int] = []

    def stream(self) -> LateStream:
        self._streams += 1
        return LateStream(self._streams, self.waits)

    def event(self, timing: bool = False) -> EmulatedEvent:
        return LateEvent(timing)

    def copy_many(self, targets: Any, sources: Any, size: int, stream: Any) -> None:
        stream.late.append(partial(super().copy_many, targets.copy(), sources.copy(), size, stream))
