"""The tokenizer: exact on every case of an independent one, and safe for text from strangers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto

from tests.fixtures.gguf_files import write_gguf
from wicore.errors import CheckpointError
from wicore.gemma3.checkpoint import Checkpoint, open_checkpoint
from wicore.text.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
TINY = Tokenizer.from_model_bytes((FIXTURES / "tiny" / "tokenizer.model").read_bytes())
CONTROL_TEXTS = ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<unk>")
# U+2581 is how SentencePiece writes a space.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@pytest.fixture(scope="module")
def real(gemma_270m: Path) -> Tokenizer:
    return Tokenizer.from_model_bytes(open_checkpoint(gemma_270m).tokenizer_model)


# --- the real tokenizer -------------------------------------------------------------------------


@pytest.mark.model
def test_every_reference_text_has_the_reference_ids(real: Tokenizer, token_cases: dict[str, Any]) -> None:
    wrong = [text for text, ids in token_cases["texts"] if real.encode(text, bos=False) != ids]
    assert len(token_cases["texts"]) > 400
    assert wrong == []


@pytest.mark.model
def test_every_reference_text_comes_back_from_its_ids(real: Tokenizer, token_cases: dict[str, Any]) -> None:
    for text, ids in token_cases["texts"]:
        assert real.decode(ids) == text.replace("\u2581", " ")


@pytest.mark.model
def test_the_real_control_pieces_have_the_published_ids(real: Tokenizer) -> None:
    assert (real.bos, real.eos, real.start_of_turn, real.end_of_turn) == (2, 1, 105, 106)
    assert real.control_id("<start_of_image>") == 255_999
    assert real.vocab_size == 262_144


@pytest.mark.model
def test_long_runs_are_tokenised_in_time_that_grows_with_their_length(real: Tokenizer) -> None:
    for text in ("a" * 200_000, " " * 200_000, "\n" * 200_000, "<" * 200_000):
        ids = real.encode(text, bos=False)
        assert len(ids) >= len(text) // real.longest_piece
        assert real.decode(ids) == text


# --- behaviour, on the tiny one -----------------------------------------------------------------


@given(texts)
def test_a_text_comes_back_from_its_ids(text: str) -> None:
    assert TINY.decode(TINY.encode(text, bos=False)) == text


@given(st.lists(st.one_of(texts, st.sampled_from(CONTROL_TEXTS))).map("".join))
def test_no_text_becomes_a_control_piece(text: str) -> None:
    controls = {TINY.bos, TINY.eos, TINY.start_of_turn, TINY.end_of_turn, 0, 3}
    ids = TINY.encode(text, bos=False)
    assert not controls & set(ids)
    assert TINY.decode(ids) == text


@given(texts)
def test_the_longest_piece_bounds_the_number_of_tokens_from_below(text: str) -> None:
    assert len(TINY.encode(text, bos=False)) >= len(text) // TINY.longest_piece


@given(st.lists(st.integers(-5, 600)))
def test_any_ids_have_a_text(ids: list[int]) -> None:
    joined = b"".join(TINY.piece_bytes(i) for i in ids)
    assert TINY.decode(ids) == joined.decode("utf-8", "replace")


def test_bos_comes_first_when_asked_for_and_has_no_text() -> None:
    ids = TINY.encode("the oak table", bos=True)
    assert ids == [TINY.bos, *TINY.encode("the oak table", bos=False)]
    assert TINY.decode(ids) == "the oak table"


def test_an_empty_text_has_no_ids() -> None:
    assert TINY.encode("", bos=False) == []
    assert TINY.decode([]) == ""


def test_a_character_that_no_piece_has_is_spelt_in_bytes() -> None:
    ids = TINY.encode("🦉", bos=False)
    assert [TINY.piece_bytes(i) for i in ids] == [bytes([byte]) for byte in "🦉".encode()]


def test_runs_of_white_space_use_the_pieces_trained_for_them_and_tags_stay_pieces() -> None:
    assert [TINY.piece_bytes(i) for i in TINY.encode("\n\n\n", bos=False)] == [b"\n\n", b"\n"]
    assert TINY.piece_bytes(TINY.encode("    x", bos=False)[0]) == b"  "
    assert [TINY.piece_bytes(i) for i in TINY.encode("<b></b>", bos=False)] == [b"<b>", b"</b>"]


@pytest.mark.parametrize("text", ["a\0b", "\ufeffmark", "\r\n", "e\u0301 is not \u00e9", "\u200b\u2028"])
def test_no_character_is_normalised_or_lost(text: str) -> None:
    assert TINY.decode(TINY.encode(text, bos=False)) == text


@pytest.mark.parametrize("token_id", [-1, 512, 10**9])
def test_an_id_outside_of_the_vocabulary_has_no_text(token_id: int) -> None:
    assert TINY.piece_bytes(token_id) == b""


def test_control_ids_are_found_by_name() -> None:
    assert TINY.control_id("<end_of_turn>") == TINY.end_of_turn
    assert TINY.control_id("<b>") is None
    assert TINY.control_id("<start_of_image>") is None


def test_the_tokenizer_of_a_gguf_file_is_that_of_the_folder(tiny: Checkpoint, tmp_path: Path) -> None:
    data = open_checkpoint(write_gguf(tiny, tmp_path / "tiny.gguf")).tokenizer_model
    again = Tokenizer.from_model_bytes(data)
    for text in ("The clerks had  three rules.\n\n", "<b>bold</b>", "été 東 🦉", "<start_of_turn>user"):
        assert again.encode(text, bos=True) == TINY.encode(text, bos=True)
    assert (again.start_of_turn, again.end_of_turn) == (TINY.start_of_turn, TINY.end_of_turn)


# --- what is refused ----------------------------------------------------------------------------


def model_with(**changes: Any) -> bytes:
    """The tiny model with other texts for some pieces; "p7" is the piece of id 7."""
    model = proto.ModelProto()
    model.ParseFromString((FIXTURES / "tiny" / "tokenizer.model").read_bytes())
    for key, text in changes.items():
        model.pieces[int(key[1:])].piece = text
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "found no pieces"),
        (b"{}", "expected a SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1", "expected a SentencePiece model"),
        (model_with(p4="<something>"), "expected the control piece <start_of_turn>, found none"),
        (model_with(p20="twice", p21="twice"), "expected a SentencePiece model, found:"),
        (model_with(p30="<0xZZ>"), "expected a SentencePiece model, found:"),
    ],
)
def test_what_is_no_gemma_tokenizer_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: ") as caught:
        Tokenizer.from_model_bytes(data)
    assert says in caught.value.message
