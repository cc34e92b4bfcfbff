"""GGUF files, written here by the reference package and read by WiCore's own parser."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from tests.fixtures.gguf_files import write_gguf
from wicore.errors import CheckpointError
from wicore.gemma3.checkpoint import Checkpoint, open_checkpoint
from wicore.text.tokenizer import Tokenizer

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def plain(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_float32_file_gives_the_very_weights(plain: Path, tiny: Checkpoint) -> None:
    checkpoint = open_checkpoint(plain)
    for name in tiny.config.tensor_shapes():
        values = checkpoint.read(name)
        # Adding and taking off the 1 of a norm rounds.
        np.testing.assert_allclose(values, tiny.read(name), atol=1.2e-7 if "norm" in name else 0, rtol=0)
    assert checkpoint.dtype == "F32"


def test_the_configuration_is_complete(plain: Path, tiny: Checkpoint) -> None:
    # The query scale is not in the format: Gemma 3's own is its head_dim.
    expected = dataclasses.replace(tiny.config, query_pre_attn_scalar=tiny.config.head_dim)
    assert open_checkpoint(plain).config == expected


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.BF16, Kind.F16])
def test_quantised_rows_are_rows_of_the_dequantised_matrix(
    tiny: Checkpoint, tmp_path: Path, kind: Kind
) -> None:
    checkpoint = open_checkpoint(write_gguf(tiny, tmp_path / "model.gguf", kind=kind))
    whole = checkpoint.read(EMBEDDING)
    assert (checkpoint.rows(EMBEDDING, [3, 500, 3]) == whole[[3, 500, 3]]).all()
    assert np.abs(whole - tiny.read(EMBEDDING)).max() < 0.01 * np.abs(whole).max()
    assert checkpoint.dtype == kind.name


def test_the_rebuilt_tokenizer_encodes_like_the_original(plain: Path, tiny: Checkpoint) -> None:
    original = Tokenizer.from_model_bytes(tiny.tokenizer_model)
    rebuilt = Tokenizer.from_model_bytes(open_checkpoint(plain).tokenizer_model)
    texts = ["A letter  was\n\n kept.", "<b>x</b> <start_of_turn>", "東 é 1847", "   ", ""]
    for text in texts:
        assert rebuilt.encode(text, bos=True) == original.encode(text, bos=True)
    assert rebuilt.end_of_turn == original.end_of_turn


def test_another_architecture_is_named(tiny: Checkpoint, tmp_path: Path) -> None:
    path = write_gguf(tiny, tmp_path / "model.gguf", architecture="llama")
    with pytest.raises(CheckpointError, match="expected architecture 'gemma3', found 'llama'"):
        open_checkpoint(path)


def test_a_missing_tensor_is_named(tiny: Checkpoint, tmp_path: Path) -> None:
    path = write_gguf(tiny, tmp_path / "model.gguf", leave_out="layers.5.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"expected tensor model\.layers\.5\.mlp\.up_proj\.weight"):
        open_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 10, 24, 100, 3000, 20_000, 900_000])
def test_a_truncated_file_is_refused(plain: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(plain.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut\.gguf: .*expected"):
        open_checkpoint(path)


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="expected GGUF version 2 or 3, found b'PK"):
        open_checkpoint(path)


def test_a_corrupt_header_is_refused_not_followed(plain: Path, tmp_path: Path) -> None:
    data = bytearray(plain.read_bytes())
    for at in range(24, 3000, 7):  # lengths, types and counts among them
        broken = data.copy()
        broken[at : at + 8] = b"\xff" * 8
        path = tmp_path / "broken.gguf"
        path.write_bytes(broken)
        try:
            open_checkpoint(path)
        except CheckpointError:
            continue
