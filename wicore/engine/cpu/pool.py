"""KV blocks in memory."""

from __future__ import annotations

from collections.abc import Sequence

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

    def copy_out(self, blocks: Sequence[int], host: NDArray[np.uint8]) -> None:
        """Blocks to `host`, uint8 [len(blocks), block_bytes]: per block, layers, then K and V."""
        self._host_view(blocks, host)[:] = np.moveaxis(self._data[:, :, list(blocks)], 2, 0)

    def copy_in(self, host: NDArray[np.uint8], blocks: Sequence[int]) -> None:
        """The reverse of `copy_out`."""
        self._data[:, :, list(blocks)] = np.moveaxis(self._host_view(blocks, host), 0, 2)

    def _host_view(self, blocks: Sequence[int], host: NDArray[np.uint8]) -> Float:
        layers, two, _, heads, tokens, width = self._data.shape
        return host.view(np.float32).reshape(len(blocks), layers, two, heads, tokens, width)
