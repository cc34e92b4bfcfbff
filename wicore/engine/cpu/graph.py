"""Gemma 3 as two ONNX graphs, built in code.

`build_body` is the decoder stack: embeddings in, final-normed hidden rows out, with paged KV blocks as
inputs. `build_head` turns hidden rows into logits. They are apart so that a step that runs the stack
several times (a decode batch and some prompt chunks) reads the head's weights once.

Attention over paged KV, for a batch of B sequences with S new tokens each:
    Gather the blocks of the sequence's span, ScatterND the new K (or V) into it, then plain
    softmax(q k^T + mask) v. The span starts and ends at fixed multiples of absolute position (see
    `engine.py`), so a key's place in every sum depends on its position only, never on the chunking or
    on who shares the batch. That is what makes the text batch-invariant.

Numerics: facts of Gemma 3 as in transformers' modeling_gemma3 (norms times 1 + w in float32, GeGLU with
tanh, query scale query_pre_attn_scalar ** -0.5, RoPE by halves). The query scale is folded into the query
norm's weight. `SimplifiedLayerNormalization`, `FusedMatMul`, `RotaryEmbedding`, `FastGelu` and
`MatMulNBits` are ONNX Runtime's contributed operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from wicore.engine.cpu.onnx_graph import MS, Graph
from wicore.engine.cpu.pool import KVFormat
from wicore.engine.cpu.storage import Storage
from wicore.engine.cpu.weights import LayerWeights, Linear
from wicore.engine.folding import fold_attention_norms
from wicore.gemma3.config import Gemma3Config


def build_body(
    config: Gemma3Config, layers: Sequence[LayerWeights], final_norm: NDArray[np.float32], form: KVFormat
) -> Graph:
    """The decoder stack, with KV stored in `form`.

    Inputs (B sequences, S new tokens each, N = B * S; T positions of span, per pool P in {global, window}):
        x             float32 [1, N, hidden], embeddings times sqrt(hidden)
        rows          int64 [R], which of the N to return
        positions     int64 [N, 1], rows of the RoPE tables: 0 .. N - 1
        cos_P, sin_P  float32 [N, head_dim / 2]
        blocks_P      int64 [B, kv_heads, T / block_tokens], rows of the flattened pool; in the global pool
                      only those after the streamed blocks
        slots_P       int64 [N, kv_heads, 1, 2], row of the flattened pool and offset in its block that each
                      new K and V goes to
        mask_P        float32 [B, 1, S * heads / kv_heads, T], 0 or a large negative
        streamed      bool [], whether the span's first blocks come from host memory; B is then 1
        host, host_rows     host memory of the global pool and which of its rows the streamed blocks are;
                      see `pool.host_inputs` and `pool.host_rows`
        k_i, v_i      [blocks * kv_heads, block_tokens, head_dim], the pool, one pair a layer
        *_scale       the same again for the scales of int8 KV
    Outputs:
        hidden        float32 [R, hidden]
        mass          float32 [B, T_global], attention summed over heads, queries and global layers
        k_i_out, v_i_out    the pool with the new rows in it; bind them to the memory of k_i, v_i, and
                      ScatterND writes only those rows
    """
    g = Graph()
    f32, i64 = TensorProto.FLOAT, TensorProto.INT64
    heads, kv, hd, eps = config.heads, config.kv_heads, config.head_dim, config.rms_norm_eps
    x = g.input("x", f32, [1, "N", config.hidden_size])
    g.input("rows", i64, ["R"])
    g.input("positions", i64, ["N", 1])
    attention = {kind: _Attention(g, config, kind, form) for kind in dict.fromkeys(config.layer_kinds)}
    mass: list[str] = []
    normed = g.norm(x, layers[0].input_norm, eps)
    following = [*(layer.input_norm for layer in layers[1:]), final_norm]
    for i, (layer, next_norm) in enumerate(zip(layers, following, strict=True)):
        attend = attention[config.layer_kinds[i]]
        q, k, v = g.split(g.linear(normed, layer.qkv), (heads * hd, kv * hd, kv * hd))
        q_norm, k_norm = fold_attention_norms(
            layer.q_norm, layer.k_norm, config.query_pre_attn_scalar, int8_kv=form == "int8"
        )
        q = attend.norm_and_rotate(q, heads, q_norm)
        k = attend.norm_and_rotate(k, kv, k_norm)
        out, layer_mass = attend(i, q, k, v)
        mass += [layer_mass] if attend.kind == "global" else []
        out = g.norm(g.linear(out, layer.out), layer.post_attention_norm, eps)
        x, normed = g.add_and_norm(x, out, layer.pre_mlp_norm, eps)
        gate = g.op("FastGelu", [g.linear(normed, layer.gate)], domain=MS)
        out = g.linear(g.op("Mul", [gate, g.linear(normed, layer.up)]), layer.down)
        x, normed = g.add_and_norm(x, g.norm(out, layer.post_mlp_norm, eps), next_norm, eps)
    normed = g.op("Reshape", [normed, g.ints(-1, config.hidden_size)])
    g.op("Gather", [normed, "rows"], out="hidden", axis=0)
    g.output("hidden", f32, ["R", config.hidden_size])
    g.op("Sum", mass, out="mass")
    g.output("mass", f32, ["B", "T_global"])
    return g


def build_head(config: Gemma3Config, head: Linear) -> Graph:
    """hidden float32 [1, R, hidden] -> logits float32 [1, R, vocab]."""
    g = Graph()
    x = g.input("hidden", TensorProto.FLOAT, [1, "R", config.hidden_size])
    g.linear(x, head, refined=True)
    g.nodes[-1].output[0] = "logits"
    g.output("logits", TensorProto.FLOAT, [1, "R", config.vocab_size])
    return g


class _Attention:
    """The attention of one kind of layer, with the inputs and shapes that its layers share."""

    def __init__(self, g: Graph, config: Gemma3Config, kind: str, form: KVFormat) -> None:
        self.g, self.kind = g, kind
        self.heads, self.kv, self.width = config.heads, config.kv_heads, config.head_dim
        self.group, self.eps = config.heads // config.kv_heads, config.rms_norm_eps
        f32 = TensorProto.FLOAT
        self.cos = g.input(f"cos_{kind}", f32, ["N", self.width // 2])
        self.sin = g.input(f"sin_{kind}", f32, ["N", self.width // 2])
        self.mask = g.input(f"mask_{kind}", f32, ["B", 1, "S*group", f"T_{kind}"])
        self.store = Storage(g, kind, form, self.kv, self.width)
        self.by_head = self.store.by_head
        self.grouped = self.store.shape(-1, self.kv, self.group, self.width)
        self.ungrouped = self.store.shape(self.kv, -1, self.group, self.width)

    def norm_and_rotate(self, x: str, heads: int, weight: NDArray[np.float32]) -> str:
        """Norm each head of [1, N, heads * head_dim] and apply RoPE: [N, heads, 1, head_dim].

        To the operator each token is a batch of its own, of sequence length 1.
        """
        g = self.g
        x = g.norm(g.op("Reshape", [x, g.ints(-1, heads, 1, self.width)]), weight, self.eps)
        return g.op("RotaryEmbedding", [x, "positions", self.cos, self.sin], domain=MS, interleaved=0)

    def __call__(self, layer: int, q: str, k: str, v: str) -> tuple[str, str]:
        """(output [1, N, heads * head_dim], mass [B, T], "" for window layers) of layer `layer`."""
        g = self.g
        v = g.op("Reshape", [v, g.ints(-1, self.kv, 1, self.width)])
        keys, values = self.store(f"k_{layer}", k), self.store(f"v_{layer}", v)
        if self.kv > 1:  # with one KV head the transposed axis has length 1
            q = g.op("Transpose", [g.op("Reshape", [q, self.grouped])], perm=[0, 2, 1, 3, 4])
        q = g.op("Reshape", [q, self.by_head])
        scores = g.op("FusedMatMul", [q, keys], domain=MS, transB=1)
        weights = g.op("Softmax", [g.op("Add", [scores, self.mask])], axis=-1)
        out = g.op("MatMul", [weights, values])
        if self.kv > 1:
            out = g.op("Transpose", [g.op("Reshape", [out, self.ungrouped])], perm=[0, 2, 1, 3, 4])
        out = g.op("Reshape", [out, g.ints(1, -1, self.heads * self.width)])
        mass = g.op("ReduceSum", [weights, g.ints(1, 2)], keepdims=0) if self.kind == "global" else ""
        return out, mass
