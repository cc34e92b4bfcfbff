"""Rotary position tables, float32, as transformers computes them.

RoPE: Su et al., 2021 (arXiv:2104.09864). Gemma 3 has two bases: a small one for window layers, a
large one for global layers, whose frequencies may also be divided by a linear factor.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wicore.gemma3.config import Gemma3Config, LayerKind


def inverse_frequencies(config: Gemma3Config, kind: LayerKind) -> NDArray[np.float32]:
    """Radians a position, float32 [head_dim / 2]."""
    theta, factor = (
        (config.rope_theta, config.rope_scale) if kind == "global" else (config.rope_local_theta, 1.0)
    )
    # The power is taken in float64 and rounded: float32 powers differ between libraries in the last
    # bit, which at position 32,000 turns an angle by 0.004 rad. The rest is float32, as in torch.
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    wavelengths = np.power(theta, exponent).astype(np.float32)
    frequencies: NDArray[np.float32] = np.float32(1) / wavelengths / np.float32(factor)
    return frequencies


def rope_table(
    config: Gemma3Config, kind: LayerKind, positions: ArrayLike
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(cos, sin) for the positions, each float32 [len(positions), head_dim].

    The second half of a row repeats the first: x is rotated as
    `x * cos + concat(-x[half:], x[:half]) * sin`.
    """
    at = np.asarray(positions, dtype=np.float32)
    angles = at[:, None] * inverse_frequencies(config, kind)
    angles = np.concatenate((angles, angles), axis=-1)
    return np.cos(angles), np.sin(angles)
