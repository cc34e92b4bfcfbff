"""The vision tower on the GPU, on a stream of its own beside the steps.

An image is one CUDA graph, captured at the start: its patches are cut, then come the networks of
vision_networks.py, by our kernels on Hopper (vision_kernels.py) and by TensorRT's plans elsewhere, and
between them attention (vision_attention.py). Two images at once would take twice the memory and gain nothing:
a card is full with one, so calls wait for each other.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import Engine, VisionEncoder
from wicore.engine.plans import check_pixels
from wicore.engine.tensorrt.device import Device, Graph
from wicore.engine.tensorrt.parts import allocate_parts, parts_bytes
from wicore.engine.tensorrt.vision_attention import Networks, attention_bytes, tower_attention
from wicore.engine.tensorrt.vision_kernels import VisionKernels, fits, vision_kinds
from wicore.engine.tensorrt.vision_networks import VisionKind, VisionShape
from wicore.engine.tensorrt.vision_weights import VisionWeights, vision_weight_bytes
from wicore.errors import EngineError
from wicore.gemma3.config import Gemma3Config

if TYPE_CHECKING:
    from wicore.config import Settings
    from wicore.engine.tensorrt.segments import Segments
    from wicore.model import Model

log = logging.getLogger("wicore.engine")

SCRATCH = "the vision tower's scratch memory"
_WORK = "the vision tower's activations"


class TowerNetworks(Networks, Protocol):
    """What runs the networks, as `Segments` does."""

    def close(self) -> None: ...


class TensorrtVision:
    """`VisionEncoder` on a CUDA device. Its memory is taken, and its graph captured, when it is made."""

    def __init__(
        self, device: Device, config: Gemma3Config, weights: VisionWeights, networks: TowerNetworks
    ) -> None:
        """`weights` and `networks` are closed with it. Raises EngineError when memory does not suffice."""
        if config.vision is None:
            raise ValueError("config: has no vision tower")
        self._device, self._weights, self._networks = device, weights, networks
        self._shape, self._side = VisionShape.of(config), config.vision.image_size
        self._patch_side = config.vision.patch_size
        self._attend = tower_attention(device, config, self._shape, networks)
        self._cut = device.compile("vision.cu", {}).function("cut_patches")
        sizes = _places(self._shape, self._side)
        self._memory, self._at = allocate_parts(device, sizes, _WORK)
        self._pixels = device.allocate_host(self._side * self._side * 3)
        self._rows = device.allocate_host(4 * self._shape.tokens * self._shape.out)
        self.stream, self._lock = device.stream(), threading.Lock()
        device.fill(self._at["pixels"], 0, self._pixels.size, self.stream)
        self._launches()  # what a kernel compiles or allocates the first time may not happen in a capture
        self.stream.synchronize()
        self._graph: Graph | None = device.capture(self.stream, self._launches)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The rows of one image; see `VisionEncoder`."""
        check_pixels(pixels, self._side)
        with self._lock:
            if self._graph is None:
                raise EngineError("the vision tower was closed")
            self._pixels.array[:] = pixels.reshape(-1)
            self._device.copy(self._at["pixels"], self._pixels.address, self._pixels.size, self.stream)
            self._graph.launch(self.stream)
            self._device.copy(self._rows.address, self._at["rows"], self._rows.size, self.stream)
            self.stream.synchronize()
            rows = self._rows.array.view(np.float32).reshape(self._shape.tokens, self._shape.out).copy()
        if not np.isfinite(rows).all():
            raise EngineError("the vision tower's rows are not finite numbers: the weights are not usable")
        return rows

    def launch(self) -> None:
        """Enqueue the image whose pixels are on the device, on `stream`: for benchmarks."""
        if self._graph is None:
            raise EngineError("the vision tower was closed")
        self._graph.launch(self.stream)

    def close(self) -> None:
        with self._lock:
            if self._graph is None:
                return
            self._graph.close()
            self._graph = None
            self._networks.close()
            self._attend.free()
            self._memory.free()
            self._pixels.free()
            self._rows.free()
            self._weights.free()

    def _launches(self) -> None:
        """Enqueue an image."""
        at, w, stream, patches = self._at, self._weights, self.stream, self._shape.patches
        sides = np.int32(self._side), np.int32(self._patch_side)
        self._cut(stream, patches, 128, (at["pixels"], at["patches"], *sides))
        residuals = at["residual"], at["other_residual"]
        given: dict[str, int] = {"patches": at["patches"], **w.embedding}
        kind: VisionKind = "vision_first"
        following: Sequence[Mapping[str, int]] = (*w.entries[1:], w.projector)
        results = {"qkv": at["qkv"], "residual_out": residuals[0]}
        self._networks.run(stream, kind, patches, {**given, **w.entries[0], **results})
        for here, entry in zip(w.layers, following, strict=True):
            self._attend(stream, at["qkv"], at["attended"])
            given = {"attended": at["attended"], "residual": residuals[0], **here, **entry}
            kind, results = "vision_middle", {"qkv": at["qkv"], "residual_out": residuals[1]}
            if entry is w.projector:
                kind, results = "vision_last", {"rows": at["rows"]}
            self._networks.run(stream, kind, patches, {**given, **results})
            residuals = residuals[1], residuals[0]


def vision_bytes(config: Gemma3Config, device: Device) -> int:
    """Bytes of device memory that a tower takes beside its networks' scratch memory; 0 without a tower."""
    if config.vision is None:
        return 0
    shape = VisionShape.of(config)
    work = parts_bytes(_places(shape, config.vision.image_size))
    return vision_weight_bytes(config) + work + attention_bytes(device, shape)


def open_vision_networks(config: Gemma3Config, device: Device) -> TowerNetworks | None:
    """What runs the tower's networks on this card: our kernels, or TensorRT's plans, of which what is missing
    is built, once. None, which is logged, where there is no TensorRT for it: such an engine serves text."""
    shape = VisionShape.of(config)
    if fits(device.capability, shape):
        return VisionKernels(device, shape, SCRATCH)
    return open_vision_plans(shape, device)


def open_vision_plans(shape: VisionShape, device: Device) -> Segments | None:
    """TensorRT's plans of a tower for this card, built where they are missing; None without TensorRT."""
    from wicore.engine.tensorrt.plans import PlanCache, build_missing, plan_keys, plans_folder
    from wicore.engine.tensorrt.segments import Segments
    from wicore.engine.tensorrt.trt_api import installed_backends

    hopper = device.capability[0] == 9
    backends = [b for b in installed_backends() if not (hopper and b.ahead_of_time)]
    if not backends:
        log.warning("TensorRT is not installed, and images need it: pip install 'wicore[gpu]'")
        return None
    backend, cache = backends[0], PlanCache(plans_folder())
    capability = "{}.{}".format(*device.capability)
    kinds = vision_kinds(device.capability, shape)
    keys = plan_keys(backend, capability, shape, (), kinds=kinds)
    missing = cache.missing(keys)
    if missing:
        log.info("building %d TensorRT plans for images on this card, once; this takes minutes", len(missing))
        build_missing(cache, missing)
    return Segments(device, cache, shape, (), backend=backend, kinds=kinds, scratch=SCRATCH)


def create_tensorrt_vision(settings: Settings, model: Model, engine: Engine) -> VisionEncoder | None:
    """The tower that `engine` was made with, on its device; None where there is none.

    The engine closes it, too: its memory is part of the engine's budget.
    """
    from wicore.engine.tensorrt.engine import TensorrtEngine

    return engine.vision if isinstance(engine, TensorrtEngine) else None


def _places(shape: VisionShape, side: int) -> dict[str, int]:
    """Bytes by name of what a run works with."""
    rows = shape.patches
    return {
        "pixels": 3 * side * side,
        "patches": 2 * rows * shape.patch,
        "residual": 4 * rows * shape.hidden,
        "other_residual": 4 * rows * shape.hidden,
        "qkv": 2 * rows * 3 * shape.hidden,
        "attended": 2 * rows * shape.hidden,
        "rows": 4 * shape.tokens * shape.out,
    }
