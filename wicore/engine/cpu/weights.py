"""Weights in the form the graphs take them: float32 matrices, or 8-bit codes with a scale a group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Union

import numpy as np
from numpy.typing import NDArray

from wicore.gemma3.checkpoint import Checkpoint

WeightFormat = Literal["int8", "float32"]
Float = NDArray[np.float32]

GROUP = 32
"""Weights of the decoder stack that share a scale, as in llama.cpp's Q8_0. Measured: 64 doubles the
divergence from float32, and is no faster."""

HEAD_GROUPS = (128, 64, 32)
"""The same for the head, whose time is that of reading its weights: the largest that divides its width.
At 128, ONNX Runtime's one-row kernel sums in another order than its others, which would make the text
depend on the batch size; the head's input is refined (`Graph.linear`), so it always has two rows or more."""

_EMBEDDING = "model.embed_tokens.weight"
_ROWS = 16_384
"""Rows of the embedding table handled at once, so that it never stands in memory as float32."""


@dataclass(frozen=True)
class DenseLinear:
    matrix: Float
    """[in, out]"""


@dataclass(frozen=True)
class QuantizedLinear:
    """Symmetric 8-bit weights in `MatMulNBits` layout: value = (code - 128) * scale of its group."""

    codes: NDArray[np.uint8]
    """[out, in / group, group]"""
    scales: Float
    """[out, in / group]"""

    @property
    def group(self) -> int:
        return int(self.codes.shape[2])

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[1] * self.codes.shape[2])


Linear = Union[DenseLinear, QuantizedLinear]  # noqa: UP007  evaluated at run time on Python 3.10


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Norms are the factor itself, 1 + w."""

    input_norm: Float
    qkv: Linear
    q_norm: Float
    k_norm: Float
    out: Linear
    post_attention_norm: Float
    pre_mlp_norm: Float
    gate: Linear
    up: Linear
    down: Linear
    post_mlp_norm: Float


def quantize(weight: Float, group: int = GROUP) -> QuantizedLinear:
    """[out, in] to 8 bits: round to nearest, the largest magnitude of each group maps to 127."""
    out, width = weight.shape
    tiles = weight.reshape(out, width // group, group)
    largest = np.maximum(tiles.max(-1, keepdims=True), -tiles.min(-1, keepdims=True))
    scales: Float = np.divide(largest, np.float32(127), dtype=np.float32)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    codes = tiles * inverse
    np.rint(codes, out=codes)
    codes += 128
    return QuantizedLinear(codes.astype(np.uint8), scales[..., 0])


def load_layer(checkpoint: Checkpoint, index: int, form: WeightFormat) -> LayerWeights:
    def read(name: str) -> Float:
        return checkpoint.read(f"model.layers.{index}.{name}.weight")

    def norm(name: str) -> Float:
        factor: Float = np.float32(1) + read(name)
        return factor

    linear = _linear_maker(form)
    return LayerWeights(
        input_norm=norm("input_layernorm"),
        qkv=linear(np.concatenate([read(f"self_attn.{part}_proj") for part in "qkv"])),
        q_norm=norm("self_attn.q_norm"),
        k_norm=norm("self_attn.k_norm"),
        out=linear(read("self_attn.o_proj")),
        post_attention_norm=norm("post_attention_layernorm"),
        pre_mlp_norm=norm("pre_feedforward_layernorm"),
        gate=linear(read("mlp.gate_proj")),
        up=linear(read("mlp.up_proj")),
        down=linear(read("mlp.down_proj")),
        post_mlp_norm=norm("post_feedforward_layernorm"),
    )


def load_final_norm(checkpoint: Checkpoint) -> Float:
    factor: Float = np.float32(1) + checkpoint.read("model.norm.weight")
    return factor


def load_head(checkpoint: Checkpoint, form: WeightFormat) -> Linear:
    """The output head: the embedding table, tied."""
    config = checkpoint.config
    vocab, hidden = config.vocab_size, config.hidden_size
    parts = [np.arange(at, min(at + _ROWS, vocab)) for at in range(0, vocab, _ROWS)]
    group = next((size for size in HEAD_GROUPS if hidden % size == 0), None)
    if form == "float32" or group is None:
        matrix = np.empty((hidden, vocab), np.float32)
        for ids in parts:
            matrix[:, ids[0] : ids[-1] + 1] = checkpoint.rows(_EMBEDDING, ids).T
        return DenseLinear(matrix)
    codes = np.empty((vocab, hidden // group, group), np.uint8)
    scales = np.empty((vocab, hidden // group), np.float32)
    for ids in parts:
        part = quantize(checkpoint.rows(_EMBEDDING, ids), group)
        codes[ids[0] : ids[-1] + 1], scales[ids[0] : ids[-1] + 1] = part.codes, part.scales
    return QuantizedLinear(codes, scales)


def embed(checkpoint: Checkpoint, tokens: NDArray[np.int32]) -> Float:
    """Embeddings times sqrt(hidden), float32 [n, hidden]; rows come from the mapped file."""
    rows: Float = checkpoint.rows(_EMBEDDING, tokens) * np.float32(checkpoint.config.hidden_size**0.5)
    return rows


def _linear_maker(form: WeightFormat) -> Callable[[Float], Linear]:
    def linear(weight: Float) -> Linear:
        # A width that no group divides stays in float32: rare, and exact.
        if form == "int8" and weight.shape[1] % GROUP == 0:
            return quantize(weight)
        return DenseLinear(np.ascontiguousarray(weight.T))

    return linear
