"""Hugging Face folders: every layout and dtype reads alike; what is broken is refused with reasons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes  # also teaches numpy, and so safetensors, bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.fixtures.plugin import FIXTURES, TINY_NAMES
from wicore.errors import CheckpointError
from wicore.gemma3.checkpoint import models_folder, open_checkpoint, resolve_model
from wicore.gemma3.convert import save_bfloat16, to_bfloat16

EMBEDDING = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def copy(tmp_path: Path, tiny_path: Path) -> Path:
    """A tiny checkpoint to break."""
    return Path(shutil.copytree(tiny_path, tmp_path / "copy"))


@pytest.mark.parametrize("name", TINY_NAMES)
def test_every_tensor_of_every_layout_has_the_canonical_name_and_shape(name: str) -> None:
    checkpoint = open_checkpoint(FIXTURES / name)
    shapes = checkpoint.config.tensor_shapes()
    assert set(shapes) <= set(checkpoint.names())
    for tensor, shape in shapes.items():
        values = checkpoint.read(tensor)
        assert (values.dtype, values.shape) == (np.float32, shape)
        assert np.isfinite(values).all()
        assert values.std() > 0.02


def test_values_are_those_the_safetensors_library_reads() -> None:
    checkpoint = open_checkpoint(FIXTURES / "tiny-image")
    stored = load_file(FIXTURES / "tiny-image" / "model.safetensors")
    expected = stored["language_model.model.layers.0.self_attn.q_proj.weight"]
    assert expected.dtype == np.float16
    assert (checkpoint.read(QUERY) == expected.astype(np.float32)).all()


def test_bfloat16_is_widened_exactly(tiny_path: Path, tiny) -> None:
    stored = load_file(tiny_path / "model.safetensors")[QUERY]
    assert stored.dtype.name == "bfloat16"
    assert (tiny.read(QUERY) == stored.astype(np.float32)).all()


def test_dtype_names_how_the_weights_are_stored() -> None:
    assert [open_checkpoint(FIXTURES / name).dtype for name in TINY_NAMES] == ["BF16", "F32", "F16"]


@pytest.mark.parametrize("name", TINY_NAMES)
def test_rows_are_rows_of_the_whole_matrix(name: str) -> None:
    checkpoint = open_checkpoint(FIXTURES / name)
    ids = [511, 0, 7, 7, 300]
    assert (checkpoint.rows(EMBEDDING, ids) == checkpoint.read(EMBEDDING)[ids]).all()
    assert checkpoint.rows(EMBEDDING, []).shape == (0, checkpoint.config.hidden_size)


def test_a_row_outside_of_the_matrix_is_an_index_error(tiny) -> None:
    with pytest.raises(IndexError):
        tiny.rows(EMBEDDING, [512])


def test_an_array_that_was_read_can_be_written_without_touching_the_file(tiny) -> None:
    values = tiny.read(QUERY)
    values[:] = 0
    assert tiny.read(QUERY).any()


def test_an_unknown_tensor_is_named(tiny) -> None:
    with pytest.raises(CheckpointError, match=r"expected tensor model\.layers\.9\.mlp"):
        tiny.read("model.layers.9.mlp.up_proj.weight")


# --- fingerprints -------------------------------------------------------------------------------


def test_a_copy_has_the_same_fingerprint(copy: Path, tiny) -> None:
    assert open_checkpoint(copy).fingerprint == tiny.fingerprint
    assert len({open_checkpoint(FIXTURES / name).fingerprint for name in TINY_NAMES}) == len(TINY_NAMES)


@pytest.mark.parametrize("name", [EMBEDDING, "model.layers.7.mlp.down_proj.weight", "model.norm.weight"])
def test_other_weights_under_the_same_path_have_another_fingerprint(copy: Path, tiny, name: str) -> None:
    weights = load_file(copy / "model.safetensors")
    weights[name] = (weights[name].astype(np.float32) * 1.01).astype(weights[name].dtype)
    save_file(weights, copy / "model.safetensors")
    assert open_checkpoint(copy).fingerprint != tiny.fingerprint


def test_another_configuration_has_another_fingerprint(copy: Path, tiny) -> None:
    _edit_config(copy, sliding_window=65)
    assert open_checkpoint(copy).fingerprint != tiny.fingerprint


# --- broken checkpoints -------------------------------------------------------------------------


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _refused(path: Path, *says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    for part in says:
        assert part in caught.value.message


def test_nothing_at_the_path_is_refused(tmp_path: Path) -> None:
    _refused(tmp_path / "none", str(tmp_path / "none"), "expected a checkpoint folder", "found nothing")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    _refused(tmp_path / "model.bin", "expected a checkpoint folder or a .gguf file")


def test_a_folder_without_a_config_lists_what_it_has(copy: Path) -> None:
    (copy / "config.json").unlink()
    _refused(copy, "expected config.json", "found generation_config.json, model.safetensors")


def test_a_folder_without_weights_lists_what_it_has(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    _refused(copy, "expected *.safetensors", "found config.json")


@pytest.mark.parametrize("keep", [0, 5, 1000, 600_000])
def test_a_truncated_file_is_refused(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    _refused(copy, "model.safetensors", "expected", "found")


def test_bytes_that_are_no_safetensors_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"\x20" + bytes(7) + b"this is not a JSON header at all")
    _refused(copy, "expected a JSON header")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "tiny-mqa", tmp_path / "copy"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    _refused(folder, "model-00002-of-00003.safetensors", "the index names it")


def test_a_missing_tensor_is_named(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.3.self_attn.k_norm.weight"]
    save_file(weights, copy / "model.safetensors")
    _refused(copy, "expected tensor model.layers.3.self_attn.k_norm.weight")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(copy: Path) -> None:
    _edit_config(copy, intermediate_size=128)
    _refused(copy, "model.layers.0.mlp.gate_proj.weight", "expected shape [128, 64]", "found [64, 64]")


def test_an_unsupported_dtype_is_named(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights[QUERY] = weights[QUERY].astype(np.int8)
    save_file(weights, copy / "model.safetensors")
    _refused(copy, QUERY, "expected one of F32, F16, BF16", "found I8")


def test_a_missing_tokenizer_is_refused_only_when_asked_for() -> None:
    checkpoint = open_checkpoint(FIXTURES / "tiny-mqa")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: expected the SentencePiece model"):
        _ = checkpoint.tokenizer_model


# --- names and conversion -----------------------------------------------------------------------


def test_a_path_resolves_to_itself_and_a_name_to_its_cache_folder(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WICORE_CACHE", str(tmp_path))
    assert resolve_model(str(tiny_path)) == tiny_path
    (models_folder() / "gemma-3-270m").mkdir(parents=True)
    assert resolve_model("gemma-3-270m") == tmp_path / "models" / "gemma-3-270m"


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WICORE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert models_folder() == Path("/caches/wicore/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models_folder() == Path.home() / ".cache/wicore/models"


def test_a_known_model_that_is_not_there_says_how_to_fetch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WICORE_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="wicore model fetch gemma-3-270m"):
        resolve_model("gemma-3-270m")
    with pytest.raises(CheckpointError, match="expected a checkpoint folder"):
        resolve_model("/no/such/folder")


def test_rounding_to_bfloat16_is_half_to_even() -> None:
    random = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x80000000, 0xBF808000], np.uint32).view(np.float32)
    for values in (random, ties):
        expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
        assert (to_bfloat16(values) == expected).all()


def test_a_converted_checkpoint_reads_like_its_source(tmp_path: Path) -> None:
    source = open_checkpoint(FIXTURES / "tiny")
    seen: list[tuple[int, int]] = []
    save_bfloat16(source, tmp_path, lambda done, total: seen.append((done, total)))
    again = open_checkpoint(tmp_path)
    assert again.config == source.config
    assert again.tokenizer_model == source.tokenizer_model
    for name in source.config.tensor_shapes():
        assert (again.read(name) == source.read(name)).all()
    assert seen[-1] == (source.config.parameters, source.config.parameters)
    # The file is also what the reference library takes for a valid one.
    assert set(load_file(tmp_path / "model.safetensors")) == set(source.config.tensor_shapes())
