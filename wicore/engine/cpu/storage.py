"""How attention stores K and V and reads them again: the part of the graph between new rows and the span."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from wicore.engine.cpu.onnx_graph import Graph
from wicore.engine.cpu.pool import KVFormat


@dataclass(frozen=True)
class _Part:
    """An array that K or V is stored in: the vectors themselves, or 8-bit codes and their scales."""

    suffix: str
    """Of the names of its inputs."""
    dtype: int
    tail: tuple[int, ...]
    """Shape of what one head has at one position."""
    host_rows: int
    """Rows of the host input that one head's block of K or V takes."""
    span: str
    """Shape of the whole span: [B, kv_heads, T, *tail]."""


class Storage:
    """The KV of one kind of layer; K and V of each layer in turn.

    Where a span starts with streamed blocks, these are read from host memory. What follows sees the same
    array in both cases, and so computes the same to the bit.

    8 bits: each vector (K or V of one head at one position) has a scale of its own, its largest magnitude
    / 127. It depends on nothing else, so KV is the same however a prompt is cut, and never rounded twice.
    """

    def __init__(self, g: Graph, kind: str, form: KVFormat, kv_heads: int, width: int) -> None:
        self.g, self.kind, self.form, self.heads, self.width = g, kind, form, kv_heads, width
        self.blocks = g.input(f"blocks_{kind}", TensorProto.INT64, ["B", kv_heads, f"blocks_{kind}"])
        self.slots = g.input(f"slots_{kind}", TensorProto.INT64, ["N", kv_heads, 1, 2])
        self.batch = g.op("Shape", [self.blocks], start=0, end=1)
        self.by_head = self.shape(kv_heads, -1, width)
        if form == "int8":
            by_position = self.shape(kv_heads, -1)
            self._parts = [
                _Part("", TensorProto.INT8, (width,), width // 4, self.by_head),
                _Part("_scale", TensorProto.FLOAT, (), 1, by_position),
            ]
        else:
            self._parts = [_Part("", TensorProto.FLOAT, (width,), 1, self.by_head)]
        self._stored = 0
        """How many K and V came before the next in the order of a block's bytes."""
        if kind == "global":
            g.input("streamed", TensorProto.BOOL, [])
            for part in self._parts:
                g.input(f"host{part.suffix}", part.dtype, [f"host{part.suffix}", f"width{part.suffix}"])
                g.input(f"host_rows{part.suffix}", TensorProto.INT64, [1, kv_heads, f"rows{part.suffix}"])

    def shape(self, *parts: int) -> str:
        """[B, *parts]"""
        return self.g.op("Concat", [self.batch, self.g.ints(*parts)], axis=0)

    def __call__(self, name: str, new: str) -> str:
        """Write `new` [N, kv_heads, 1, width], read the span: [B, kv_heads, T, width]."""
        rows = self._rounded(new) if self.form == "int8" else [new]
        spans = [self._part(name, part, row) for part, row in zip(self._parts, rows, strict=True)]
        self._stored += 1
        vectors = self._exact(*spans) if self.form == "int8" else spans[0]
        return self.g.op("Reshape", [vectors, self.by_head])

    def _part(self, name: str, part: _Part, new: str) -> str:
        """Write new rows of one array, read its span: [B, kv_heads, T, *tail], or that cut into blocks."""
        g, name = self.g, name + part.suffix
        pool: tuple[int | str, ...] = ("blocks*kv", "bs", *part.tail)
        g.input(name, part.dtype, pool)
        g.output(f"{name}_out", part.dtype, pool)
        written = g.op("ScatterND", [name, self.slots, new], out=f"{name}_out")

        def resident() -> str:
            return g.op("Gather", [written, self.blocks], axis=0)

        if self.kind == "window":
            return resident()
        offset = g.ints(self._stored * self.heads * part.host_rows)

        def streamed() -> str:
            rows = g.op("Add", [f"host_rows{part.suffix}", offset])
            first = g.op("Gather", [f"host{part.suffix}", rows], axis=0)
            both = [g.op("Reshape", [blocks, part.span]) for blocks in (first, resident())]
            return g.op("Concat", both, axis=2)

        return g.choose("streamed", streamed, resident, part.dtype)

    def _rounded(self, new: str) -> list[str]:
        """8-bit codes [N, kv_heads, 1, width] and scales [N, kv_heads, 1] of new rows."""
        g = self.g
        largest = g.op("ReduceMax", [g.op("Abs", [new]), g.ints(-1)], keepdims=1)
        scale = g.op("Mul", [largest, g.weight(np.array(1 / 127, np.float32))])
        scale = g.op("Max", [scale, g.weight(np.array(1e-20, np.float32))])  # a vector of zeros has none
        codes = g.op("Cast", [g.op("Round", [g.op("Div", [new, scale])])], to=TensorProto.INT8)
        return [codes, g.op("Reshape", [scale, g.ints(-1, self.heads, 1)])]

    def _exact(self, codes: str, scales: str) -> str:
        """The vectors, float32 [all of them, width]."""
        g = self.g
        codes = g.op("Reshape", [codes, g.ints(-1, self.width)])
        return g.op("DequantizeLinear", [codes, g.op("Reshape", [scales, g.ints(-1)])], axis=0)
