"""KV blocks in memory, and the bytes of one block in host memory."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import KVLayout, Pool

KVFormat = Literal["float32", "int8"]
"""int8: codes, with a float32 scale for each vector, that is K or V of one head at one position."""

Array = NDArray[Any]


class KVPool:
    """The blocks of one pool: vectors [layers, 2, blocks, kv_heads, block_tokens, head_dim] of the layout's
    type, and for int8 the scales, float32 [layers, 2, blocks, kv_heads, block_tokens].

    Zeroed lazily by the operating system, so untouched blocks take no memory. Every element is finite
    at any time: attention multiplies masked positions by zero, and zero times a NaN is not zero.
    """

    def __init__(self, layout: KVLayout, pool: Pool, blocks: int) -> None:
        layers = layout.global_layers if pool == "global" else layout.window_layers
        shape = (layers, 2, blocks, layout.kv_heads, layout.block_tokens)
        self._parts: list[Array] = [np.zeros((*shape, layout.head_dim), layout.dtype)]
        if layout.dtype == "int8":
            self._parts.append(np.zeros(shape, np.float32))
        self._ends = np.cumsum([part[:, :, 0].nbytes for part in self._parts]).tolist()

    def layer(self, index: int) -> list[tuple[Array, Array]]:
        """K and V of the pool's index-th layer: vectors, then scales if any, as views
        [blocks * kv_heads, block_tokens, ...]."""
        views = []
        for part in self._parts:
            _, _, blocks, heads, *rest = part.shape
            k, v = part[index].reshape(2, blocks * heads, *rest)
            views.append((k, v))
        return views

    def copy_out(self, block: int, row: NDArray[np.uint8]) -> None:
        """A block to its row, uint8 [block_bytes]: vectors, then scales; by layer, K or V, head, position."""
        for part, begin, end in zip(self._parts, [0, *self._ends], self._ends, strict=False):
            source = part[:, :, block]
            row[begin:end].view(part.dtype).reshape(source.shape)[:] = source

    def copy_in(self, block: int, row: NDArray[np.uint8]) -> None:
        """The reverse of `copy_out`."""
        for part, begin, end in zip(self._parts, [0, *self._ends], self._ends, strict=False):
            target = part[:, :, block]
            target[:] = row[begin:end].view(part.dtype).reshape(target.shape)


def host_inputs(layout: KVLayout, rows: NDArray[np.uint8]) -> dict[str, Array]:
    """Host memory of the global pool, uint8 [slots, block_bytes], as the graph's inputs, in place.

    float32: a row is one head's block of K or V. int8: the same bytes twice, as codes and as scales, cut so
    that a row is the scales of one head's block, and its codes are head_dim / 4 rows.
    """
    if layout.dtype == "int8":
        scales = rows.reshape(-1, layout.block_tokens * 4)
        return {"host": scales.view(np.int8), "host_scale": scales.view(np.float32)}
    return {"host": rows.reshape(-1, layout.block_tokens * layout.head_dim * 4).view(np.float32)}


def host_rows(layout: KVLayout, slots: NDArray[np.int64]) -> dict[str, Array]:
    """Rows of these inputs where K of the first layer is, for each head of each slot: [1, kv_heads, rows]."""
    matrices = 2 * layout.global_layers * layout.kv_heads
    heads = np.arange(layout.kv_heads)[:, None]
    if layout.dtype == "int8":
        a_matrix = layout.head_dim // 4
        first = slots * (matrices * (a_matrix + 1))
        codes = (first + heads * a_matrix)[..., None] + np.arange(a_matrix)
        scales = first + matrices * a_matrix + heads
        return {"host_rows": codes.reshape(1, layout.kv_heads, -1), "host_rows_scale": scales[None]}
    return {"host_rows": (slots * matrices + heads)[None]}
