"""Everything of a layer but its attention, by our own kernels or by TensorRT's segments.

A body takes the rows of a pass from their embedding to the first QKV product (`first`), and then from each
layer's attention output to the next layer's QKV product, or after the last layer to the final norm (`after`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from wicore.engine.tensorrt.device import Stream
from wicore.engine.tensorrt.image_rows import ImageUpload, PlacedRows
from wicore.engine.tensorrt.networks import Kind
from wicore.engine.tensorrt.norms import Norms
from wicore.engine.tensorrt.segments import Segments
from wicore.engine.tensorrt.weights import DeviceWeights
from wicore.engine.tensorrt.work_buffers import WorkBuffers
from wicore.gemma3.config import Gemma3Config

DOWN_EXPONENT = -6
"""The activation between gate and down is scaled by 2 to this power, lest it overflow 16 bits."""
OUT_EXPONENT = -6
"""So is what o_proj gives, where that is half."""


class Matmul(Protocol):
    """Products with a weight matrix, half [out, in]; activations half, sums float32. Addresses are ints."""

    def plain(
        self, stream: Stream, rows: int, x: int, w: int, y: int, n: int, k: int, half_out: bool
    ) -> None:
        """y [rows, n] = x [rows, k] w', y half or float32."""

    def delta(self, stream: Stream, rows: int, x: int, w: int, y: int, n: int, k: int, exponent: int) -> bool:
        """y [rows, n] = x [rows, k] w', for a norm to read. True: half, times 2 ** exponent and saturated;
        False: float32, as it is."""

    def glu(self, stream: Stream, rows: int, x: int, gate_up: int, y: int, inner: int, k: int) -> None:
        """y [rows, inner] = gelu(x gate') * (x up') * 2 ** DOWN_EXPONENT, half."""


class Body(Protocol):
    """The layers without attention. Reads and writes `WorkBuffers`; only enqueues."""

    def first(self, stream: Stream, rows: int, ids: int, images: Sequence[PlacedRows] = ()) -> None:
        """Token ids to the residual stream and layer 0's qkv; images stand in place of embeddings."""

    def after(self, stream: Stream, rows: int, layer: int) -> None:
        """`attended` of a layer to the next one's qkv; of the last one to the final `normed`."""


class KernelBody:
    """By our own kernels."""

    def __init__(
        self,
        config: Gemma3Config,
        weights: DeviceWeights,
        buffers: WorkBuffers,
        norms: Norms,
        matmul: Matmul,
        images: ImageUpload,
    ) -> None:
        self._weights, self._buffers, self._norms, self._matmul = weights, buffers, norms, matmul
        self._images = images
        self._hidden, self._inner = config.hidden_size, config.intermediate_size
        self._wide = config.heads * config.head_dim
        self._qkv = self._wide + 2 * config.kv_heads * config.head_dim

    def first(self, stream: Stream, rows: int, ids: int, images: Sequence[PlacedRows] = ()) -> None:
        b, weights = self._buffers, self._weights
        layer = weights.layers[0]
        self._norms.embed(stream, rows, ids, weights.embedding, layer.input_norm, b.residual, b.normed)
        for row, _, values in images:
            self._place(stream, row, values)
        self._matmul.plain(stream, rows, b.normed, layer.qkv, b.qkv, self._qkv, self._hidden, True)

    def _place(self, stream: Stream, row: int, values: NDArray[np.float32]) -> None:
        """An image's rows into the residual stream, from `row` on, and normed."""
        b, hidden, norm = self._buffers, self._hidden, self._weights.layers[0].input_norm
        residual = b.residual + 4 * row * hidden
        self._images.send(stream, values, residual)
        self._norms.norm(stream, len(values), residual, norm, b.normed + 2 * row * hidden)

    def after(self, stream: Stream, rows: int, layer: int) -> None:
        b, layers, hidden = self._buffers, self._weights.layers, self._hidden
        here, following = layers[layer], layers[layer + 1] if layer + 1 < len(layers) else None
        half = self._matmul.delta(
            stream, rows, b.attended, here.out, b.delta, hidden, self._wide, OUT_EXPONENT
        )
        exponent, norms = OUT_EXPONENT if half else 0, (here.post_attention_norm, here.pre_mlp_norm)
        self._add(stream, rows, norms, exponent, half)
        self._matmul.glu(stream, rows, b.normed, here.gate_up, b.act, self._inner, hidden)
        half = self._matmul.delta(stream, rows, b.act, here.down, b.delta, hidden, self._inner, 0)
        norm = self._weights.final_norm if following is None else following.input_norm
        self._add(stream, rows, (here.post_mlp_norm, norm), DOWN_EXPONENT, half)
        if following is not None:
            self._matmul.plain(stream, rows, b.normed, following.qkv, b.qkv, self._qkv, hidden, True)

    def _add(
        self, stream: Stream, rows: int, norms: tuple[int, int], exponent: int, half_delta: bool
    ) -> None:
        """The delta through the first norm to the residual stream, and that through the second."""
        b, (post, following) = self._buffers, norms
        self._norms.add(
            stream, rows, b.delta, post, b.residual, following, b.normed, exponent, half_delta=half_delta
        )


class SegmentBody:
    """By TensorRT's segments: one network from a layer's attention to the next layer's."""

    def __init__(
        self,
        config: Gemma3Config,
        weights: DeviceWeights,
        buffers: WorkBuffers,
        segments: Segments,
        kernels: KernelBody,
    ) -> None:
        """`kernels`: what begins the passes that have images."""
        self._segments, self._buffers, self._kernels = segments, buffers, kernels
        first = weights.layers[0]
        self._first = {
            "table": weights.embedding,
            "norm": first.input_norm,
            "qkv_weight": first.qkv,
            "residual_out": buffers.residual,
            "qkv": buffers.qkv,
        }
        gate_bytes = 2 * config.intermediate_size * config.hidden_size
        self._layers: list[tuple[Kind, dict[str, int]]] = []
        streams = buffers.residual, buffers.other_residual
        for here, following in zip_longest(weights.layers, weights.layers[1:]):
            bound = {
                "attention": buffers.attended,
                "residual": streams[0],
                "o": here.out,
                "post_attention": here.post_attention_norm,
                "pre_mlp": here.pre_mlp_norm,
                "gate": here.gate_up,
                "up": here.gate_up + gate_bytes,
                "down": here.down,
                "post_mlp": here.post_mlp_norm,
            }
            # A segment writes the residual stream beside where it reads it.
            streams = streams[1], streams[0]
            if following is None:
                bound |= {"norm": weights.final_norm, "hidden": buffers.normed}
            else:
                bound |= {
                    "norm": following.input_norm,
                    "qkv_weight": following.qkv,
                    "residual_out": streams[0],
                    "qkv": buffers.qkv,
                }
            self._layers.append(("last" if following is None else "middle", bound))

    @property
    def max_rows(self) -> int:
        """Most rows that there are plans for."""
        return min(self._segments.max_rows(kind) for kind in ("first", "middle", "last"))

    def first(self, stream: Stream, rows: int, ids: int, images: Sequence[PlacedRows] = ()) -> None:
        if images:
            self._kernels.first(stream, rows, ids, images)
        else:
            self._segments.run(stream, "first", rows, {"ids": ids, **self._first})

    def after(self, stream: Stream, rows: int, layer: int) -> None:
        kind, bound = self._layers[layer]
        self._segments.run(stream, kind, rows, bound)
