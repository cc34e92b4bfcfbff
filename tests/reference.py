"""What each segment kind should compute, in float64, and inputs to compute it from. Needs numpy only.

Written apart from the networks: no scaling, no clipping, no 16 bits. A power of two before a matrix product
and its square in the next norm's eps change nothing in exact arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wicore.engine.tensorrt.networks import Kind, SegmentShape, bindings

Array = NDArray[Any]


def segment(kind: Kind, shape: SegmentShape, given: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a segment, float64, from its inputs by name."""
    x = {name: a if a.dtype == np.int32 else a.astype(np.float64) for name, a in given.items()}
    if kind == "head":
        return {"logits": x["hidden"] @ x["table"].T}
    if kind == "first":
        residual = x["table"][x["ids"]] * math.sqrt(shape.hidden)
    else:
        deltas = products_before_norms(shape, given)
        residual = x["residual"] + rms_norm(deltas["o"], x["post_attention"], shape.eps)
        residual = residual + rms_norm(deltas["down"], x["post_mlp"], shape.eps)
    normed = rms_norm(residual, x["norm"], shape.eps)
    if kind == "last":
        return {"hidden": normed}
    return {"residual_out": residual, "qkv": normed @ x["qkv_weight"].T}


def products_before_norms(shape: SegmentShape, given: Mapping[str, Array]) -> dict[str, Array]:
    """The products of o_proj and down_proj of a middle or last segment, float64: what may be too large."""
    x = {name: a.astype(np.float64) for name, a in given.items()}
    delta = x["attention"] @ x["o"].T
    residual = x["residual"] + rms_norm(delta, x["post_attention"], shape.eps)
    normed = rms_norm(residual, x["pre_mlp"], shape.eps)
    act = gelu_tanh(normed @ x["gate"].T) * (normed @ x["up"].T)
    return {"o": delta, "down": act @ x["down"].T}


def rms_norm(x: Array, factor: Array, eps: float) -> Array:
    """x over the root of its mean square, times the factor (1 + w)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * factor


def gelu_tanh(x: Array) -> Array:
    """GELU in its tanh form (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def random_inputs(
    kind: Kind,
    shape: SegmentShape,
    rows: int,
    *,
    seed: int = 0,
    inflated: bool = False,
    half: Any = np.float16,
) -> dict[str, Array]:
    """Inputs of a segment by name, in the sizes that a model has: products keep the size of their input.

    `inflated`: o_proj and down_proj are 64 times as large, on inputs so large that float16 does not hold the
    products, though it holds all that a model needs.
    """
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for binding in bindings(kind, shape):
        size = binding.sized(rows)
        if binding.output:
            continue
        if binding.dtype == "int32":
            made[binding.name] = rng.integers(0, shape.vocab, size, dtype=np.int32)
            continue
        values = rng.standard_normal(size, np.float32)
        if binding.dtype == "float32":
            made[binding.name] = values * 5 if binding.dynamic else 1 + 0.1 * values
            continue
        if not binding.dynamic:
            values *= size[1] ** -0.5
        if inflated:
            values *= {"o": 64, "down": 64, "attention": 500, "gate": 5, "up": 100}.get(binding.name, 1)
        made[binding.name] = values.astype(half)
    return made


def relative_error(found: Array, expected: Array) -> float:
    """Of the whole array, by the Euclidean norm; NaN and infinity stay what they are."""
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))
