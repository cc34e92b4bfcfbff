"""A websocket of many jobs whose client does not keep up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from api.callers import Caller
from api.session import TRY_AGAIN_LATER, Session
from api.slots import Budget
from wicore.config import ApiSettings
from wicore.request import Event, token_event

EVENTS = 1000


class SlowSocket:
    """Takes one frame, and the next when `reads_on` is set."""

    def __init__(self) -> None:
        self.sock, self.input_buffer, self.incoming_message_len = SimpleNamespace(), [], 0
        self.commands = ['{"type": "resume", "job": "j"}']
        self.reads_on = threading.Event()
        self.closed = threading.Event()
        self.close_code: int | None = None
        self.frames: list[str] = []

    def receive(self, timeout: float) -> str | None:
        if self.commands:
            return self.commands.pop()
        self.closed.wait(timeout)
        return None

    def send(self, frame: str) -> None:
        self.frames.append(frame)
        self.reads_on.wait()

    def close(self, code: int, reason: str) -> None:
        self.close_code = code
        self.closed.set()


class Relay:
    """A job that talks as fast as it is listened to."""

    def __init__(self) -> None:
        self.asked = 0

    def follow(self, job: str, after: int, idle_s: float) -> Iterator[list[Event]]:
        for seq in range(after + 1, after + EVENTS + 1):
            self.asked = seq
            yield [token_event(job, seq, 0, "x", [7])]


def test_a_reader_that_stops_reading_is_dropped_to_resume_and_holds_little_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("api.session.STALL_S", 0.05)
    monkeypatch.setattr("api.streams.TICK_S", 0.01)
    ws, relay = SlowSocket(), Relay()
    known: Callable[..., object] = lambda job, caller: None  # noqa: E731
    services: Any = SimpleNamespace(
        settings=SimpleNamespace(api=ApiSettings(stream_buffer=16)),
        relay=relay,
        record=known,
        keys=SimpleNamespace(is_live=lambda caller: True),
        arriving=Budget(2**20),
    )
    session = Session(ws, services, lambda: False, "request", Caller(""))
    served = threading.Thread(target=session.run)
    served.start()
    assert session._closed.wait(10), "nobody gave the reader up"
    assert relay.asked <= 16 + 3
    ws.reads_on.set()  # its kernel takes the frame in the end, or gives up
    served.join(10)
    assert not served.is_alive()
    assert ws.close_code == TRY_AGAIN_LATER
