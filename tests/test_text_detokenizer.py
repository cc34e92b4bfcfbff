"""The detokeniser: joined, its pieces are the text; apart, none is ever taken back."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wicore.text.detokenizer import Detokenizer
from wicore.text.tokenizer import Tokenizer

IDS = st.lists(st.integers(0, 520), max_size=60)
TEXTS = st.text(st.sampled_from("ab\n é東😀"), max_size=40)
STOPS = st.lists(st.text(st.sampled_from("ab\né😀"), min_size=1, max_size=5), max_size=4)


class Letters:
    """A vocabulary in which token i is byte i, so that every way to cut a text can be tried."""

    def piece_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def run(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    return [*pieces, detokenizer.flush()], detokenizer.stopped


def first_stop(text: str, stop: list[str]) -> str | None:
    """The text before the stop string that ends first, the longest of those; None without one."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return None


@settings(max_examples=300, deadline=None)
@given(IDS)
def test_pieces_of_any_tokens_join_to_their_text(tiny_tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces, stopped = run(tiny_tokenizer, ids, [])
    assert "".join(pieces) == tiny_tokenizer.decode(ids)
    assert not stopped


@settings(max_examples=500, deadline=None)
@given(TEXTS, STOPS)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(
    tiny_tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    expected = first_stop(text, stop)
    whole = tiny_tokenizer.encode(text, bos=False)
    for tokenizer, ids in ((tiny_tokenizer, whole), (Letters(), list(text.encode()))):
        pieces, stopped = run(tokenizer, ids, stop)
        assert "".join(pieces) == (text if expected is None else expected)
        assert stopped == (expected is not None)


@settings(max_examples=300, deadline=None)
@given(TEXTS, STOPS)
def test_no_piece_holds_what_later_text_may_take_back(text: str, stop: list[str]) -> None:
    # At every cut: what was emitted is also emitted when any stop string follows at once.
    data = list(text.encode())
    detokenizer = Detokenizer(Letters(), stop)
    emitted = ""
    for i, byte in enumerate(data):
        emitted += detokenizer.push(byte)
        for continuation in stop:
            for skip in range(len(continuation)):
                try:
                    known = bytes(data[: i + 1]).decode()
                except UnicodeDecodeError:
                    continue
                final = first_stop(known + continuation[skip:], stop)
                assert final is None or final.startswith(emitted)


def test_text_is_emitted_as_soon_as_it_is_certain() -> None:
    detokenizer = Detokenizer(Letters(), ["stop"])
    assert [detokenizer.push(byte) for byte in b"no st"] == ["n", "o", " ", "", ""]
    assert detokenizer.push(ord("e")) == "ste"
    assert detokenizer.flush() == ""


def test_half_a_character_waits_for_the_other_half() -> None:
    detokenizer = Detokenizer(Letters())
    assert [detokenizer.push(byte) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]


def test_bytes_that_can_no_longer_be_a_character_are_replaced_at_once() -> None:
    detokenizer = Detokenizer(Letters())
    assert detokenizer.push(0xE6) == ""
    assert detokenizer.push(ord("a")) == "\ufffda"
    assert detokenizer.push(0xFF) == "\ufffd"


def test_half_a_character_at_the_end_is_replaced() -> None:
    detokenizer = Detokenizer(Letters())
    assert detokenizer.push(0xE6) == ""
    assert detokenizer.flush() == "\ufffd"


def test_a_stop_string_across_tokens_is_found_and_nothing_follows_it() -> None:
    detokenizer = Detokenizer(Letters(), ["\n\n"])
    assert "".join(detokenizer.push(byte) for byte in b"a\nb\n\nc") == "a\nb"
    assert detokenizer.stopped
    assert (detokenizer.push(ord("d")), detokenizer.flush()) == ("", "")


def test_the_beginning_of_a_stop_string_is_given_out_at_the_end() -> None:
    detokenizer = Detokenizer(Letters(), ["END"])
    assert "".join(detokenizer.push(byte) for byte in b"xEN") == "x"
    assert detokenizer.flush() == "EN"
    assert not detokenizer.stopped


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("aabaabaaab", ["aabaaab"], "aab"),  # a failed match holds the start of the next
        ("abcd", ["abcd", "bc"], "a"),  # the one that ends first
        ("xabc", ["bc", "abc"], "x"),  # both end here: the longer
        ("<end_of_turn>", ["<end_of_turn>"], ""),
    ],
)
def test_overlapping_stop_strings(text: str, stop: list[str], expected: str) -> None:
    pieces, stopped = run(Letters(), list(text.encode()), stop)
    assert ("".join(pieces), stopped) == (expected, True)


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    def seconds(tokens: int) -> float:
        detokenizer = Detokenizer(Letters(), ["a" * 200 + "b"])
        start = time.perf_counter()
        for _ in range(tokens):
            detokenizer.push(97)
        return time.perf_counter() - start

    # A quadratic one would take 64 times as long; the best of three keeps out the machine's noise.
    assert min(seconds(16_000) for _ in range(3)) < 24 * min(seconds(2000) for _ in range(3))
