"""The vision tower's networks by our own kernels, on Hopper: `run` is `Segments.run` of vision_networks.py.

Products are those of kernels/hopper.cu, with biases and GELU in them; what is between is vision_norms.cu.
Sums are float32, and so is the residual stream; what products take is half. Of what TensorRT's networks scale
lest it overflow, here only the activation before fc2 can: it is scaled and saturated too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from wicore.engine.tensorrt.device import Device, Stream
from wicore.engine.tensorrt.hopper import HopperMatmul
from wicore.engine.tensorrt.networks import EXPONENT
from wicore.engine.tensorrt.parts import allocate_parts
from wicore.engine.tensorrt.vision_attention import has_kernel
from wicore.engine.tensorrt.vision_networks import VISION_KINDS, VisionKind, VisionShape
from wicore.errors import EngineError

_THREADS = 128
_UNSCALED = np.float32(2.0**-EXPONENT)

Addresses = Mapping[str, int]
"""Of a network's bindings (`vision_networks.bindings`), by name."""


def fits(capability: tuple[int, int], shape: VisionShape) -> bool:
    """Whether our kernels do this tower on such a card; elsewhere TensorRT's plans do."""
    sizes = shape.hidden, shape.inner, shape.out
    return capability == (9, 0) and has_kernel(capability, shape) and not any(n % 8 for n in sizes)


def vision_kinds(capability: tuple[int, int], shape: VisionShape) -> tuple[VisionKind, ...]:
    """The networks of a tower that are plans of TensorRT's on such a card."""
    if fits(capability, shape):
        return ()
    attends = has_kernel(capability, shape)
    return tuple(kind for kind in VISION_KINDS if not (attends and kind == "vision_attention"))


class VisionKernels:
    """Runs the networks but attention. Its memory is taken when it is made."""

    def __init__(self, device: Device, shape: VisionShape, purpose: str) -> None:
        """`purpose` is what the device reports its memory as. Raises EngineError when memory is short."""
        self._shape = shape
        self._matmul = HopperMatmul(device)
        norms = device.compile("vision_norms.cu", {"HIDDEN": shape.hidden})
        self._add, self._place = norms.function("add_layer_norm"), norms.function("place_layer_norm")
        self._pool = norms.function("pool_patches")
        moves = device.compile("vision.cu", {})
        self._widen, self._transpose = moves.function("widen_rows"), moves.function("transpose")
        self._eps = np.float32(shape.eps)
        self._patch = -(-shape.patch // 8) * 8
        """Values of a patch as products take it, with zeros at the end."""
        sizes = {
            "patches": 2 * shape.patches * self._patch,
            "patch_weight": 2 * shape.hidden * self._patch,
            "delta": 4 * shape.patches * shape.hidden,
            "residual": 4 * shape.patches * shape.hidden,
            "normed": 2 * shape.patches * shape.hidden,
            "act": 2 * shape.patches * shape.inner,
            "soft": 2 * shape.tokens * shape.hidden,
            "projection": 2 * shape.out * shape.hidden,
        }
        self._memory, self._at = allocate_parts(device, sizes, purpose)

    def run(self, stream: Stream, kind: VisionKind, rows: int, addresses: Addresses) -> None:
        """Enqueue a network of a whole image. Raises EngineError for one that there is no kernel for here."""
        if kind == "vision_first":
            self._first(stream, addresses)
        elif kind == "vision_middle":
            self._middle(stream, addresses)
        elif kind == "vision_last":
            self._last(stream, addresses)
        else:
            raise EngineError(f"no {kind} network is among the vision tower's kernels")

    def close(self) -> None:
        """Give the memory back; nothing may be running. Idempotent."""
        self._memory.free()

    def _first(self, stream: Stream, given: Addresses) -> None:
        s, at = self._shape, self._at
        for name, count in (("patches", s.patches), ("patch_weight", s.hidden)):
            widths = np.int32(s.patch), np.int32(self._patch)
            self._widen(stream, count, _THREADS, (given[name], at[name], *widths))
        self._product(stream, at["patches"], at["patch_weight"], self._patch)
        placed = at["delta"], given["patch_bias"], given["positions"], given["residual_out"]
        self._place(stream, s.patches, _THREADS, (*placed, *self._norm(given, "norm")))
        self._qkv(stream, given)

    def _middle(self, stream: Stream, given: Addresses) -> None:
        residual = given["residual_out"]
        self._layer(stream, given, residual)
        added = residual, self._at["delta"], _UNSCALED, given["fc2_bias"]
        self._add(stream, self._shape.patches, _THREADS, (*added, residual, *self._norm(given, "norm")))
        self._qkv(stream, given)

    def _last(self, stream: Stream, given: Addresses) -> None:
        s, at = self._shape, self._at
        self._layer(stream, given, at["residual"])
        across = math.isqrt(s.patches)
        added = at["residual"], at["delta"], _UNSCALED, given["fc2_bias"]
        normed = given["norm_weight"], given["norm_bias"], given["soft_norm"], at["soft"]
        squares = np.int32(across), np.int32(across // math.isqrt(s.tokens))
        self._pool(stream, s.tokens, _THREADS, (*added, *normed, *squares, self._eps))
        tiles, sizes = (-(-s.out // 32), -(-s.hidden // 32)), (np.int32(s.hidden), np.int32(s.out))
        self._transpose(stream, tiles, 256, (given["projection"], at["projection"], *sizes))
        operands = at["soft"], at["projection"], given["rows"]
        self._matmul.plain(stream, s.tokens, *operands, s.out, s.hidden, half_out=False)

    def _layer(self, stream: Stream, given: Addresses, residual: int) -> None:
        """The rest of a layer but its last sum: `residual` and, still scaled, `delta`."""
        s, at = self._shape, self._at
        self._product(stream, given["attended"], given["out"], s.hidden)
        added = given["residual"], at["delta"], np.float32(1), given["out_bias"]
        self._add(stream, s.patches, _THREADS, (*added, residual, *self._norm(given, "mlp_norm")))
        operands, sizes = (at["normed"], given["fc1"], given["fc1_bias"], at["act"]), (s.inner, s.hidden)
        self._matmul.biased(stream, s.patches, *operands, *sizes, gelu=True, exponent=EXPONENT)
        self._product(stream, at["act"], given["fc2"], s.inner)

    def _product(self, stream: Stream, x: int, w: int, k: int) -> None:
        """`delta` = x w', float32."""
        s = self._shape
        self._matmul.plain(stream, s.patches, x, w, self._at["delta"], s.hidden, k, half_out=False)

    def _qkv(self, stream: Stream, given: Addresses) -> None:
        s = self._shape
        operands = self._at["normed"], given["qkv_weight"], given["qkv_bias"], given["qkv"]
        self._matmul.biased(stream, s.patches, *operands, 3 * s.hidden, s.hidden)

    def _norm(self, given: Addresses, name: str) -> tuple[int, int, int, np.float32]:
        """The last arguments of a norm to `normed`."""
        return given[f"{name}_weight"], given[f"{name}_bias"], self._at["normed"], self._eps
