"""Checkpoints: every form gives the same weights, and a bad one says what was expected and found."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests.fixtures.gguf_files import write_gguf
from wicore.errors import CheckpointError
from wicore.gemma3.checkpoint import Checkpoint, open_checkpoint, resolve_model
from wicore.gemma3.convert import save_bfloat16, to_bfloat16

FIXTURES = Path(__file__).parent / "fixtures"
EMBEDDING = "model.embed_tokens.weight"
PROJECTION = "multi_modal_projector.mm_input_projection_weight"
NORM = "model.layers.3.self_attn.q_norm.weight"


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_path, tmp_path / "model"))


@pytest.fixture
def sight(tmp_path: Path) -> Path:
    """The weights of a copy of the tiny checkpoint with a vision tower."""
    return Path(shutil.copytree(FIXTURES / "tiny-image", tmp_path / "model")) / "model.safetensors"


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: object, data: bytes) -> None:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def refused(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return caught.value.message


# --- every form ---------------------------------------------------------------------------------


def test_bfloat16_weights_are_read_exactly(tiny: Checkpoint, tiny_path: Path) -> None:
    header, data = read_header(tiny_path / "model.safetensors")
    begin, end = header[NORM]["data_offsets"]
    bits = np.frombuffer(data[begin:end], "<u2").astype(np.uint32) << 16
    assert tiny.dtype == "BF16"
    np.testing.assert_array_equal(tiny.read(NORM), bits.view(np.float32))


def test_float32_shards_are_read_as_the_safetensors_library_reads_them() -> None:
    path = FIXTURES / "tiny-mqa"
    checkpoint = open_checkpoint(path)
    expected = {name: array for file in path.glob("*.safetensors") for name, array in load_file(file).items()}
    assert checkpoint.dtype == "F32"
    assert checkpoint.names() == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_float16_weights_of_a_multimodal_checkpoint_have_the_text_models_names() -> None:
    path = FIXTURES / "tiny-image"
    checkpoint = open_checkpoint(path)
    stored = load_file(path / "model.safetensors")
    theirs = {
        name.replace("language_model.model.", "model.").replace(".language_model", ""): name
        for name in stored
    }
    assert checkpoint.dtype == "F16"
    assert any("vision" in name for name in checkpoint.names())
    for name in checkpoint.config.tensor_shapes():
        np.testing.assert_array_equal(checkpoint.read(name), stored[theirs[name]].astype(np.float32))


@pytest.mark.parametrize(
    "prefix",
    [
        "vision_tower.",
        "vision_tower.vision_model.",
        "model.vision_tower.",
        "model.vision_tower.vision_model.",
    ],
)
def test_a_vision_tower_is_read_under_the_names_of_every_layout(sight: Path, prefix: str) -> None:
    stored = load_file(sight)
    outer = "model." if prefix.startswith("model.") else ""
    renamed = {
        name.replace("vision_tower.", prefix).replace("multi_modal", f"{outer}multi_modal"): array
        for name, array in stored.items()
    }
    save_file(renamed, sight)
    checkpoint = open_checkpoint(sight.parent)
    assert checkpoint.config.vision is not None
    for name in checkpoint.config.vision_shapes():
        np.testing.assert_array_equal(checkpoint.read(name), stored[name].astype(np.float32))


def test_a_multimodal_checkpoint_of_the_text_alone_is_served_as_text(sight: Path) -> None:
    stored = load_file(sight)
    save_file({n: a for n, a in stored.items() if n.startswith("language")}, sight)
    assert open_checkpoint(sight.parent).config.vision is None


@pytest.mark.parametrize("name", [PROJECTION, "vision_tower.encoder.layers.1.mlp.fc1.bias"])
def test_a_tower_that_lacks_a_tensor_is_refused(sight: Path, name: str) -> None:
    stored = load_file(sight)
    del stored[name]
    save_file(stored, sight)
    with pytest.raises(CheckpointError, match=f"expected tensor {name}"):
        open_checkpoint(sight.parent)


def test_a_tower_of_another_shape_is_refused(sight: Path) -> None:
    stored = load_file(sight)
    stored[PROJECTION] = np.ascontiguousarray(stored[PROJECTION].T)
    save_file(stored, sight)
    with pytest.raises(CheckpointError, match=r"expected shape \[24, 64\], found \[64, 24\]"):
        open_checkpoint(sight.parent)


def test_shards_without_an_index_are_read_too(tmp_path: Path) -> None:
    path = Path(shutil.copytree(FIXTURES / "tiny-mqa", tmp_path / "model"))
    (path / "model.safetensors.index.json").unlink()
    assert open_checkpoint(path).fingerprint == open_checkpoint(FIXTURES / "tiny-mqa").fingerprint


@pytest.mark.parametrize("name", [EMBEDDING, "model.layers.0.self_attn.q_proj.weight"])
@pytest.mark.parametrize("ids", [[], [7], [5, 0, 5, 63]])
def test_rows_are_those_of_the_whole_matrix(
    tiny: Checkpoint, tmp_path: Path, name: str, ids: list[int]
) -> None:
    quantised = open_checkpoint(write_gguf(tiny, tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType.Q8_0))
    for checkpoint in (tiny, quantised):
        rows = checkpoint.rows(name, ids)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, checkpoint.read(name)[ids])


@pytest.mark.parametrize("ids", [[-1], [0, 512]])
def test_a_row_outside_of_the_matrix_is_an_error(tiny: Checkpoint, ids: list[int]) -> None:
    with pytest.raises(IndexError):
        tiny.rows(EMBEDDING, ids)


def test_what_was_read_may_be_changed_without_changing_the_checkpoint(tiny: Checkpoint) -> None:
    first = tiny.read(EMBEDDING)
    expected = first.copy()
    first += 1
    np.testing.assert_array_equal(tiny.read(EMBEDDING), expected)


def test_a_converted_checkpoint_has_the_same_config_and_rounded_weights(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "tiny-mqa", tmp_path / "source"))
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    source, target = open_checkpoint(folder), tmp_path / "target"
    target.mkdir()
    seen: list[tuple[int, int]] = []
    save_bfloat16(source, target, lambda done, total: seen.append((done, total)))
    again = open_checkpoint(target)
    assert again.config == source.config
    assert again.tokenizer_model == b"a tokenizer"
    assert seen[-1] == (source.config.parameters, source.config.parameters)
    for name in source.config.tensor_shapes():
        np.testing.assert_allclose(again.read(name), source.read(name), rtol=2**-8)


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (-2.0, 0xC000),
        (1 + 2**-8, 0x3F80),
        (1 + 3 * 2**-8, 0x3F82),
        (1 + 2**-8 + 2**-20, 0x3F81),
    ],
)
def test_bfloat16_rounds_half_to_even(value: float, bits: int) -> None:
    assert to_bfloat16(np.array([value], np.float32))[0] == bits


# --- fingerprint and pages ----------------------------------------------------------------------


def test_digests_depend_on_content_and_not_on_place(tiny: Checkpoint, folder: Path) -> None:
    assert open_checkpoint(folder).fingerprint == tiny.fingerprint
    assert open_checkpoint(folder).content_digest == tiny.content_digest


@pytest.mark.parametrize("name", [EMBEDDING, NORM, "model.layers.7.mlp.down_proj.weight"])
def test_a_tensor_with_other_values_changes_the_fingerprint(
    tiny: Checkpoint, folder: Path, name: str
) -> None:
    header, data = read_header(folder / "model.safetensors")
    begin, end = header[name]["data_offsets"]
    other = bytes(byte ^ 1 for byte in data[begin:end])
    write_header(folder / "model.safetensors", header, data[:begin] + other + data[end:])
    assert open_checkpoint(folder).fingerprint != tiny.fingerprint


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bit_of_the_weights_changes_the_content_digest(
    tiny: Checkpoint, folder: Path, data: st.DataObject
) -> None:
    file = folder / "model.safetensors"
    stored = file.read_bytes()
    weights = len(stored) - len(read_header(file)[1])
    at = data.draw(st.integers(weights, len(stored) - 1))
    changed = stored[at] ^ 1 << data.draw(st.integers(0, 7))
    file.write_bytes(stored[:at] + bytes([changed]) + stored[at + 1 :])
    assert open_checkpoint(folder).content_digest != tiny.content_digest
    file.write_bytes(stored)
    assert open_checkpoint(folder).content_digest == tiny.content_digest


def test_another_config_changes_the_digests(tiny: Checkpoint, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 32}))
    assert open_checkpoint(folder).fingerprint != tiny.fingerprint
    assert open_checkpoint(folder).content_digest != tiny.content_digest


def test_a_fingerprint_reads_a_bounded_part_of_a_large_file(tiny: Checkpoint) -> None:
    class Counting(np.ndarray):
        touched = 0

        def tobytes(self, *args: Any) -> bytes:
            Counting.touched += self.nbytes
            return super().tobytes(*args)

    large = np.zeros((4096, 4096), np.uint8).view(Counting)
    tensors = {name: tiny.stored(name) for name in tiny.names()}
    tensors[EMBEDDING] = dataclasses.replace(tensors[EMBEDDING], raw=large)
    copy = Checkpoint(tiny.path, tiny.config, tensors, lambda: b"")
    assert copy.fingerprint
    assert 0 < Counting.touched <= 16 * 256


def test_released_pages_are_read_again(tiny_path: Path) -> None:
    for path in (tiny_path, FIXTURES / "tiny-mqa"):
        checkpoint = open_checkpoint(path)
        before = checkpoint.read(EMBEDDING)
        checkpoint.release_pages()
        np.testing.assert_array_equal(checkpoint.read(EMBEDDING), before)


# --- what is refused ----------------------------------------------------------------------------


def test_a_path_with_nothing_there_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "none").endswith("expected a checkpoint folder or a .gguf file, found nothing")


def test_a_file_of_another_kind_is_refused(tiny_path: Path) -> None:
    assert "found another kind of file" in refused(tiny_path / "model.safetensors")


def test_a_folder_without_a_config_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    assert refused(tmp_path).endswith("expected config.json, found an empty folder")
    (tmp_path / "holiday.jpg").touch()
    assert refused(tmp_path).endswith("expected config.json, found holiday.jpg")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "expected *.safetensors, found config.json" in refused(folder)


def test_a_missing_tokenizer_is_named_when_it_is_asked_for(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: expected the SentencePiece model"):
        _ = open_checkpoint(folder).tokenizer_model


def test_an_unknown_tensor_is_named(tiny: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"expected tensor model\.layers\.99"):
        tiny.read("model.layers.99.mlp.up_proj.weight")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 20_000, -1])
def test_a_truncated_safetensors_file_is_refused_wherever_it_is_cut(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert re.search("model.safetensors: .*expected .*found", refused(folder))


def spoil_shape(header: dict[str, Any]) -> None:
    rows, width = header[EMBEDDING]["shape"]
    header[EMBEDDING]["shape"] = [width, rows]


def spoil_offsets(header: dict[str, Any]) -> None:
    header[NORM]["data_offsets"] = [-64, 0]


def spoil_dtype(header: dict[str, Any]) -> None:
    header[NORM]["dtype"] = "F8_E4M3"


def spoil_size(header: dict[str, Any]) -> None:
    header[NORM]["shape"] = [33]


def spoil_negative(header: dict[str, Any]) -> None:
    header[EMBEDDING]["shape"] = [-512, -64]


def spoil_entry(header: dict[str, Any]) -> None:
    header[NORM] = "weights"


def spoil_name(header: dict[str, Any]) -> None:
    header["model.something.weight"] = header.pop(NORM)


def spoil_twice(header: dict[str, Any]) -> None:
    header["language_model." + NORM] = header[NORM]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_shape, f"{EMBEDDING}: expected shape [512, 64], found [64, 512]"),
        (spoil_offsets, f"{NORM}: expected a shape and a range of bytes, found [32], -64 to 0"),
        (spoil_dtype, f"{NORM}: expected one of F32, F16, BF16, found F8_E4M3"),
        (spoil_size, f"{NORM}: expected bytes for BF16 [33], found 64"),
        (spoil_negative, "found [-512, -64]"),
        (spoil_entry, f"{NORM}: expected dtype, shape and data_offsets, found weights"),
        (spoil_name, f"expected tensor {NORM}, not found among 106 tensors"),
        (spoil_twice, f"expected each tensor once, found {NORM} again"),
    ],
)
def test_a_misshapen_tensor_is_refused(folder: Path, spoil: Callable[[Any], None], says: str) -> None:
    header, data = read_header(folder / "model.safetensors")
    spoil(header)
    write_header(folder / "model.safetensors", header, data)
    assert says in refused(folder)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 12) + b"not a header",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    ],
    ids=["absurd length", "no JSON", "no object", "deep nesting", "a git-lfs pointer"],
)
def test_a_file_that_is_no_safetensors_is_refused(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    assert re.search("model.safetensors: expected .*header.*, found", refused(folder))


def test_a_header_longer_than_the_format_allows_is_not_read(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate((1 << 30) + 8)  # sparse
    assert f"found a length of {1 << 30}" in refused(folder)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({}, "expected weight_map, found None"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors: expected this shard"),
        (
            {"weight_map": {"a": "../../secret.safetensors"}},
            "expected names of files beside it, found '../../",
        ),
        ({"weight_map": {"a": "/etc/hostname"}}, "expected names of files beside it"),
        ({"weight_map": {"a": 7}}, "expected names of files beside it, found 7"),
    ],
)
def test_a_bad_index_is_refused(folder: Path, index: object, says: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert says in refused(folder)


# --- names of models ----------------------------------------------------------------------------


def test_a_setting_may_be_a_path_or_a_fetched_models_name(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WICORE_CACHE", str(tmp_path))
    assert resolve_model(str(tiny_path)) == tiny_path
    with pytest.raises(CheckpointError, match="run `wicore model fetch gemma-3-270m`"):
        resolve_model("gemma-3-270m")
    (tmp_path / "models" / "gemma-3-270m").mkdir(parents=True)
    assert resolve_model("gemma-3-270m") == tmp_path / "models" / "gemma-3-270m"


@pytest.mark.parametrize("name", ["llama-3", "/no/such/folder", "x" * 5000, "~nobody-of-this-name/model"])
def test_a_setting_that_means_no_model_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="found"):
        resolve_model(name)


# --- rows read past the mapping ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_rows_read_from_the_file_are_those_of_its_mapping(tiny: Checkpoint, name: str) -> None:
    tensor = tiny.stored(name)
    for first, end in ((0, 1), (3, 17), (0, len(tensor.raw))):
        read = np.empty((end - first) * tensor.raw.shape[1], np.uint8)
        tensor.read_into(read, first, end)
        np.testing.assert_array_equal(read, tensor.raw[first:end].reshape(-1))


def test_rows_of_a_file_that_has_become_shorter_are_refused(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    tensor = checkpoint.stored("model.embed_tokens.weight")
    os.truncate(folder / "model.safetensors", 4096)
    with pytest.raises(CheckpointError, match="the file is truncated"):
        tensor.read_into(np.empty(tensor.raw.nbytes, np.uint8), 0, len(tensor.raw))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
def test_a_file_is_closed_when_nothing_refers_to_its_tensors(folder: Path) -> None:
    path = (folder / "model.safetensors").resolve()

    def is_open() -> bool:
        return path in [Path(f"/proc/self/fd/{fd}").resolve() for fd in os.listdir("/proc/self/fd")]

    checkpoint = open_checkpoint(folder)
    assert is_open()
    del checkpoint
    gc.collect()
    assert not is_open()
