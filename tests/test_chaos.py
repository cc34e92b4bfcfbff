"""A short chaos run, and runs that show that the suite can fail. `make chaos` is the long one."""

from __future__ import annotations

import pytest

from tests.chaos.__main__ import table
from tests.chaos.harness import Plan, run
from tests.chaos.transcript import Transcript
from wicore.request import Event, started_event, terminal_event, token_event

SHORT = Plan(jobs=150, faults=8, seconds=90, seed=4, clients=24)


@pytest.mark.valkey
def test_no_job_or_token_is_lost_whatever_dies() -> None:
    report = run(SHORT)
    assert not report.verdict.violations, table(report)
    assert report.sections["faults"].total() >= SHORT.faults
    assert report.verdict.counts["jobs resumed"] > 0


@pytest.mark.valkey
@pytest.mark.parametrize(
    ("broken", "fault", "faults", "workers", "told"),
    [
        ("fence", "SIGSTOP of a worker past its lease", 2, 2, "undisturbed"),
        ("resume", "kill -9 of a worker", 2, 2, "undisturbed"),
        # One worker, and no more clients than it has slots: who runs beside poison does so each time.
        ("suspects", "poison job", 1, 1, "dead without cause"),
    ],
)
def test_a_product_without_a_guarantee_is_found_out(
    broken: str, fault: str, faults: int, workers: int, told: str
) -> None:
    """In one run or another: when a stalled worker writes again, say, is up to the machine."""
    size = {"jobs": 40, "faults": faults, "clients": 8 * workers, "workers": workers}
    for seed in range(1, 4):
        report = run(Plan(**size, seconds=60, seed=seed, only=(fault,), broken=broken))
        if any(told in violation for violation in report.verdict.violations):
            return
    pytest.fail(table(report))


EVENTS: list[Event] = [
    started_event("j", 1, 1),
    token_event("j", 2, 0, "a", [5]),
    token_event("j", 3, 0, "b", [6], finish_reason="stop"),
    terminal_event("j", 4, "done", finish_reason="stop"),
]


def test_a_transcript_adds_up_the_text() -> None:
    heard = Transcript().take_all(EVENTS)
    assert (heard.faults, heard.last, heard.ended) == ([], 4, "done")
    assert (heard.choices[0].text, heard.choices[0].ids) == ("ab", [5, 6])


@pytest.mark.parametrize(
    "events",
    [
        EVENTS[1:],
        [EVENTS[0], *EVENTS[2:]],
        [*EVENTS[:2], EVENTS[1], *EVENTS[2:]],
        [*EVENTS, terminal_event("j", 5, "failed")],
        [*EVENTS[:3], token_event("j", 4, 0, "c", [7]), terminal_event("j", 5, "done")],
    ],
    ids=["no beginning", "a gap", "a repeat", "two ends", "text after a choice's end"],
)
def test_a_transcript_notes_what_is_out_of_order(events: list[Event]) -> None:
    assert Transcript().take_all(events).faults


def test_transcripts_of_different_events_differ() -> None:
    other = [*EVENTS[:1], token_event("j", 2, 0, "x", [5]), *EVENTS[2:]]
    assert Transcript().take_all(EVENTS).digest != Transcript().take_all(other).digest
