"""Factors of attention that are folded into its norms' weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


def fold_attention_norms(
    q_norm: Float, k_norm: Float, query_pre_attn_scalar: float, *, int8_kv: bool
) -> tuple[Float, Float]:
    """The factors (1 + w) of the norms of q and k, [head_dim] each, with the query scale in q's.

    For 8-bit KV, K is divided by a level an element, and q multiplied by it.
    """
    scale = np.float32(query_pre_attn_scalar**-0.5)
    level = _levels(k_norm) if int8_kv else np.float32(1)
    return q_norm * (scale * level), k_norm / level


def _levels(k_norm: Float) -> Float:
    """What 8-bit K is divided by and q multiplied with, [head_dim]: alike for a pair that RoPE turns.

    A few elements of K have much larger norm weights than others, and would take most of the 8 bits. The
    product of q and k stays the same.
    """
    pair = np.abs(k_norm).reshape(2, -1).max(0)
    levels: Float = np.tile(np.where(pair > 0, pair, np.float32(1)), 2)
    return levels
