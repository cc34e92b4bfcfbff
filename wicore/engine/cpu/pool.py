"""KV blocks in memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import KVLayout, Pool

Float = NDArray[np.float32]


class KVPool:
    """The blocks of one pool, float32 [layers, 2, blocks, kv_heads, block_tokens, head_dim].

    Zeroed lazily by the operating system, so untouched blocks take no memory. Every element is finite
    at any time: attention multiplies masked positions by zero, and zero times a NaN is not zero.
    """

    def __init__(self, layout: KVLayout, pool: Pool, blocks: int) -> None:
        layers = layout.global_layers if pool == "global" else layout.window_layers
        shape = (layers, 2, blocks, layout.kv_heads, layout.block_tokens, layout.head_dim)
        self._data = np.zeros(shape, np.float32)

    def layer(self, index: int) -> tuple[Float, Float]:
        """K and V of the pool's index-th layer, each a view [blocks * kv_heads, block_tokens, head_dim]."""
        _, _, blocks, heads, tokens, width = self._data.shape
        k, v = self._data[index].reshape(2, blocks * heads, tokens, width)
        return k, v

    def copy_out(self, block: int, row: NDArray[np.uint8]) -> None:
        """A block to its row, uint8 [block_bytes]: layers, then K and V, then heads and positions."""
        self._like_block(row)[:] = self._data[:, :, block]

    def copy_in(self, block: int, row: NDArray[np.uint8]) -> None:
        """The reverse of `copy_out`."""
        self._data[:, :, block] = self._like_block(row)

    def _like_block(self, row: NDArray[np.uint8]) -> Float:
        layers, two, _, heads, tokens, width = self._data.shape
        return row.view(np.float32).reshape(layers, two, heads, tokens, width)
