"""Incremental detokenisation: the pieces make the whole, and what is emitted is never taken back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wicore.text.detokenizer import Detokenizer
from wicore.text.tokenizer import Tokenizer

TINY = Tokenizer.from_model_bytes(
    (Path(__file__).parent / "fixtures" / "tiny" / "tokenizer.model").read_bytes()
)
BYTE_IDS = {TINY.piece_bytes(i)[0]: i for i in range(TINY.vocab_size) if len(TINY.piece_bytes(i)) == 1}
OWL = "🦉".encode()

any_ids = st.lists(st.integers(-1, TINY.vocab_size + 2), max_size=60)
# Few characters, so that stop strings occur, overlap and almost occur; each id is one byte of them.
letters = st.text("abé", max_size=40)
stops = st.lists(st.text("abé", min_size=1, max_size=5), max_size=4)


def in_bytes(text: str) -> list[int]:
    """The ids that spell a text byte by byte: every cut inside a character happens."""
    return [BYTE_IDS[byte] for byte in text.encode()]


def run(ids: list[int], stop: list[str] | tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """What each push, and then flush, returned; and whether a stop string was found."""
    detokenizer = Detokenizer(TINY, stop)
    pushed = [detokenizer.push(i) for i in ids]
    return [*pushed, detokenizer.flush()], detokenizer.stopped


def cut_at_first_stop(text: str, stop: list[str]) -> str | None:
    """The text before the stop string that ends first, the longest of those; None without one."""
    for end in range(len(text) + 1):
        ending = [pattern for pattern in stop if text[:end].endswith(pattern)]
        if ending:
            return text[: end - max(map(len, ending))]
    return None


@given(any_ids)
def test_what_is_pushed_and_flushed_is_the_text_of_all_ids(ids: list[int]) -> None:
    pieces, stopped = run(ids)
    assert "".join(pieces) == TINY.decode(ids)
    assert not stopped


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_a_character_comes_out_whole_at_its_last_byte(text: str) -> None:
    pieces, _ = run(in_bytes(text))
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


@given(any_ids, any_ids)
def test_what_was_emitted_stands_whatever_bytes_come_next(ids: list[int], more: list[int]) -> None:
    detokenizer = Detokenizer(TINY)
    emitted = "".join(detokenizer.push(i) for i in ids)
    assert TINY.decode([*ids, *more]).startswith(emitted)


def test_an_incomplete_character_at_the_end_is_one_replacement_character() -> None:
    pieces, _ = run([*in_bytes("a"), *(BYTE_IDS[byte] for byte in OWL[:3])])
    assert pieces == ["a", "", "", "", "\ufffd"]


def test_a_control_piece_inside_a_character_does_not_break_it() -> None:
    ids = [BYTE_IDS[byte] for byte in OWL]
    pieces, _ = run([*ids[:2], TINY.end_of_turn, *ids[2:]])
    assert "".join(pieces) == "🦉"


@given(letters, stops)
@example("aab", ["ab", "aab"])
@example("aaab", ["aab"])
@example("ababaa", ["abaa", "é"])
@example("aabaaabaaac", ["aabaaac"])
@example("abab", ["bb", "abab", "ba"])
def test_the_stop_string_that_ends_first_cuts_the_text_wherever_tokens_end(
    text: str, stop: list[str]
) -> None:
    expected = cut_at_first_stop(text, stop)
    for ids in (in_bytes(text), TINY.encode(text, bos=False)):
        pieces, stopped = run(ids, stop)
        assert stopped is (expected is not None)
        assert "".join(pieces) == (text if expected is None else expected)


@given(letters, letters, stops)
def test_what_was_emitted_is_never_part_of_a_stop_string(text: str, more: str, stop: list[str]) -> None:
    detokenizer = Detokenizer(TINY, stop)
    emitted = "".join(detokenizer.push(i) for i in in_bytes(text))
    expected = cut_at_first_stop(text + more, stop)
    assert (text + more if expected is None else expected).startswith(emitted)


@given(letters, stops)
def test_no_more_is_held_back_than_may_begin_a_stop_string(text: str, stop: list[str]) -> None:
    detokenizer = Detokenizer(TINY, stop)
    emitted = "".join(detokenizer.push(i) for i in in_bytes(text))
    if not detokenizer.stopped:
        held = text.removeprefix(emitted)
        assert emitted + held == text
        assert held == "" or any(pattern.startswith(held) for pattern in stop)


def test_a_stop_string_may_span_many_tokens_and_almost_occur_before() -> None:
    pieces, stopped = run(in_bytes("a\n\nHuman: hi"), ["\n\nHuman:"])
    assert ("".join(pieces), stopped) == ("a", True)
    pieces, stopped = run(in_bytes("a\n\n\nHuman"), ["\n\nHuman:"])
    assert ("".join(pieces), stopped) == ("a\n\n\nHuman", False)


@pytest.mark.parametrize("late", ["b", "ab"])
def test_tokens_after_a_stop_string_add_nothing(late: str) -> None:
    detokenizer = Detokenizer(TINY, ["ab"])
    assert [detokenizer.push(i) for i in in_bytes("xab")] == ["x", "", ""]
    assert detokenizer.stopped
    assert [detokenizer.push(i) for i in in_bytes(late)] == [""] * len(late)
    assert detokenizer.flush() == ""


def test_a_replacement_character_can_end_a_stop_string() -> None:
    pieces, stopped = run([*in_bytes("xa"), BYTE_IDS[OWL[0]]], ["a\ufffd"])
    assert ("".join(pieces), stopped) == ("x", True)
