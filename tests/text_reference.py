"""The text model in float64, written down once more, without a cache: what logits after images should be.

That it is Gemma 3 is shown by the references of transformers, for text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tests.reference import gelu_tanh, rms_norm
from wicore.engine.base import ImageRows
from wicore.gemma3.checkpoint import Checkpoint
from wicore.gemma3.config import Gemma3Config

Array = NDArray[np.float64]


def logits(checkpoint: Checkpoint, tokens: NDArray[np.int32], images: Sequence[ImageRows] = ()) -> Array:
    """After every token, [n, vocab]; the ids of images are not looked at."""
    config = checkpoint.config

    def read(name: str) -> Array:
        return checkpoint.read(f"model.{name}.weight").astype(np.float64)

    table = read("embed_tokens")
    x = table[np.maximum(tokens, 0)] * config.hidden_size**0.5
    for image in images:
        x[image.start : image.end] = image.rows
    for layer, kind in enumerate(config.layer_kinds):

        def weight(name: str, layer: int = layer) -> Array:
            return read(f"layers.{layer}.{name}")

        def norm(value: Array, name: str, layer: int = layer) -> Array:
            return rms_norm(value, 1 + read(f"layers.{layer}.{name}"), config.rms_norm_eps)

        normed = norm(x, "input_layernorm")
        q, k, v = (_heads(normed @ weight(f"self_attn.{p}_proj").T, config.head_dim) for p in "qkv")
        q, k = (_rotated(norm(a, f"self_attn.{p}_norm"), config, kind) for a, p in ((q, "q"), (k, "k")))
        attended = _attention(q, k, v, config, _seen(len(tokens), images, config, kind))
        x = x + norm(attended @ weight("self_attn.o_proj").T, "post_attention_layernorm")
        normed = norm(x, "pre_feedforward_layernorm")
        inner = gelu_tanh(normed @ weight("mlp.gate_proj").T) * (normed @ weight("mlp.up_proj").T)
        x = x + norm(inner @ weight("mlp.down_proj").T, "post_feedforward_layernorm")
    return rms_norm(x, 1 + read("norm"), config.rms_norm_eps) @ table.T


def _heads(x: Array, width: int) -> Array:
    """[n, heads * width] -> [heads, n, width]"""
    return x.reshape(len(x), -1, width).transpose(1, 0, 2)


def _rotated(x: Array, config: Gemma3Config, kind: str) -> Array:
    base, scale = (config.rope_theta, config.rope_scale) if kind == "global" else (config.rope_local_theta, 1)
    half = config.head_dim // 2
    angles = np.arange(x.shape[1])[:, None] / scale * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _seen(n: int, images: Sequence[ImageRows], config: Gemma3Config, kind: str) -> NDArray[np.bool_]:
    """Which key (second axis) each query sees."""
    query, key = np.arange(n)[:, None], np.arange(n)[None]
    seen = key <= query
    if kind == "window":
        seen &= key > query - config.sliding_window
    for image in images:
        seen[image.start : image.end, image.start : image.end] = True
    return seen


def _attention(q: Array, k: Array, v: Array, config: Gemma3Config, seen: NDArray[np.bool_]) -> Array:
    group = config.heads // config.kv_heads
    k, v = np.repeat(k, group, 0), np.repeat(v, group, 0)
    scores = q @ k.transpose(0, 2, 1) * config.query_pre_attn_scalar**-0.5
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = weights / weights.sum(-1, keepdims=True) @ v
    return out.transpose(1, 0, 2).reshape(q.shape[1], -1)
