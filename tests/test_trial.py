"""When a worker that tries a suspect may take the next one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from workers.trial import ACQUITTED_AFTER, Trial


def suspect(attempt: int = 2) -> Any:
    return SimpleNamespace(attempt=attempt)


def begun(delivery: Any) -> tuple[Trial, list[int]]:
    calls: list[int] = []
    trial = Trial(3, lambda: calls.append(1))
    trial.begin(delivery)
    return trial, calls


def test_a_suspect_is_acquitted_after_enough_tokens_of_its_own() -> None:
    delivery = suspect()
    trial, calls = begun(delivery)
    for _ in range(ACQUITTED_AFTER - 1):
        trial.observe(delivery)
        trial.observe(suspect())
    assert not trial.acquitted
    assert not calls
    trial.observe(delivery)
    assert trial.acquitted
    assert calls == [1]
    trial.end(delivery)
    assert trial.suspect is None
    assert not trial.acquitted


def test_the_last_attempt_is_tried_to_its_end() -> None:
    delivery = suspect(attempt=3)
    trial, calls = begun(delivery)
    for _ in range(100):
        trial.observe(delivery)
    assert not trial.acquitted
    trial.end(delivery)
    assert trial.suspect is None
    assert calls == [1]


def test_the_end_of_another_job_ends_no_trial() -> None:
    delivery = suspect()
    trial, _ = begun(delivery)
    trial.end(suspect())
    assert trial.suspect is delivery
