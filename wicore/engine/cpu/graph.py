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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from wicore.engine.cpu.weights import LayerWeights, Linear, QuantizedLinear
from wicore.gemma3.config import Gemma3Config

_MS = "com.microsoft"
_OPSET = 20
_SMALL_BYTES = 1024


@dataclass
class Graph:
    """An ONNX graph under construction; large weights stay outside the protobuf as `external`."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    external: dict[str, NDArray[Any]] = field(default_factory=dict)
    _count: int = 0
    _ints: dict[tuple[int, ...], str] = field(default_factory=dict)

    def name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def weight(self, array: NDArray[Any], stem: str = "w") -> str:
        name = self.name(stem)
        array = np.ascontiguousarray(array)
        if array.nbytes <= _SMALL_BYTES:
            self.initializers.append(numpy_helper.from_array(array, name))
            return name
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        entry = tensor.external_data.add()
        # The location is never opened: the session is given the array itself under this name.
        entry.key, entry.value = "location", "in-memory"
        self.initializers.append(tensor)
        self.external[name] = array
        return name

    def ints(self, *values: int) -> str:
        if values not in self._ints:
            self._ints[values] = self.weight(np.array(values, np.int64), "ints")
        return self._ints[values]

    def op(
        self, kind: str, inputs: Sequence[str], *, domain: str = "", out: str | None = None, **attrs: Any
    ) -> str:
        name = out or self.name(kind.lower())
        self.nodes.append(helper.make_node(kind, list(inputs), [name], domain=domain, **attrs))
        return name

    def choose(self, condition: str, then: Callable[[], str], otherwise: Callable[[], str]) -> str:
        """What one of two branches gives, a float32 tensor; only the nodes of that one run."""
        branches = {"then_branch": self._branch(then), "else_branch": self._branch(otherwise)}
        return self.op("If", [condition], **branches)

    def _branch(self, build: Callable[[], str]) -> onnx.GraphProto:
        outside, self.nodes = self.nodes, []
        result = helper.make_tensor_value_info(build(), TensorProto.FLOAT, None)
        branch = helper.make_graph(self.nodes, self.name("branch"), [], [result])
        self.nodes = outside
        return branch

    def split(self, x: str, sizes: Sequence[int]) -> list[str]:
        names = [self.name("part") for _ in sizes]
        self.nodes.append(helper.make_node("Split", [x, self.ints(*sizes)], names, axis=-1))
        return names

    def norm(self, x: str, weight: NDArray[np.float32], eps: float) -> str:
        return self.op("SimplifiedLayerNormalization", [x, self.weight(weight, "norm")], axis=-1, epsilon=eps)

    def add_and_norm(self, x: str, delta: str, weight: NDArray[np.float32], eps: float) -> tuple[str, str]:
        """(x + delta, its norm) in one pass over memory."""
        total, normed = self.name("residual"), self.name("norm")
        node = helper.make_node(
            "SkipSimplifiedLayerNormalization",
            [x, delta, self.weight(weight, "norm")],
            [normed, "", "", total],
            domain=_MS,
            epsilon=eps,
        )
        self.nodes.append(node)
        return total, normed

    def linear(self, x: str, w: Linear, *, refined: bool = False) -> str:
        """x @ w for x [1, N, in]. `refined` feeds a quantised matrix more than 8 bits of x."""
        if not isinstance(w, QuantizedLinear):
            return self.op("MatMul", [x, self.weight(w.matrix, "matrix")])
        rows = self._with_remainder(x, w) if refined else x
        # accuracy_level 4 quantises the input rows to 8 bits too, row by row, and is the mode whose
        # rows are bitwise independent of how many there are.
        y = self.op(
            "MatMulNBits",
            [rows, self.weight(w.codes, "codes"), self.weight(w.scales, "scales")],
            domain=_MS,
            K=w.in_features,
            N=w.out_features,
            bits=8,
            block_size=w.group,
            accuracy_level=4,
        )
        if not refined:
            return y
        halves = self.op("Reshape", [y, self.ints(2, -1, w.out_features)])
        return self.op("ReduceSum", [halves, self.ints(0)], keepdims=1)

    def _with_remainder(self, x: str, w: QuantizedLinear) -> str:
        """[1, N, in] -> [1, 2 N, in]: the rows, then what rounding each group to 8 bits takes off them.

        The kernel rounds the first half exactly so, and the second half is small: the sum of both
        products has about 16 bits of x in it. On one or few rows it is nearly free, as reading the
        weights takes the time.
        """
        groups = self.op("Reshape", [x, self.ints(-1, w.in_features // w.group, w.group)])
        largest = self.op("ReduceMax", [self.op("Abs", [groups]), self.ints(-1)], keepdims=1)
        scale = self.op("Mul", [largest, self.weight(np.array(1 / 127, np.float32))])
        scale = self.op("Max", [scale, self.weight(np.array(1e-20, np.float32))])  # a group of zeros has none
        rounded = self.op("Mul", [self.op("Round", [self.op("Div", [groups, scale])]), scale])
        both = self.op("Concat", [groups, self.op("Sub", [groups, rounded])], axis=0)
        return self.op("Reshape", [both, self.ints(1, -1, w.in_features)])

    def session(self, name: str, threads: int) -> ort.InferenceSession:
        """The graph, compiled for this CPU."""
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initializers)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid(_MS, 1)],
            ir_version=9,
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Shapes change from step to step, so a remembered allocation pattern would only hold memory.
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.use_env_allocators", "1")
        _register_arena()
        # Between runs the cores belong to the queue threads and to the other processes of the host.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in self.external.values()]
        options.add_external_initializers(list(self.external), values)
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@cache
def _register_arena() -> None:
    """One allocator for every session of the process: what the stack has freed serves the head, too."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    by_powers_of_two = 0
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, by_powers_of_two, -1, -1))


def build_body(
    config: Gemma3Config, layers: Sequence[LayerWeights], final_norm: NDArray[np.float32]
) -> Graph:
    """The decoder stack.

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
        host_blocks   int64 [1, kv_heads, streamed blocks], rows of `host`: K of the first global layer
        host          float32 [slots * global layers * 2 * kv_heads, block_tokens, head_dim], host memory
        k_i, v_i      float32 [blocks * kv_heads, block_tokens, head_dim], the pool, one pair a layer
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
    g.input("streamed", TensorProto.BOOL, [])
    g.input("host_blocks", i64, [1, kv, "streamed blocks"])
    g.input("host", f32, ["slots*layers*2*kv", "bs", hd])
    attention = {kind: _Attention(g, config, kind) for kind in dict.fromkeys(config.layer_kinds)}
    scale = np.float32(config.query_pre_attn_scalar**-0.5)
    mass: list[str] = []
    normed = g.norm(x, layers[0].input_norm, eps)
    following = [*(layer.input_norm for layer in layers[1:]), final_norm]
    for i, (layer, next_norm) in enumerate(zip(layers, following, strict=True)):
        attend = attention[config.layer_kinds[i]]
        q, k, v = g.split(g.linear(normed, layer.qkv), (heads * hd, kv * hd, kv * hd))
        q = attend.norm_and_rotate(q, heads, layer.q_norm * scale)
        k = attend.norm_and_rotate(k, kv, layer.k_norm)
        out, layer_mass = attend(i, q, k, v)
        mass += [layer_mass] if attend.kind == "global" else []
        out = g.norm(g.linear(out, layer.out), layer.post_attention_norm, eps)
        x, normed = g.add_and_norm(x, out, layer.pre_mlp_norm, eps)
        gate = g.op("FastGelu", [g.linear(normed, layer.gate)], domain=_MS)
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

    def __init__(self, g: Graph, config: Gemma3Config, kind: str) -> None:
        self.g, self.kind = g, kind
        self.heads, self.kv, self.width = config.heads, config.kv_heads, config.head_dim
        self.group, self.eps = config.heads // config.kv_heads, config.rms_norm_eps
        f32, i64 = TensorProto.FLOAT, TensorProto.INT64
        self.cos = g.input(f"cos_{kind}", f32, ["N", self.width // 2])
        self.sin = g.input(f"sin_{kind}", f32, ["N", self.width // 2])
        self.blocks = g.input(f"blocks_{kind}", i64, ["B", self.kv, f"blocks_{kind}"])
        self.slots = g.input(f"slots_{kind}", i64, ["N", self.kv, 1, 2])
        self.mask = g.input(f"mask_{kind}", f32, ["B", 1, "S*group", f"T_{kind}"])
        self.in_host = 0
        """Where in host memory a block's matrix for the next K or V starts, in rows."""
        batch = g.op("Shape", [self.blocks], start=0, end=1)

        def shape(*parts: str) -> str:
            return g.op("Concat", [batch, *parts], axis=0)

        self.grouped = shape(g.ints(-1, self.kv, self.group, self.width))
        self.by_head = shape(g.ints(self.kv, -1, self.width))
        self.ungrouped = shape(g.ints(self.kv, -1, self.group, self.width))

    def norm_and_rotate(self, x: str, heads: int, weight: NDArray[np.float32]) -> str:
        """Norm each head of [1, N, heads * head_dim] and apply RoPE: [N, heads, 1, head_dim].

        To the operator each token is a batch of its own, of sequence length 1.
        """
        g = self.g
        x = g.norm(g.op("Reshape", [x, g.ints(-1, heads, 1, self.width)]), weight, self.eps)
        return g.op("RotaryEmbedding", [x, "positions", self.cos, self.sin], domain=_MS, interleaved=0)

    def __call__(self, layer: int, q: str, k: str, v: str) -> tuple[str, str]:
        """(output [1, N, heads * head_dim], mass [B, T], "" for window layers) of layer `layer`."""
        g = self.g
        v = g.op("Reshape", [v, g.ints(-1, self.kv, 1, self.width)])
        keys, values = self._span(f"k_{layer}", k), self._span(f"v_{layer}", v)
        if self.kv > 1:  # with one KV head the transposed axis has length 1
            q = g.op("Transpose", [g.op("Reshape", [q, self.grouped])], perm=[0, 2, 1, 3, 4])
        q = g.op("Reshape", [q, self.by_head])
        scores = g.op("FusedMatMul", [q, keys], domain=_MS, transB=1)
        weights = g.op("Softmax", [g.op("Add", [scores, self.mask])], axis=-1)
        out = g.op("MatMul", [weights, values])
        if self.kv > 1:
            out = g.op("Transpose", [g.op("Reshape", [out, self.ungrouped])], perm=[0, 2, 1, 3, 4])
        out = g.op("Reshape", [out, g.ints(1, -1, self.heads * self.width)])
        mass = g.op("ReduceSum", [weights, g.ints(1, 2)], keepdims=0) if self.kind == "global" else ""
        return out, mass

    def _span(self, pool: str, new: str) -> str:
        """Write `new` [N, kv_heads, 1, width] into the pool, gather the span: [B, kv_heads, T, width]."""
        g = self.g
        shape: tuple[str, str, int] = ("blocks*kv", "bs", self.width)
        g.input(pool, TensorProto.FLOAT, shape)
        g.output(f"{pool}_out", TensorProto.FLOAT, shape)
        written = g.op("ScatterND", [pool, self.slots, new], out=f"{pool}_out")
        if self.kind == "window":
            span = g.op("Gather", [written, self.blocks], axis=0)
        else:
            span = self._streamed_or_not(written)
        return g.op("Reshape", [span, self.by_head])

    def _streamed_or_not(self, pool: str) -> str:
        """Gather the span [B, kv_heads, blocks, bs, width], its first blocks from host memory where streamed.

        The array is the same in both cases, so whatever follows computes the same to the bit.
        """
        g, start = self.g, self.in_host
        self.in_host += self.kv

        def streamed() -> str:
            rows = g.op("Add", ["host_blocks", g.ints(start)])
            parts = [g.op("Gather", ["host", rows], axis=0), g.op("Gather", [pool, self.blocks], axis=0)]
            return g.op("Concat", parts, axis=2)

        return g.choose("streamed", streamed, lambda: g.op("Gather", [pool, self.blocks], axis=0))
