"""A checkpoint's weights arrive on the device, and are what the file says."""

from __future__ import annotations

import json
import threading

import gguf
import numpy as np
import pytest

import wicore.engine.tensorrt.weights as weights_module
from tests.fixtures.gguf_files import write_gguf
from tests.fixtures.plugin import FIXTURES, TINY_NAMES
from wicore.engine.folding import fold_attention_norms
from wicore.engine.tensorrt.weights import DeviceWeights, RandomWeights, load_weights
from wicore.errors import EngineError
from wicore.gemma3.checkpoint import Checkpoint, open_checkpoint


def read(device, address, shape, dtype) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    host, stream = device.allocate_host(size), device.stream()
    device.copy(host.address, address, size, stream)
    stream.synchronize()
    values = host.array.view(dtype).reshape(shape).copy()
    host.free()
    return values


def matrices(device, config, weights: DeviceWeights):
    """Every matrix of the checkpoint's names that lies at an address, as found on the device."""
    hidden, inner, hd = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.heads * hd, config.kv_heads * hd
    yield ["model.embed_tokens"], read(device, weights.embedding, (config.vocab_size, hidden), np.float16)
    for i, layer in enumerate(weights.layers):
        for address, rows, width, names in (
            (layer.qkv, q + 2 * kv, hidden, [f"self_attn.{part}_proj" for part in "qkv"]),
            (layer.out, hidden, q, ["self_attn.o_proj"]),
            (layer.gate_up, 2 * inner, hidden, ["mlp.gate_proj", "mlp.up_proj"]),
            (layer.down, hidden, inner, ["mlp.down_proj"]),
        ):
            found = read(device, address, (rows, width), np.float16)
            yield [f"model.layers.{i}.{name}" for name in names], found


def norms(device, config, layer):
    hidden, hd = config.hidden_size, config.head_dim
    for address, width, name in (
        (layer.input_norm, hidden, "input_layernorm"),
        (layer.post_attention_norm, hidden, "post_attention_layernorm"),
        (layer.pre_mlp_norm, hidden, "pre_feedforward_layernorm"),
        (layer.post_mlp_norm, hidden, "post_feedforward_layernorm"),
        (layer.q_norm, hd, "self_attn.q_norm"),
        (layer.k_norm, hd, "self_attn.k_norm"),
    ):
        yield name, read(device, address, (width,), np.float32)


def assert_loaded(device, checkpoint: Checkpoint, weights: DeviceWeights, int8_kv: bool) -> None:
    config = checkpoint.config
    for names, found in matrices(device, config, weights):
        expected = np.concatenate([checkpoint.read(f"{name}.weight") for name in names])
        np.testing.assert_array_equal(found, expected.astype(np.float16))
    for i, layer in enumerate(weights.layers):
        factors = {
            name: 1 + checkpoint.read(f"model.layers.{i}.{name}.weight")
            for name, _ in norms(device, config, layer)
        }
        factors["self_attn.q_norm"], factors["self_attn.k_norm"] = fold_attention_norms(
            factors["self_attn.q_norm"],
            factors["self_attn.k_norm"],
            config.query_pre_attn_scalar,
            int8_kv=int8_kv,
        )
        for name, found in norms(device, config, layer):
            np.testing.assert_array_equal(found, factors[name])
    found = read(device, weights.final_norm, (config.hidden_size,), np.float32)
    np.testing.assert_array_equal(found, 1 + checkpoint.read("model.norm.weight"))


@pytest.mark.parametrize("int8_kv", [False, True])
@pytest.mark.parametrize("name", TINY_NAMES)
def test_every_weight_is_the_checkpoints_rounded_to_half(device, name, int8_kv):
    checkpoint = open_checkpoint(FIXTURES / name)
    weights = load_weights(device, checkpoint, int8_kv=int8_kv)
    assert_loaded(device, checkpoint, weights, int8_kv)
    assert weights.total_bytes >= 2 * checkpoint.config.parameters
    weights.free()


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_gguf_file_is_decoded_on_the_way(device, tiny, tmp_path, kind):
    checkpoint = open_checkpoint(
        write_gguf(tiny, tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType[kind])
    )
    weights = load_weights(device, checkpoint)
    assert_loaded(device, checkpoint, weights, False)
    weights.free()


def test_a_tensor_of_many_pieces_arrives_whole_and_progress_reaches_the_total(device, tiny, monkeypatch):
    monkeypatch.setattr(weights_module, "PIECE_BYTES", 1000)
    reports: list[tuple[int, int]] = []
    threads = set()

    def note(done: int, total: int) -> None:
        reports.append((done, total))
        threads.add(threading.current_thread())

    weights = load_weights(device, tiny, on_progress=note)
    assert_loaded(device, tiny, weights, False)
    weights.free()
    stored = sum(
        tiny.stored(name).raw.nbytes for name, shape in tiny.config.tensor_shapes().items() if len(shape) == 2
    )
    assert reports[-1] == (stored, stored)
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})
    assert len(reports) > 100
    assert threads == {threading.current_thread()}


def edited(tmp_path, name, place, bits):
    """A copy of the tiny checkpoint with one element changed."""
    for file in (FIXTURES / "tiny").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    at = 8 + length + begin + 2 * place
    data[at : at + 2] = bits.to_bytes(2, "little")
    path.write_bytes(data)
    return open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"), [(1e5, "99840|100352"), (-3e38, r"3e\+38|2.9"), (np.inf, "inf"), (np.nan, "nan")]
)
def test_a_weight_beyond_half_is_an_error_naming_the_tensor_and_the_value(device, tmp_path, value, text):
    bits = int(np.float32(value).view(np.uint32)) >> 16
    checkpoint = edited(tmp_path, "model.layers.3.mlp.up_proj.weight", 64 * 7 + 9, bits)
    held = dict(device.report())
    with pytest.raises(EngineError, match=rf"model\.layers\.3\.mlp\.up_proj\.weight: .* found 1 .*({text})"):
        load_weights(device, checkpoint)
    assert dict(device.report()) == held


def test_weights_that_do_not_fit_are_an_error_before_any_is_read(emulated, tiny):
    emulated.memory_total = 100_000
    with pytest.raises(EngineError, match="the weights need"):
        load_weights(emulated, tiny)


# --- random weights -----------------------------------------------------------------------------------


def test_random_weights_have_the_deviation_that_keeps_activations_in_range(device, tiny):
    weights = load_weights(device, RandomWeights(tiny.config, 3))
    for names, found in matrices(device, tiny.config, weights):
        values = found.astype(np.float64)
        assert abs(values.mean()) < 5 * values.std() / values.size**0.5, names
        assert values.std() == pytest.approx(values.shape[1] ** -0.5, rel=0.05)
        assert np.abs(values).max() <= 1.74 * values.shape[1] ** -0.5
        bits = found.astype(np.float32).view(np.uint32)
        assert not (bits & 0xFFFF).any(), f"{names}: not numbers of bfloat16"
    for layer in weights.layers:
        for name, found in norms(device, tiny.config, layer):
            scale = tiny.config.query_pre_attn_scalar**-0.5 if name == "self_attn.q_norm" else 1
            assert found.mean() / scale == pytest.approx(1, abs=0.1)
            assert 0 < found.std() / scale < 0.2
    weights.free()


def test_random_weights_are_those_of_their_seed_and_no_two_matrices_are_alike(device, tiny):
    first, again, other = (load_weights(device, RandomWeights(tiny.config, seed)) for seed in (1, 1, 2))
    seen = set()
    for a, b, c in zip(*(matrices(device, tiny.config, w) for w in (first, again, other)), strict=True):
        np.testing.assert_array_equal(a[1], b[1])
        assert (a[1] != c[1]).mean() > 0.9
        seen.add(a[1].tobytes()[:64])
    assert len(seen) == 1 + 4 * tiny.config.layers
    for weights in (first, again, other):
        weights.free()


def test_progress_of_random_weights_reaches_the_total(device, tiny):
    reports: list[tuple[int, int]] = []
    load_weights(
        device, RandomWeights(tiny.config), on_progress=lambda *report: reports.append(report)
    ).free()
    assert reports[-1][0] == reports[-1][1] == reports[0][1]
