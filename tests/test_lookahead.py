"""When a full worker looks at the jobs next in line, and what it makes of them."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from wicore.errors import TooLarge, Unavailable
from wicore.queue.consumer import Peeked
from wicore.request import JobBody, Priority
from workers import lookahead
from workers.lookahead import LookAhead

PATIENCE_S = 10.0
NEVER_S = 3600.0


@pytest.fixture(autouse=True)
def _without_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead, "_PAUSE_S", 0.0)


class Line:
    """A line of jobs whose prompts are their ids, and a record of what was done with it."""

    def __init__(self, *waiting: str) -> None:
        self.waiting = list(waiting)
        self.busy = True
        self.fault: Exception | None = None
        self.tokenised: list[str] = []
        self.looks: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.offers: queue.SimpleQueue[Sequence[int]] = queue.SimpleQueue()

    def peek(self, count: int) -> list[Peeked]:
        self.looks.put(count)
        if self.fault is not None:
            raise self.fault
        return [
            Peeked(name, JobBody(kind="completion", prompt=name), Priority.NORMAL)
            for name in self.waiting[:count]
        ]

    def tokens(self, body: JobBody) -> list[int]:
        text = str(body.prompt)
        self.tokenised.append(text)
        if text.startswith("bad"):
            raise TooLarge("prompt: too long")
        if text.startswith("odd"):
            raise ZeroDivisionError
        return list(text.encode())

    def look(self) -> int:
        return self.looks.get(timeout=PATIENCE_S)

    def offered(self) -> str:
        return bytes(self.offers.get(timeout=PATIENCE_S)).decode()


@pytest.fixture
def started() -> Iterator[Callable[..., LookAhead]]:
    """`started(line, ...)` is a running look-ahead; stopped at the end, which must not take long."""
    made: list[LookAhead] = []

    def start(line: Line, count: int = 8, interval_s: float = NEVER_S, **more: Any) -> LookAhead:
        callbacks = {
            "tokens": line.tokens,
            "offer": line.offers.put,
            "busy": lambda: line.busy,
        } | more
        made.append(LookAhead(line.peek, count=count, interval_s=interval_s, **callbacks))
        made[-1].start()
        return made[-1]

    yield start
    for look_ahead in made:
        look_ahead.stop()
        look_ahead._thread.join(PATIENCE_S)
        assert not look_ahead._thread.is_alive()


def test_the_next_jobs_are_offered_in_order(started: Callable[..., LookAhead]) -> None:
    line = Line("a", "b", "c")
    started(line, count=2).wake()
    assert line.look() == 2
    assert [line.offered(), line.offered()] == ["a", "b"]


def test_a_job_is_tokenised_and_offered_once(started: Callable[..., LookAhead]) -> None:
    line = Line("a")
    look_ahead = started(line)
    look_ahead.wake()
    assert line.offered() == "a"
    line.waiting = ["a", "b"]
    look_ahead.wake()
    assert line.offered() == "b"
    assert line.tokenised == ["a", "b"]


def test_a_job_that_cannot_be_tokenised_is_passed_over_once(started: Callable[..., LookAhead]) -> None:
    line = Line("bad", "odd", "good")
    look_ahead = started(line)
    look_ahead.wake()
    assert line.offered() == "good"
    line.waiting.append("better")
    look_ahead.wake()
    assert line.offered() == "better"
    assert line.tokenised == ["bad", "odd", "good", "better"]


def test_it_looks_again_by_itself_while_the_worker_is_busy(started: Callable[..., LookAhead]) -> None:
    line = Line()
    started(line, interval_s=0.001)
    for _ in range(3):
        line.look()
    line.waiting = ["a"]
    assert line.offered() == "a"


def test_it_looks_at_nothing_while_the_worker_has_a_slot(started: Callable[..., LookAhead]) -> None:
    line = Line("a")
    line.busy = False
    asked: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def busy() -> bool:
        now = line.busy
        asked.put(now)
        return now

    look_ahead = started(line, busy=busy)
    look_ahead.wake()
    assert asked.get(timeout=PATIENCE_S) is False
    line.busy = True
    look_ahead.wake()
    assert line.offered() == "a"
    assert line.looks.qsize() == 1


def test_an_outage_is_logged_once_and_outlasted(
    started: Callable[..., LookAhead], caplog: pytest.LogCaptureFixture
) -> None:
    line = Line("a")
    line.fault = Unavailable("Redis cannot be reached")
    with caplog.at_level(logging.DEBUG):
        started(line, interval_s=0.001)
        for _ in range(3):
            line.look()
        line.fault = None
        assert line.offered() == "a"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_it_stops_between_two_prompts(started: Callable[..., LookAhead]) -> None:
    line = Line("a", "b")
    look_ahead = started(line, offer=lambda tokens: (line.offers.put(tokens), look_ahead.stop()))
    look_ahead.wake()
    look_ahead.join()
    assert line.offered() == "a"
    assert line.tokenised == ["a"]


def test_without_a_count_nothing_is_done() -> None:
    line = Line("a")
    look_ahead = LookAhead(
        line.peek, tokens=line.tokens, offer=line.offers.put, count=0, busy=lambda: line.busy
    )
    look_ahead.start()
    look_ahead.wake()
    look_ahead.stop()
    look_ahead.join()
    assert look_ahead._thread.ident is None
    assert line.looks.empty()


def test_what_it_remembers_is_bounded(
    started: Callable[..., LookAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookahead, "_REMEMBERED", 2)
    line = Line("a", "b", "c")
    look_ahead = started(line, count=2)
    for first in ("a", "c", "e"):
        line.waiting = [first, chr(ord(first) + 1)]
        look_ahead.wake()
        assert [line.offered(), line.offered()] == line.waiting
    look_ahead.stop()
    look_ahead.join()
    assert list(look_ahead._offered) == ["e", "f"]
