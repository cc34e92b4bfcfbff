"""The segment networks: everything between two attention kernels, without a weight in it.

A segment takes its weights as inputs, so one small plan serves all layers: the caller binds another layer's
addresses before each run. Four kinds make a model:

    first   ids -> embedding, first norm, first QKV product
    middle  attention output -> o_proj, norms, MLP, the next layer's norm and QKV product
    last    as middle, but ends with the final norm
    head    normed rows -> logits

Numbers. The residual stream, norms and GELU are float32; products take and give 16 bits. float16 ends at
65,504, which the inputs of the two norms that follow o_proj and down_proj may exceed. RMSNorm does not change
when its input is scaled and its eps by the square of that: so both products' inputs are scaled by `2 **
EXPONENT`, and what is still out of range is clipped to the largest float16. The mathematics is Gemma 3's
(Gemma Team, 2025, arXiv:2503.19786): RMSNorm before and after attention and MLP, GeGLU with tanh, embeddings
times sqrt(hidden).

A network is defined once, against `Ops`. TensorRT builds it (trt_api.py); tests evaluate it in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, get_args

if TYPE_CHECKING:
    from wicore.gemma3.config import Gemma3Config

Kind = Literal["first", "middle", "last", "head"]
HalfType = Literal["float16", "bfloat16"]
ElementType = Literal["int32", "float32", "half"]

KINDS: tuple[Kind, ...] = get_args(Kind)
REVISION = 1
"""Part of every plan's key: to be raised whenever a network changes."""
EXPONENT = -6
"""The inputs of o_proj and down_proj are scaled by 2 to this power."""
HALF_MAX = 65_504.0
"""Largest finite float16."""
ROWS = -1
"""The dimension that varies from run to run."""
_HEAD_ROWS = 256
"""A row of logits is a megabyte: where a bucket allows it, the head is built for no more rows than this."""

Tensor = TypeVar("Tensor")


@dataclass(frozen=True, slots=True)
class SegmentShape:
    """What of a model the networks depend on."""

    hidden: int
    inner: int
    attention: int
    """Width of the attention output: heads * head_dim."""
    qkv: int
    """Rows of the fused projection: (heads + 2 * kv_heads) * head_dim."""
    vocab: int
    eps: float
    """Of every RMSNorm."""

    @classmethod
    def of(cls, config: Gemma3Config) -> SegmentShape:
        return cls(
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            attention=config.heads * config.head_dim,
            qkv=(config.heads + 2 * config.kv_heads) * config.head_dim,
            vocab=config.vocab_size,
            eps=config.rms_norm_eps,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Binding:
    """One input or output of a network, row-major and contiguous."""

    name: str
    dtype: ElementType
    """"half" is the plan's 16-bit type."""
    shape: tuple[int, ...]
    """Elements; ROWS where the rows of the run go."""
    output: bool = False

    @property
    def dynamic(self) -> bool:
        return ROWS in self.shape

    def sized(self, rows: int) -> tuple[int, ...]:
        """The shape for a run of `rows` rows."""
        return tuple(rows if size == ROWS else size for size in self.shape)

    def nbytes(self, rows: int) -> int:
        return math.prod(self.sized(rows)) * (2 if self.dtype == "half" else 4)


def bindings(kind: Kind, shape: SegmentShape) -> tuple[Binding, ...]:
    """What must be bound to run a segment, inputs first.

    Matrices are [out][in] as checkpoints store them; norm factors are float32 [1][hidden] and hold 1 + w.
    `gate` and `up` are the halves of the fused matrix: up begins `inner * hidden * 2` bytes after gate.
    `residual_out` may not be the memory of `residual`.
    """
    hidden = shape.hidden
    if kind == "first":
        return (
            Binding("ids", "int32", (ROWS,)),
            Binding("table", "half", (shape.vocab, hidden)),
            Binding("norm", "float32", (1, hidden)),
            Binding("qkv_weight", "half", (shape.qkv, hidden)),
            Binding("residual_out", "float32", (ROWS, hidden), output=True),
            Binding("qkv", "half", (ROWS, shape.qkv), output=True),
        )
    if kind == "head":
        return (
            Binding("hidden", "half", (ROWS, hidden)),
            Binding("table", "half", (shape.vocab, hidden)),
            Binding("logits", "float32", (ROWS, shape.vocab), output=True),
        )
    common = (
        Binding("attention", "half", (ROWS, shape.attention)),
        Binding("residual", "float32", (ROWS, hidden)),
        Binding("o", "half", (hidden, shape.attention)),
        Binding("post_attention", "float32", (1, hidden)),
        Binding("pre_mlp", "float32", (1, hidden)),
        Binding("gate", "half", (shape.inner, hidden)),
        Binding("up", "half", (shape.inner, hidden)),
        Binding("down", "half", (hidden, shape.inner)),
        Binding("post_mlp", "float32", (1, hidden)),
        Binding("norm", "float32", (1, hidden)),
    )
    if kind == "last":
        return (*common, Binding("hidden", "half", (ROWS, hidden), output=True))
    return (
        *common,
        Binding("qkv_weight", "half", (shape.qkv, hidden)),
        Binding("residual_out", "float32", (ROWS, hidden), output=True),
        Binding("qkv", "half", (ROWS, shape.qkv), output=True),
    )


def flops(kind: Kind, shape: SegmentShape, rows: int) -> int:
    """Multiplications and additions of a segment's matrix products."""
    matrices = [b for b in bindings(kind, shape) if b.dtype == "half" and not b.dynamic]
    if kind == "first":
        matrices = [b for b in matrices if b.name != "table"]  # looked up, not multiplied
    return 2 * rows * sum(math.prod(b.shape) for b in matrices)


def rows_of(kind: Kind, buckets: Sequence[int]) -> tuple[int, ...]:
    """The buckets that a kind is built for, ascending: all of them, but for the head the small ones."""
    ascending = sorted(set(buckets))
    if kind != "head":
        return tuple(ascending)
    return tuple(rows for rows in ascending if rows <= _HEAD_ROWS) or (ascending[0],)


class Ops(Protocol[Tensor]):
    """What the networks are made of. `wide` tensors are float32, `narrow` ones 16 bits; all have two
    dimensions but ids and heads, and element-wise operations broadcast and are of wide tensors only."""

    def input(self, binding: Binding) -> Tensor: ...

    def output(self, binding: Binding, value: Tensor) -> None: ...

    def constant(self, value: float) -> Tensor:
        """Wide [1, 1]."""

    def widen(self, x: Tensor) -> Tensor: ...

    def narrow(self, x: Tensor) -> Tensor: ...

    def add(self, a: Tensor, b: Tensor) -> Tensor: ...

    def multiply(self, a: Tensor, b: Tensor) -> Tensor: ...

    def divide(self, a: Tensor, b: Tensor) -> Tensor: ...

    def clip(self, x: Tensor, limit: float) -> Tensor:
        """To -limit .. limit."""

    def root(self, x: Tensor) -> Tensor: ...

    def tanh(self, x: Tensor) -> Tensor: ...

    def mean(self, x: Tensor) -> Tensor:
        """Over the last dimension, which becomes 1."""

    def product(self, x: Tensor, weight: Tensor, *, transposed: bool = True) -> Tensor:
        """x [M, K] times weight [N, K] transposed, or [K, N] as it is, narrow; of heads, head by head."""

    def gather(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows of a narrow table, narrow."""

    def columns(self, x: Tensor, first: int, count: int) -> Tensor:
        """Columns `first` to `first + count - 1` of a narrow x."""

    def heads(self, x: Tensor, count: int) -> Tensor:
        """Narrow [M, count * d] as [count, M, d]."""

    def joined(self, x: Tensor) -> Tensor:
        """The inverse of `heads`."""

    def softmax(self, x: Tensor) -> Tensor:
        """Of wide heads, over the last dimension."""

    def pool(self, x: Tensor, side: int, window: int) -> Tensor:
        """Means of squares of window * window cells of a grid with `side` of them a side, whose cells are the
        rows of wide x: [(side * window)^2, N] to [side^2, N], both row by row."""


def gelu(ops: Ops[Tensor], x: Tensor) -> Tensor:
    """GELU by tanh (Hendrycks and Gimpel, 2016, arXiv:1606.08415), of wide x."""
    cube = ops.multiply(ops.multiply(x, x), x)
    inside = ops.add(x, ops.multiply(cube, ops.constant(0.044715)))
    tanh = ops.tanh(ops.multiply(inside, ops.constant((2 / math.pi) ** 0.5)))
    return ops.multiply(ops.multiply(x, ops.constant(0.5)), ops.add(tanh, ops.constant(1.0)))


def define(kind: Kind, shape: SegmentShape, ops: Ops[Tensor]) -> None:
    """Describe the network of `kind` to `ops`: its inputs, its operations, its outputs."""
    segment = _Segment(kind, shape, ops)
    {"first": segment.first, "middle": segment.middle, "last": segment.last, "head": segment.head}[kind]()


class _Segment(Generic[Tensor]):
    """One network being described."""

    def __init__(self, kind: Kind, shape: SegmentShape, ops: Ops[Tensor]) -> None:
        self._ops = ops
        self._shape = shape
        self._bindings = {binding.name: binding for binding in bindings(kind, shape)}
        self._inputs = {b.name: ops.input(b) for b in self._bindings.values() if not b.output}

    def first(self) -> None:
        ops, given = self._ops, self._inputs
        rows = ops.widen(ops.gather(given["table"], given["ids"]))
        residual = ops.multiply(rows, ops.constant(self._shape.hidden**0.5))
        self._output("residual_out", residual)
        self._output("qkv", self._next_qkv(residual))

    def middle(self) -> None:
        residual = self._layer()
        self._output("residual_out", residual)
        self._output("qkv", self._next_qkv(residual))

    def last(self) -> None:
        self._output("hidden", self._ops.narrow(self._norm(self._layer(), "norm")))

    def head(self) -> None:
        logits = self._ops.product(self._inputs["hidden"], self._inputs["table"])
        self._output("logits", self._ops.widen(logits))

    def _layer(self) -> Tensor:
        """The residual stream after the rest of a layer: o_proj, MLP and the norms around them."""
        ops, given = self._ops, self._inputs
        scaled = ops.multiply(ops.widen(given["attention"]), ops.constant(2.0**EXPONENT))
        delta = self._delta(ops.narrow(scaled), "o")
        residual = ops.add(given["residual"], self._norm(delta, "post_attention", EXPONENT))
        normed = ops.narrow(self._norm(residual, "pre_mlp"))
        gate, up = (
            ops.clip(ops.widen(ops.product(normed, given[side])), HALF_MAX) for side in ("gate", "up")
        )
        act = ops.multiply(ops.multiply(gelu(ops, gate), up), ops.constant(2.0**EXPONENT))
        delta = self._delta(ops.narrow(ops.clip(act, HALF_MAX)), "down")
        return ops.add(residual, self._norm(delta, "post_mlp", EXPONENT))

    def _next_qkv(self, residual: Tensor) -> Tensor:
        normed = self._ops.narrow(self._norm(residual, "norm"))
        return self._ops.product(normed, self._inputs["qkv_weight"])

    def _delta(self, x: Tensor, weight: str) -> Tensor:
        """A product before its norm: an infinity there would make the whole row NaN."""
        return self._ops.clip(self._ops.widen(self._ops.product(x, self._inputs[weight])), HALF_MAX)

    def _norm(self, x: Tensor, factor: str, exponent: int = 0) -> Tensor:
        """RMSNorm of x, which is 2 ** exponent times what is meant."""
        ops = self._ops
        eps = ops.constant(self._shape.eps * 2.0 ** (2 * exponent))
        rms = ops.root(ops.add(ops.mean(ops.multiply(x, x)), eps))
        return ops.multiply(ops.divide(x, rms), self._inputs[factor])

    def _output(self, name: str, value: Tensor) -> None:
        self._ops.output(self._bindings[name], value)
