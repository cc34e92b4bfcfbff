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
_DRAWN_ROWS = 1 << 14
"""Random numbers take their time: what has more rows repeats them."""


def segment(kind: Kind, shape: SegmentShape, given: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a segment, float64, from its inputs by name."""
    x = {name: a.astype(np.float64) for name, a in given.items() if name not in ("ids", "table")}
    if kind == "head":
        return {"logits": x["hidden"] @ given["table"].astype(np.float64).T}
    if kind == "first":
        residual = given["table"][given["ids"]].astype(np.float64) * math.sqrt(shape.hidden)
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
    kind: Kind, shape: SegmentShape, rows: int, *, seed: int = 0, half: Any = np.float16
) -> dict[str, Array]:
    """Inputs of a segment by name, in the sizes that a model has: products keep the size of their input."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for binding in bindings(kind, shape):
        size = binding.sized(rows)
        if binding.output:
            continue
        if binding.dtype == "int32":
            made[binding.name] = rng.integers(0, shape.vocab, size, dtype=np.int32)
            continue
        drawn = (min(size[0], _DRAWN_ROWS), *size[1:])
        values = np.resize(rng.standard_normal(drawn, np.float32), size)
        if binding.dtype == "float32":
            made[binding.name] = values * 5 if binding.dynamic else 1 + 0.1 * values
            continue
        if not binding.dynamic:
            values *= size[1] ** -0.5
        made[binding.name] = values.astype(half)
    return made


def inflate(given: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs with o_proj and down_proj 64 times as large, on inputs of them so large that float16 does
    not hold their products; it still holds everything else."""
    factors = {"o": 64, "down": 64, "attention": 500, "gate": 5, "up": 100}
    return {name: a * a.dtype.type(factors[name]) if name in factors else a for name, a in given.items()}


def relative_error(found: Array, expected: Array) -> float:
    """Of the whole array, by the Euclidean norm; NaN and infinity stay what they are."""
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))
