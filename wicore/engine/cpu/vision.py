"""The vision tower on the CPU: SigLIP (Zhai et al., 2023, arXiv:2303.15343) and Gemma 3's projector.

Three graphs on ONNX Runtime, built in code: `build_first` from pixels to the residual stream, `build_layer`,
which runs once for each layer with that layer's weights as inputs, and `build_last` from the stream to rows.
As inputs, weights are in memory once, in the form they are kept in; constants ONNX Runtime would widen and
pack when a session is made.

Layers' matrices are half, widened just before their products, or float32; all that is computed is float32.

What is large never is whole. Attention, of every patch to all, is `MultiHeadAttention`, which goes tile by
tile (FlashAttention, Dao et al., 2022, arXiv:2205.14135): the scores of a layer would take 1 GB at the sizes
that Google published. The MLP takes some rows at a time.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from wicore.engine.cpu.memory import give_back_freed_memory, shrinking
from wicore.engine.cpu.onnx_graph import MS, Graph
from wicore.engine.plans import check_pixels
from wicore.errors import EngineError
from wicore.gemma3.checkpoint import Checkpoint
from wicore.gemma3.config import VisionConfig

TowerFormat = Literal["half", "float32"]
Float = NDArray[np.float32]
Values = dict[str, ort.OrtValue]

_F32 = TensorProto.FLOAT
_EMBEDDINGS, _LAYER = "vision_tower.embeddings.", "vision_tower.encoder.layers.{}."
_LAST_NORM, _PROJECTOR = "vision_tower.post_layernorm.", "multi_modal_projector."
_QKV_BIAS = "self_attn.qkv_proj.bias"
"""The biases of q, k and v, one after the other."""
_MLP_ROWS = 512
"""Patches that the MLP takes at a time: a matrix product is as fast on these as on all."""
_HALF_MAX = float(np.finfo(np.float16).max)


class CpuVision:
    """`VisionEncoder` on ONNX Runtime; rows are the same to the bit whenever they are computed.

    An image keeps every thread busy, so one is computed at a time, and other calls wait. At the sizes that
    Google published the weights take 0.9 GB as half and 1.7 GB as float32, and an image 0.25 GB while it is
    encoded. Half holds all that checkpoints store as float16, and of bfloat16 all but magnitudes under 2^-14.
    """

    def __init__(self, checkpoint: Checkpoint, *, weights: TowerFormat = "half", threads: int = 0) -> None:
        """Load a checkpoint's tower. `threads` 0 means one a core.

        Raises ValueError for a model without a tower, CheckpointError for a bad checkpoint, and EngineError
        for a weight that is beyond half's range.
        """
        vision = checkpoint.config.vision
        if vision is None:
            raise ValueError(f"{checkpoint.path}: has no vision tower")
        self._side = vision.image_size
        threads = threads or os.cpu_count() or 1
        self._first = build_first(checkpoint, vision).session("vision_first", threads)
        self._layer = build_layer(vision, weights).session("vision_layer", threads)
        self._last = build_last(checkpoint, vision).session("vision_last", threads)
        self._weights: list[Values] = []
        for i in range(vision.layers):
            self._weights.append(_load_layer(checkpoint, i, vision, weights))
            checkpoint.release_pages()
        give_back_freed_memory()
        self._lock, self._closed = threading.Lock(), False

    def encode(self, pixels: NDArray[np.uint8]) -> Float:
        """The rows of one image; see `VisionEncoder`."""
        check_pixels(pixels, self._side)
        image = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(pixels))
        with self._lock:
            if self._closed:
                raise EngineError("the vision tower was closed")
            [x] = self._first.run_with_ort_values(["x"], {"pixels": image})
            for weights in self._weights:
                [x] = self._layer.run_with_ort_values(["y"], {"x": x, **weights})
            [last] = self._last.run_with_ort_values(["rows"], {"x": x}, shrinking())
        rows: Float = (
            last.numpy().copy()
        )  # a view, and rows that are kept would keep the allocator's memory, too
        if not np.isfinite(rows).all():
            raise EngineError("the vision tower's rows are not finite numbers: the weights are not usable")
        return rows

    def close(self) -> None:
        """Let go of the weights, after the image under way."""
        with self._lock:
            self._closed = True
            self._weights.clear()


def build_first(checkpoint: Checkpoint, vision: VisionConfig) -> Graph:
    """pixels uint8 [side, side, 3] -> x float32 [1, patches, hidden]: the embedding of patches, row by row.

    Patches do not overlap, so their convolution is a product.
    """
    g, patch, side = Graph(), vision.patch_size, vision.image_size
    across = side // patch
    pixels = g.input("pixels", TensorProto.UINT8, [side, side, 3])
    tiles = g.op("Reshape", [pixels, g.ints(across, patch, across, patch, 3)])
    tiles = g.op("Transpose", [tiles], perm=[0, 2, 1, 3, 4])
    patches = g.op("Cast", [g.op("Reshape", [tiles, g.ints(1, vision.patches, -1)])], to=_F32)
    # (x / 255 - 0.5) / 0.5
    scaled = g.op("Div", [patches, g.weight(np.array(127.5, np.float32))])
    scaled = g.op("Sub", [scaled, g.weight(np.array(1, np.float32))])
    kernel = checkpoint.read(f"{_EMBEDDINGS}patch_embedding.weight").transpose(2, 3, 1, 0)
    embedded = g.op("MatMul", [scaled, g.weight(kernel.reshape(-1, vision.hidden_size))])
    bias = checkpoint.read(f"{_EMBEDDINGS}patch_embedding.bias")
    places = checkpoint.read(f"{_EMBEDDINGS}position_embedding.weight") + bias
    g.op("Add", [embedded, g.weight(places)], out="x")
    g.output("x", _F32, [1, vision.patches, vision.hidden_size])
    return g


def build_layer(vision: VisionConfig, form: TowerFormat, mlp_rows: int = _MLP_ROWS) -> Graph:
    """x float32 [1, patches, hidden] -> y, of the same shape: one layer.

    Its weights are inputs, too, named and shaped as `_layer_shapes` says. `mlp_rows` changes nothing but time
    and memory.
    """
    g, eps, stream = Graph(), vision.layer_norm_eps, [1, vision.patches, vision.hidden_size]
    x = g.input("x", _F32, stream)
    weights = {name: _input(g, name, shape, form) for name, shape in _layer_shapes(vision).items()}

    def product(rows: str, name: str) -> str:
        return g.op("MatMul", [rows, weights[f"{name}.weight"]])

    normed = g.op("LayerNormalization", [x, *_both("layer_norm1")], axis=-1, epsilon=eps)
    qkv = [product(normed, f"self_attn.{part}_proj") for part in "qkv"]
    attended = g.op("MultiHeadAttention", [*qkv, _QKV_BIAS], domain=MS, num_heads=vision.heads)
    x, normed = g.name("residual"), g.name("norm")
    delta = product(attended, "self_attn.out_proj")
    inputs = ["x", delta, *_both("layer_norm2"), "self_attn.out_proj.bias"]
    # x + delta + bias, and its norm, in one pass over memory.
    node = helper.make_node("SkipLayerNormalization", inputs, [normed, "", "", x], domain=MS, epsilon=eps)
    g.nodes.append(node)
    parts, n = [], vision.patches
    for rows in g.split(normed, [min(mlp_rows, n - at) for at in range(0, n, mlp_rows)], axis=1):
        act = g.op("FastGelu", [product(rows, "mlp.fc1"), "mlp.fc1.bias"], domain=MS)
        parts.append(product(act, "mlp.fc2"))
    delta = g.op("Add", [g.op("Concat", parts, axis=1), "mlp.fc2.bias"])
    g.op("Add", [x, delta], out="y")
    g.output("y", _F32, stream)
    return g


def build_last(checkpoint: Checkpoint, vision: VisionConfig) -> Graph:
    """x float32 [1, patches, hidden] -> rows float32 [tokens, width of the text model]: the last norm, for
    each token the mean of a square of patches, and the projector."""
    g, eps, hidden = Graph(), vision.layer_norm_eps, vision.hidden_size
    x = g.input("x", _F32, [1, vision.patches, hidden])
    norm = [g.weight(checkpoint.read(_LAST_NORM + part)) for part in ("weight", "bias")]
    normed = g.op("LayerNormalization", [x, *norm], axis=-1, epsilon=eps)
    side = math.isqrt(vision.tokens)
    square = math.isqrt(vision.patches) // side
    grid = g.op("Reshape", [normed, g.ints(side, square, side, square, hidden)])
    pooled = g.op("ReduceMean", [grid, g.ints(1, 3)], keepdims=0)
    pooled = g.op("Reshape", [pooled, g.ints(vision.tokens, hidden)])
    soft = g.norm(pooled, np.float32(1) + checkpoint.read(f"{_PROJECTOR}mm_soft_emb_norm.weight"), eps)
    projection = g.weight(checkpoint.read(f"{_PROJECTOR}mm_input_projection_weight"))
    g.op("MatMul", [soft, projection], out="rows")
    g.output("rows", _F32, [vision.tokens, checkpoint.config.hidden_size])
    return g


def _both(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


def _input(g: Graph, name: str, shape: Sequence[int], form: TowerFormat) -> str:
    """A weight, as float32."""
    if len(shape) == 1 or form == "float32":
        return g.input(name, _F32, shape)
    return g.op("Cast", [g.input(name, TensorProto.FLOAT16, shape)], to=_F32)


def _layer_shapes(vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    """A layer's weights by name, as its graph takes them: matrices are [in, out]."""
    hidden, inner = vision.hidden_size, vision.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {_QKV_BIAS: (3 * hidden,)}
    for norm in ("layer_norm1", "layer_norm2"):
        shapes |= dict.fromkeys(_both(norm), (hidden,))
    for part in ("q", "k", "v", "out"):
        shapes[f"self_attn.{part}_proj.weight"] = (hidden, hidden)
    shapes["self_attn.out_proj.bias"] = (hidden,)
    shapes |= {"mlp.fc1.weight": (hidden, inner), "mlp.fc1.bias": (inner,)}
    return shapes | {"mlp.fc2.weight": (inner, hidden), "mlp.fc2.bias": (hidden,)}


def _load_layer(checkpoint: Checkpoint, index: int, vision: VisionConfig, form: TowerFormat) -> Values:
    """The inputs of `build_layer` but x."""
    values: Values = {}
    for name, shape in _layer_shapes(vision).items():
        full = _LAYER.format(index) + name
        if name == _QKV_BIAS:
            read = np.concatenate([checkpoint.read(full.replace("qkv", part)) for part in "qkv"])
        else:
            read = checkpoint.read(full).T
        stored = _half(full, read) if len(shape) > 1 and form == "half" else read
        values[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(stored))
    return values


def _half(name: str, matrix: Float) -> NDArray[np.float16]:
    largest = float(np.abs(matrix).max())
    if largest > _HALF_MAX:
        raise EngineError(
            f"{name}: a weight of {largest:g}, and half ends at {_HALF_MAX:g}; set engine.weights to float32",
            param="engine.weights",
        )
    return matrix.astype(np.float16)
