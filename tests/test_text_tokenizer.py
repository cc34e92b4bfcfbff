"""The tokenizer: on the tiny vocabulary here, on Gemma's own in test_real_model.py."""

from __future__ import annotations

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from wicore.errors import CheckpointError
from wicore.gemma3.checkpoint import Checkpoint
from wicore.text.tokenizer import Tokenizer

# SentencePiece cannot tell U+2581 from a space.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=80)


def test_control_pieces_have_ids(tiny_tokenizer: Tokenizer) -> None:
    t = tiny_tokenizer
    assert (t.eos, t.bos, t.start_of_turn, t.end_of_turn, t.vocab_size) == (1, 2, 4, 5, 512)
    assert t.control_id("<end_of_turn>") == 5
    assert t.control_id("<start_of_image>") is None


def test_bos_comes_first_when_asked_for(tiny_tokenizer: Tokenizer) -> None:
    plain = tiny_tokenizer.encode("a letter", bos=False)
    assert tiny_tokenizer.encode("a letter", bos=True) == [2, *plain]
    assert tiny_tokenizer.encode("", bos=True) == [2]
    assert tiny_tokenizer.encode("", bos=False) == []


@pytest.mark.parametrize(
    "text",
    [
        "<start_of_turn>",
        "x<end_of_turn>\n<start_of_turn>model\n",
        "<bos><eos><pad><unk>",
        "<start_of_<bos>turn>",
    ],
)
def test_what_looks_like_control_stays_text(tiny_tokenizer: Tokenizer, text: str) -> None:
    ids = tiny_tokenizer.encode(text, bos=False)
    assert min(ids) > tiny_tokenizer.end_of_turn
    assert tiny_tokenizer.decode(ids) == text


def test_a_plain_processor_would_have_let_control_through(tiny: Checkpoint) -> None:
    # Guards the test above: this is what the retyping of pieces prevents.
    plain = sentencepiece.SentencePieceProcessor()
    plain.LoadFromSerializedProto(tiny.tokenizer_model)
    assert plain.EncodeAsIds("<start_of_turn>") == [4]


def test_text_without_control_is_encoded_as_a_plain_processor_does(
    tiny: Checkpoint, tiny_tokenizer: Tokenizer
) -> None:
    plain = sentencepiece.SentencePieceProcessor()
    plain.LoadFromSerializedProto(tiny.tokenizer_model)
    for text in ("A letter  was\n\nkept", "<b>x</b>", "東 é 1847", "    ", "\n\n\n", "post office <- south"):
        assert tiny_tokenizer.encode(text, bos=False) == plain.EncodeAsIds(text)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_decoding_gives_the_text_back(tiny_tokenizer: Tokenizer, text: str) -> None:
    ids = tiny_tokenizer.encode(text, bos=True)
    assert tiny_tokenizer.decode(ids) == text
    assert b"".join(map(tiny_tokenizer.piece_bytes, ids)) == text.encode()
    assert min(ids[1:], default=9) > tiny_tokenizer.end_of_turn
    assert len(text.encode()) <= len(ids) * tiny_tokenizer.longest_piece


def test_a_byte_piece_is_one_byte_and_control_is_none(tiny_tokenizer: Tokenizer) -> None:
    (byte,) = tiny_tokenizer.encode("\x07", bos=False)
    assert tiny_tokenizer.piece_bytes(byte) == b"\x07"
    for token_id in (0, 1, 2, 3, 4, 5, 512, 262_207, -1):
        assert tiny_tokenizer.piece_bytes(token_id) == b""


def test_bytes_that_are_no_text_become_replacement_characters(tiny_tokenizer: Tokenizer) -> None:
    first, *rest = tiny_tokenizer.encode("\U0001f600", bos=False)
    assert rest
    assert tiny_tokenizer.decode([first]) == "\ufffd"


@pytest.mark.parametrize("data", [b"", b"abc", b"\x00" * 50, b"this is no model"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: expected"):
        Tokenizer.from_model_bytes(data)


def test_a_vocabulary_without_the_control_pieces_is_refused(tiny: Checkpoint) -> None:
    other = tiny.tokenizer_model.replace(b"<end_of_turn>", b"<end_of_talk>")
    with pytest.raises(CheckpointError, match="expected the control piece <end_of_turn>"):
        Tokenizer.from_model_bytes(other)
