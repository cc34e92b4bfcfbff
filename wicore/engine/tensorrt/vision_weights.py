"""The vision tower's weights on the GPU: matrices as half, vectors as float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wicore.engine.tensorrt.device import Buffer, Device
from wicore.engine.tensorrt.weights import (
    RandomWeights,
    TensorLayout,
    fill_matrices,
    load_matrices,
    load_vectors,
)
from wicore.gemma3.checkpoint import Checkpoint
from wicore.gemma3.config import Gemma3Config

PURPOSE = "the vision tower's weights"
_EMBEDDINGS, _LAYER = "vision_tower.embeddings.", "vision_tower.encoder.layers.{}."
_SOFT_NORM = "multi_modal_projector.mm_soft_emb_norm.weight"
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_PARTS = {"out": "self_attn.out_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
"""A layer's matrices but QKV, by the networks' names for them; each has a bias."""
_NORMS = {"norm": "layer_norm1", "mlp_norm": "layer_norm2"}
_LAST_NORM = "vision_tower.post_layernorm"
_PROJECTION = "multi_modal_projector.mm_input_projection_weight"
_DEVIATION = 0.1
"""Of made-up vectors, whose mean is 0, or 1 for the weights of norms."""


@dataclass(frozen=True)
class VisionWeights:
    """Device addresses, by the names of the networks' bindings; `free` gives them back."""

    embedding: Mapping[str, int]
    """patch_weight, patch_bias, positions."""
    entries: tuple[Mapping[str, int], ...]
    """Of each layer what comes before its attention: norm_weight, norm_bias, qkv_weight, qkv_bias."""
    layers: tuple[Mapping[str, int], ...]
    """Of each layer what comes behind it."""
    projector: Mapping[str, int]
    """The tower's last norm (norm_weight, norm_bias), soft_norm, projection."""
    memory: Buffer

    def free(self) -> None:
        self.memory.free()


def load_vision(device: Device, source: Checkpoint | RandomWeights) -> VisionWeights:
    """Put a tower's weights on the device. Raises EngineError when the memory is not enough, or a weight is
    beyond half's range."""
    layout = _Layout(source.config)
    memory = device.allocate(layout.size, PURPOSE)
    try:
        load_vectors(device, layout, memory.address, _vectors(layout, source))
        if isinstance(source, RandomWeights):
            fill_matrices(device, layout, memory.address, source.seed)
        else:
            load_matrices(device, layout, memory.address, source)
            source.release_pages()
    except BaseException:
        memory.free()
        raise
    return layout.weights(memory)


def vision_weight_bytes(config: Gemma3Config) -> int:
    """Bytes of them on the device; 0 for a model without a tower."""
    return _Layout(config).size if config.vision else 0


class _Layout(TensorLayout):
    def __init__(self, config: Gemma3Config) -> None:
        # A convolution over patches that do not overlap is a product with rows of patches.
        shapes = {
            name: (shape[0], math.prod(shape[1:])) if len(shape) > 2 else shape
            for name, shape in config.vision_shapes().items()
        }
        super().__init__(shapes)
        self._layers = [_LAYER.format(i) for i in range(config.vision.layers if config.vision else 0)]
        self.add(f"{_EMBEDDINGS}patch_embedding.weight")
        self.add(f"{_EMBEDDINGS}position_embedding.weight")
        self._add_parts("weight")
        self.add(_PROJECTION)
        self.add(f"{_EMBEDDINGS}patch_embedding.bias")
        self._add_parts("bias")
        for norm in (*(f"{layer}{norm}" for layer in self._layers for norm in _NORMS.values()), _LAST_NORM):
            self.add(f"{norm}.weight")
            self.add(f"{norm}.bias")
        self.add(_SOFT_NORM)

    def _add_parts(self, which: str) -> None:
        for layer in self._layers:
            for group in (_QKV, *((part,) for part in _PARTS.values())):
                self.add(*(f"{layer}{name}.{which}" for name in group))

    def weights(self, memory: Buffer) -> VisionWeights:
        at = {name: memory.address + offset for name, offset in self.at.items()}

        def both(prefix: str, weight: str, bias: str) -> dict[str, int]:
            return {weight: at[f"{prefix}.weight"], bias: at[f"{prefix}.bias"]}

        def norm(prefix: str, to: str) -> dict[str, int]:
            return both(prefix, f"{to}_weight", f"{to}_bias")

        patches = both(f"{_EMBEDDINGS}patch_embedding", "patch_weight", "patch_bias")
        entries, layers = [], []
        for layer in self._layers:
            entry = norm(f"{layer}{_NORMS['norm']}", "norm")
            entries.append(entry | both(f"{layer}{_QKV[0]}", "qkv_weight", "qkv_bias"))
            rest = norm(f"{layer}{_NORMS['mlp_norm']}", "mlp_norm")
            for name, part in _PARTS.items():
                rest |= both(f"{layer}{part}", name, f"{name}_bias")
            layers.append(rest)
        return VisionWeights(
            embedding=patches | {"positions": at[f"{_EMBEDDINGS}position_embedding.weight"]},
            entries=tuple(entries),
            layers=tuple(layers),
            projector=norm(_LAST_NORM, "norm") | {"soft_norm": at[_SOFT_NORM], "projection": at[_PROJECTION]},
            memory=memory,
        )


def _vectors(layout: TensorLayout, source: Checkpoint | RandomWeights) -> dict[str, NDArray[np.float32]]:
    """Every vector as the networks take it."""
    if isinstance(source, Checkpoint):
        found = {name: source.read(name) for name in layout.vectors}
    else:
        rng = np.random.default_rng(source.seed)
        found = {}
        for name in layout.vectors:
            drawn = np.float32(_DEVIATION) * rng.standard_normal(layout.shapes[name], np.float32)
            found[name] = drawn + np.float32(name.endswith(".weight") and name != _SOFT_NORM)
    found[_SOFT_NORM] = np.float32(1) + found[_SOFT_NORM]
    return found
