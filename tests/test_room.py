"""A worker's slots, and whom a more urgent job may displace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wicore.errors import EngineError
from wicore.request import Priority
from workers.room import Offer, Room


def room(slots: int, *levels: Priority) -> Room:
    made = Room(slots, lambda: None)
    for level in levels:
        made.claim(1, level)
    return made


def test_free_slots_are_for_any_job() -> None:
    assert room(4, Priority.BATCH).wait() == Offer(3, None)


def test_a_full_room_is_open_to_what_is_more_urgent_than_its_least_urgent() -> None:
    full = room(2, Priority.INTERACTIVE, Priority.BATCH)
    assert full.wait() == Offer(1, Priority.BATCH)


def test_who_gave_way_does_not_give_way_again() -> None:
    full = room(2, Priority.NORMAL, Priority.BATCH)
    full.claim(1, Priority.INTERACTIVE)
    assert full.wait() == Offer(1, Priority.NORMAL)


def test_nobody_displaces_an_interactive_job() -> None:
    full = room(1, Priority.INTERACTIVE)
    full.close()
    assert full.wait() is None
    assert full._offer() is None


def test_a_slot_about_to_free_counts() -> None:
    full = room(1, Priority.INTERACTIVE)
    full.release(ending=1)
    assert full.wait() == Offer(1, None)


def test_a_room_is_full_until_a_slot_frees_or_is_about_to() -> None:
    shared = room(1)
    assert not shared.full
    shared.claim(2, Priority.BATCH)
    assert shared.full
    shared.release([(1, Priority.BATCH)], ending=0)
    assert shared.full
    shared.release(ending=1)
    assert not shared.full
    shared.release([(1, Priority.BATCH)], ending=0)
    assert not shared.full, "it has ended"


def test_who_looks_for_urgent_jobs_alone_hears_of_a_free_slot_once() -> None:
    calls = []
    full = Room(1, lambda: calls.append(1))
    full.claim(1, Priority.BATCH)
    assert full.wait() == Offer(1, Priority.BATCH)
    full.release(ending=1)
    full.release([(1, Priority.BATCH)], ending=0)
    assert calls == [1]


def test_slots_that_do_not_add_up_are_found() -> None:
    with pytest.raises(EngineError, match="1 of 2 slots"):
        room(2, Priority.BATCH).check(0)


@given(st.integers(1, 4), st.lists(st.sampled_from(Priority), max_size=8))
def test_an_offer_displaces_only_the_less_urgent_and_each_once(slots: int, levels: list[Priority]) -> None:
    offer = room(slots, *levels)._offer()
    over = len(levels) - slots
    if over < 0:
        assert offer == Offer(-over, None)
        return
    staying = sorted(levels)[: len(levels) - over]
    expected = Offer(1, staying[-1]) if staying and staying[-1] != Priority.INTERACTIVE else None
    assert offer == expected
