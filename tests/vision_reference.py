"""What each network of the vision tower should compute, in float64, and inputs to compute it from.

Written apart from the networks: no scaling, no clipping, no 16 bits, no blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.reference import gelu_tanh, rms_norm
from wicore.engine.tensorrt.vision_networks import VisionKind, VisionShape, bindings

Array = NDArray[Any]


def network(kind: VisionKind, shape: VisionShape, given: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a network, float64, from its inputs by name."""
    x = {name: a.astype(np.float64) for name, a in given.items()}
    if kind == "vision_attention":
        return {"attended": attention(shape, x["queries"], x["qkv"])}
    if kind == "vision_first":
        residual = x["patches"] @ x["patch_weight"].T + x["patch_bias"] + x["positions"]
    else:
        residual = x["residual"] + x["attended"] @ x["out"].T + x["out_bias"]
        normed = layer_norm(residual, x["mlp_norm_weight"], x["mlp_norm_bias"], shape.eps)
        act = gelu_tanh(normed @ x["fc1"].T + x["fc1_bias"])
        residual = residual + act @ x["fc2"].T + x["fc2_bias"]
    normed = layer_norm(residual, x["norm_weight"], x["norm_bias"], shape.eps)
    if kind == "vision_last":
        pooled = rms_norm(pool(shape, normed), x["soft_norm"], shape.eps)
        return {"rows": pooled @ x["projection"]}
    return {"residual_out": residual, "qkv": normed @ x["qkv_weight"].T + x["qkv_bias"]}


def attention(shape: VisionShape, queries: Array, qkv: Array) -> Array:
    """Head by head; q in the first third of columns, k and v in the others."""
    width, parts = shape.hidden // shape.heads, []
    for head in range(shape.heads):
        q, k, v = (
            a[:, third * shape.hidden + head * width :][:, :width]
            for third, a in enumerate((queries, qkv, qkv))
        )
        scores = q @ k.T / math.sqrt(width)
        shares = np.exp(scores - scores.max(1, keepdims=True))
        parts.append(shares / shares.sum(1, keepdims=True) @ v)
    return np.concatenate(parts, 1)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + eps) * weight + bias


def pool(shape: VisionShape, x: Array) -> Array:
    """Each token the mean of a square of patches."""
    across, side = math.isqrt(shape.patches), math.isqrt(shape.tokens)
    window, grid = across // side, x.reshape(across, across, -1)
    return np.stack(
        [
            grid[y * window : (y + 1) * window, z * window : (z + 1) * window].mean((0, 1))
            for y in range(side)
            for z in range(side)
        ]
    )


def random_inputs(
    kind: VisionKind, shape: VisionShape, *, seed: int = 0, half: Any = np.float16
) -> dict[str, Array]:
    """Inputs of a network by name: products keep the size of their input."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for binding in bindings(kind, shape):
        if binding.output:
            continue
        values = rng.standard_normal(binding.shape, np.float32)
        if binding.dtype == "float32":
            made[binding.name] = values * 5 if binding.name == "residual" else values
            continue
        if binding.name in ("patch_weight", "qkv_weight", "out", "fc1", "fc2"):
            values *= binding.shape[1] ** -0.5
        elif binding.name == "projection":
            values *= binding.shape[0] ** -0.5
        made[binding.name] = values.astype(half)
    if kind == "vision_attention":  # a stretch of what all see
        made["queries"] = made["qkv"][-shape.block :]
    return made
