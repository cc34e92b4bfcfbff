"""GGUF files: the same model as from a folder, and a bad file says what was expected and found."""

from __future__ import annotations

import dataclasses
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.fixtures.gguf_files import write_gguf
from wicore.errors import CheckpointError
from wicore.gemma3 import gguf as module
from wicore.gemma3.checkpoint import Checkpoint, open_checkpoint

EMBEDDING = "model.embed_tokens.weight"


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return caught.value.message


def test_a_gguf_file_gives_the_folders_config_weights_and_tokenizer(tiny: Checkpoint, tmp_path: Path) -> None:
    again = open_checkpoint(write_gguf(tiny, tmp_path / "tiny.gguf"))
    # The format does not hold the query scale, which in published models is that of head_dim.
    assert again.config == dataclasses.replace(tiny.config, query_pre_attn_scalar=tiny.config.head_dim)
    assert again.dtype == "F32"
    for name in tiny.config.tensor_shapes():
        # Norm weights went through "+ 1" and back in float32.
        np.testing.assert_allclose(again.read(name), tiny.read(name), atol=1.2e-7 if "norm" in name else 0)
    assert again.tokenizer_model


@pytest.mark.parametrize(
    "kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16]
)
def test_a_quantised_gguf_tensor_is_what_the_reference_package_decodes(
    tiny: Checkpoint, tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    again = open_checkpoint(write_gguf(tiny, tmp_path / "tiny.gguf", kind=kind))
    expected = gguf.dequantize(gguf.quantize(tiny.read(EMBEDDING), kind), kind)
    assert again.dtype == kind.name
    np.testing.assert_array_equal(again.read(EMBEDDING), expected)


@pytest.mark.parametrize("keep", [0, 3, 30, 2000, -1])
def test_a_truncated_gguf_file_is_refused_wherever_it_is_cut(
    tiny: Checkpoint, tmp_path: Path, keep: int
) -> None:
    path = write_gguf(tiny, tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    assert re.search("tiny.gguf: .*expected .*found", refused(path))


def test_a_gguf_file_of_another_model_is_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    path = write_gguf(tiny, tmp_path / "other.gguf", architecture="llama")
    assert refused(path).endswith("expected architecture 'gemma3', found 'llama'")


def test_a_gguf_file_that_lacks_a_tensor_is_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    path = write_gguf(tiny, tmp_path / "part.gguf", leave_out="layers.5.mlp.up_proj.weight")
    assert "expected tensor model.layers.5.mlp.up_proj.weight, not found" in refused(path)


@pytest.mark.parametrize(
    "data",
    [
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGML" + struct.pack("<IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**62),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 99),
        b"GGUF"
        + struct.pack("<IQQQ", 3, 0, 1, 1)
        + b"k"
        + struct.pack("<I", 9)
        + struct.pack("<IQ", 9, 1) * 9999,
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2) + b"\xff\xfe" + struct.pack("<II", 4, 0),
    ],
    ids=["version 1", "magic", "counts", "array length", "value type", "nesting", "bad UTF-8"],
)
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert re.search(r"model\.gguf: expected .*found", refused(path))


def spoil_fields(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    """Let the next GGUF header have these fields too; None takes one out."""
    read = module._read_header

    def changed(path: Path) -> Any:
        fields, infos = read(path)
        fields |= change
        return {key: value for key, value in fields.items() if value is not None}, infos

    monkeypatch.setattr(module, "_read_header", changed)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gemma3.block_count": None}, "expected metadata gemma3.block_count, found none"),
        ({"gemma3.block_count": 0}, "num_hidden_layers"),
        ({"gemma3.attention.head_count_kv": 3}, "expected a multiple of num_key_value_heads (3), found 4"),
        ({"gemma3.attention.key_length": "wide"}, "head_dim"),
        ({"gemma3.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps"),
        ({"gemma3.rope.scaling.type": "yarn"}, "yarn"),
        ({"split.count": 3}, "expected a whole model, found one of 3 parts"),
    ],
)
def test_bad_gguf_metadata_is_refused(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], says: str
) -> None:
    path = write_gguf(tiny, tmp_path / "tiny.gguf")
    spoil_fields(monkeypatch, change)
    assert says in refused(path)


def test_gguf_metadata_may_say_what_older_files_leave_out(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tiny, tmp_path / "tiny.gguf")
    change = {"gemma3.attention.sliding_window_pattern": 4, "gemma3.rope.freq_base_swa": 5000.0}
    spoil_fields(monkeypatch, change)
    config = open_checkpoint(path).config
    assert [i for i, kind in enumerate(config.layer_kinds) if kind == "global"] == [3, 7]
    assert config.rope_local_theta == 5000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer.ggml.model": "gpt2"}, "found 'gpt2'"),
        ({"tokenizer.ggml.scores": None}, "expected as many scores and types as tokens"),
        ({"tokenizer.ggml.unknown_token_id": 512}, "special ids among them"),
    ],
)
def test_a_bad_gguf_vocabulary_is_refused_when_it_is_asked_for(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], says: str
) -> None:
    path = write_gguf(tiny, tmp_path / "tiny.gguf")
    spoil_fields(monkeypatch, change)
    with pytest.raises(CheckpointError) as caught:
        _ = open_checkpoint(path).tokenizer_model
    assert says in caught.value.message
