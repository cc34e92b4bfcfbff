"""The networks of a vision tower (SigLIP, Zhai et al., 2023, arXiv:2303.15343) and of Gemma 3's projector.

As the text model's (networks.py) they have no weight in them, and one serves every layer:

    vision_first      patches -> embedding, first norm, first QKV product
    vision_attention  QKV -> attention of a block of patches to all of them
    vision_middle     attention output -> rest of the layer, the next layer's norm and QKV product
    vision_last       as vision_middle, but ends with the last norm, the pooling, the projector

A tower always has the same patches, so every shape is fixed. Attention is a network of its own, run block by
block of the patches that ask: its scores never take more than a block's memory.

Numbers are those of networks.py: the residual stream, norms, GELU and softmax float32, products 16 bits. Here
no norm follows out_proj and fc2, whose products are added to the residual stream: their inputs are scaled by
`2 ** EXPONENT`, lest the products overflow, and these scaled back in float32.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, get_args

from wicore.engine.tensorrt.networks import EXPONENT, HALF_MAX, Binding, Ops, Tensor, gelu

if TYPE_CHECKING:
    from wicore.gemma3.config import Gemma3Config

VisionKind = Literal["vision_first", "vision_attention", "vision_middle", "vision_last"]

VISION_KINDS: tuple[VisionKind, ...] = get_args(VisionKind)
_BLOCK = 256
"""Most patches of an attention block: with 4,096 patches and 16 heads the scores take 64 MiB, as float32."""


@dataclass(frozen=True, slots=True)
class VisionShape:
    """What of a tower the networks depend on."""

    hidden: int
    inner: int
    heads: int
    patches: int
    patch: int
    """Elements of a patch: channels * side * side."""
    tokens: int
    out: int
    """Width of the text model."""
    eps: float
    """Of every norm."""

    @classmethod
    def of(cls, config: Gemma3Config) -> VisionShape:
        """Raises ValueError for a model without a tower."""
        vision = config.vision
        if vision is None:
            raise ValueError("config: has no vision tower")
        return cls(
            hidden=vision.hidden_size,
            inner=vision.intermediate_size,
            heads=vision.heads,
            patches=(vision.image_size // vision.patch_size) ** 2,
            patch=3 * vision.patch_size**2,
            tokens=vision.tokens,
            out=config.hidden_size,
            eps=vision.layer_norm_eps,
        )

    @property
    def block(self) -> int:
        """Patches of an attention block: they are cut into equal ones."""
        return next(size for size in range(min(_BLOCK, self.patches), 0, -1) if self.patches % size == 0)

    def rows(self, kind: VisionKind) -> int:
        """Patches of a run."""
        return self.block if kind == "vision_attention" else self.patches

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def bindings(kind: VisionKind, shape: VisionShape) -> tuple[Binding, ...]:
    """What must be bound to run a network, inputs first.

    Matrices are [out][in] as checkpoints store them, but `projection`, which is [in][out]; vectors are of one
    row, float32; `soft_norm` holds 1 + w. `qkv` has the rows of q, then k, then v. `queries` is the block's
    stretch of `qkv`. `residual_out` may not be the memory of `residual`.
    """
    hidden, patches, wide = shape.hidden, shape.patches, 3 * shape.hidden
    if kind == "vision_attention":
        return (
            Binding("queries", "half", (shape.block, wide)),
            Binding("qkv", "half", (patches, wide)),
            Binding("attended", "half", (shape.block, hidden), output=True),
        )
    norm = _vectors(hidden, "norm_weight", "norm_bias")
    qkv = (Binding("qkv_weight", "half", (wide, hidden)), *_vectors(wide, "qkv_bias"))
    results = (
        Binding("residual_out", "float32", (patches, hidden), output=True),
        Binding("qkv", "half", (patches, wide), output=True),
    )
    if kind == "vision_first":
        return (
            Binding("patches", "half", (patches, shape.patch)),
            Binding("patch_weight", "half", (hidden, shape.patch)),
            *_vectors(hidden, "patch_bias"),
            Binding("positions", "half", (patches, hidden)),
            *(*norm, *qkv, *results),
        )
    layer = (
        Binding("attended", "half", (patches, hidden)),
        Binding("residual", "float32", (patches, hidden)),
        Binding("out", "half", (hidden, hidden)),
        *_vectors(hidden, "out_bias", "mlp_norm_weight", "mlp_norm_bias"),
        Binding("fc1", "half", (shape.inner, hidden)),
        *_vectors(shape.inner, "fc1_bias"),
        Binding("fc2", "half", (hidden, shape.inner)),
        *_vectors(hidden, "fc2_bias"),
        *norm,
    )
    if kind == "vision_middle":
        return (*layer, *qkv, *results)
    return (
        *layer,
        *_vectors(hidden, "soft_norm"),
        Binding("projection", "half", (hidden, shape.out)),
        Binding("rows", "float32", (shape.tokens, shape.out), output=True),
    )


def _vectors(size: int, *names: str) -> tuple[Binding, ...]:
    return tuple(Binding(name, "float32", (1, size)) for name in names)


def flops(shape: VisionShape, layers: int) -> int:
    """Multiplications and additions of an image's matrix products, attention's among them."""
    s = shape
    layer = 4 * s.hidden**2 + 2 * s.hidden * s.inner + 2 * s.patches * s.hidden
    return 2 * (s.patches * (s.patch * s.hidden + layers * layer) + s.tokens * s.hidden * s.out)


def define(kind: VisionKind, shape: VisionShape, ops: Ops[Tensor]) -> None:
    """Describe the network of `kind` to `ops`: its inputs, its operations, its outputs."""
    network = _Network(kind, shape, ops)
    {
        "vision_first": network.first,
        "vision_attention": network.attention,
        "vision_middle": network.middle,
        "vision_last": network.last,
    }[kind]()


class _Network(Generic[Tensor]):
    """One network being described."""

    def __init__(self, kind: VisionKind, shape: VisionShape, ops: Ops[Tensor]) -> None:
        self._ops, self._shape = ops, shape
        self._bindings = {binding.name: binding for binding in bindings(kind, shape)}
        self._inputs = {b.name: ops.input(b) for b in self._bindings.values() if not b.output}

    def first(self) -> None:
        ops, given = self._ops, self._inputs
        embedded = self._product(given["patches"], "patch_weight", "patch_bias")
        self._next(ops.add(embedded, ops.widen(given["positions"])))

    def attention(self) -> None:
        ops, s = self._ops, self._shape
        asking = ops.widen(ops.columns(self._inputs["queries"], 0, s.hidden))
        scaled = ops.narrow(ops.multiply(asking, ops.constant((s.hidden // s.heads) ** -0.5)))
        queries = ops.heads(scaled, s.heads)
        keys, values = (
            ops.heads(ops.columns(self._inputs["qkv"], first, s.hidden), s.heads)
            for first in (s.hidden, 2 * s.hidden)
        )
        shares = ops.softmax(ops.widen(ops.product(queries, keys)))
        attended = ops.product(ops.narrow(shares), values, transposed=False)
        self._output("attended", ops.joined(attended))

    def middle(self) -> None:
        self._next(self._layer())

    def last(self) -> None:
        ops, s, given = self._ops, self._shape, self._inputs
        normed = self._norm(self._layer(), "norm")
        side = math.isqrt(s.tokens)
        pooled = ops.pool(normed, side, math.isqrt(s.patches) // side)
        rms = ops.root(ops.add(ops.mean(ops.multiply(pooled, pooled)), ops.constant(s.eps)))
        soft = ops.multiply(ops.divide(pooled, rms), given["soft_norm"])
        scaled = ops.narrow(ops.multiply(soft, ops.constant(2.0**EXPONENT)))
        rows = ops.widen(ops.product(scaled, given["projection"], transposed=False))
        self._output("rows", ops.multiply(rows, ops.constant(2.0**-EXPONENT)))

    def _next(self, residual: Tensor) -> None:
        normed = self._ops.narrow(self._norm(residual, "norm"))
        self._output("residual_out", residual)
        self._output("qkv", self._ops.narrow(self._product(normed, "qkv_weight", "qkv_bias")))

    def _layer(self) -> Tensor:
        """The residual stream after the rest of a layer: out_proj, the MLP and its norm."""
        ops, given = self._ops, self._inputs
        residual = ops.add(given["residual"], self._delta(ops.widen(given["attended"]), "out"))
        normed = ops.narrow(self._norm(residual, "mlp_norm"))
        act = gelu(ops, self._product(normed, "fc1", "fc1_bias"))
        return ops.add(residual, self._delta(act, "fc2"))

    def _delta(self, x: Tensor, name: str) -> Tensor:
        """What is added to the residual stream: the product of wide x, and its bias."""
        ops = self._ops
        scaled = ops.narrow(ops.multiply(x, ops.constant(2.0**EXPONENT)))
        product = ops.clip(ops.widen(ops.product(scaled, self._inputs[name])), HALF_MAX)
        return ops.add(ops.multiply(product, ops.constant(2.0**-EXPONENT)), self._inputs[f"{name}_bias"])

    def _product(self, x: Tensor, weight: str, bias: str) -> Tensor:
        """Narrow x times a weight, plus a bias: wide, within what narrow holds."""
        ops = self._ops
        product = ops.widen(ops.product(x, self._inputs[weight]))
        return ops.clip(ops.add(product, self._inputs[bias]), HALF_MAX)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """LayerNorm (Ba et al., 2016, arXiv:1607.06450)."""
        ops, given = self._ops, self._inputs
        centred = ops.add(x, ops.multiply(ops.mean(x), ops.constant(-1.0)))
        deviation = ops.root(ops.add(ops.mean(ops.multiply(centred, centred)), ops.constant(self._shape.eps)))
        scaled = ops.multiply(ops.divide(centred, deviation), given[f"{name}_weight"])
        return ops.add(scaled, given[f"{name}_bias"])

    def _output(self, name: str, value: Tensor) -> None:
        self._ops.output(self._bindings[name], value)
