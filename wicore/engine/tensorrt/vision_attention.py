"""Attention of the vision tower: every patch of an image to all of them.

On Hopper by the kernel that prompts go through (hopper_attention.cu), which takes an image as a prompt whose
positions all see each other, in a pool of its own; elsewhere by a TensorRT network, block by block of the
patches that ask.

The kernel has heads of 128 values, of which a tower's fill the first, and works on two query heads of a K and
V head at a time: these are the two halves of the patches, so that a tile of K and V serves 128 patches. It
takes q [rows][2 heads][128] with rows the half of the patches, rounded up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from wicore.engine.base import KVLayout
from wicore.engine.tensorrt.attention_settings import HopperSetting
from wicore.engine.tensorrt.device import Device, Stream
from wicore.engine.tensorrt.parts import allocate_parts, parts_bytes
from wicore.engine.tensorrt.prompt_attention import (
    PagedLayer,
    PoolMemory,
    prompt_attention,
    prompt_tiles,
)
from wicore.engine.tensorrt.vision_networks import VisionKind, VisionShape
from wicore.gemma3.config import Gemma3Config

PURPOSE = "the vision tower's attention"
_WIDTH = 128
"""Values of a head as the kernel takes it."""
_THREADS = 256
_BLOCK_TOKENS = 128


class TowerAttention(Protocol):
    """Enqueues attention."""

    def __call__(self, stream: Stream, qkv: int, attended: int) -> None:
        """qkv: half [patches][3 * hidden], q then k then v of all heads; attended: half [patches][hidden]."""

    def free(self) -> None:
        """Give its memory back; idempotent."""


class Networks(Protocol):
    """What runs networks, as `Segments` does."""

    def run(self, stream: Stream, kind: VisionKind, rows: int, addresses: Mapping[str, int]) -> None: ...


def has_kernel(capability: tuple[int, int], shape: VisionShape) -> bool:
    """Whether attention is by the kernel on such a card."""
    return _setting(capability, shape) is not None


def attention_bytes(device: Device, shape: VisionShape) -> int:
    """Bytes of device memory that `tower_attention` takes."""
    return parts_bytes(_sizes(shape)) if _setting(device.capability, shape) else 0


def tower_attention(
    device: Device, config: Gemma3Config, shape: VisionShape, networks: Networks
) -> TowerAttention:
    """By the kernel where the card has it, else by `networks`. Raises EngineError when memory is short."""
    setting = _setting(device.capability, shape)
    return _Kernel(device, config, shape, setting) if setting else _Network(shape, networks)


def _setting(capability: tuple[int, int], shape: VisionShape) -> HopperSetting | None:
    width = shape.hidden // shape.heads
    if capability != (9, 0) or width > _WIDTH:
        return None
    return HopperSetting(tile_keys=128, k_stages=2, v_stages=2, values=-(-width // 16) * 16)


def _rows(shape: VisionShape) -> int:
    return -(-shape.patches // 2)


def _blocks(shape: VisionShape) -> int:
    return -(-shape.patches // _BLOCK_TOKENS)


def _sizes(shape: VisionShape) -> dict[str, int]:
    """Bytes by name."""
    queries = 2 * _rows(shape) * 2 * shape.heads * _WIDTH
    return {
        "q": queries,
        "kv": 2 * _blocks(shape) * 2 * shape.heads * _BLOCK_TOKENS * _WIDTH,
        "out": queries,
        "tables": 4 * (_blocks(shape) + 1 + _rows(shape) + 4 * (_rows(shape) // 64 + 1)),
    }


class _Network:
    def __init__(self, shape: VisionShape, networks: Networks) -> None:
        self._shape, self._networks = shape, networks

    def __call__(self, stream: Stream, qkv: int, attended: int) -> None:
        shape = self._shape
        for first in range(0, shape.patches, shape.block):
            bound = {
                "queries": qkv + 2 * first * 3 * shape.hidden,
                "qkv": qkv,
                "attended": attended + 2 * first * shape.hidden,
            }
            self._networks.run(stream, "vision_attention", shape.block, bound)

    def free(self) -> None:
        return


class _Kernel:
    def __init__(
        self, device: Device, config: Gemma3Config, shape: VisionShape, setting: HopperSetting
    ) -> None:
        self._shape, heads, rows = shape, shape.heads, _rows(shape)
        head_dim = shape.hidden // heads
        moves = {"HEADS": heads, "HEAD_DIM": head_dim, "WIDTH": _WIDTH, "BLOCK_TOKENS": _BLOCK_TOKENS}
        module = device.compile("vision_attention.cu", moves)
        self._spread, self._gather = module.function("spread_qkv"), module.function("gather_heads")
        self._scale = np.float32(head_dim**-0.5)
        self._memory, at = allocate_parts(device, _sizes(shape), PURPOSE)
        self._q, self._kv, self._out = at["q"], at["kv"], at["out"]

        layout = KVLayout(_BLOCK_TOKENS, 1, 0, heads, _WIDTH, shape.patches, "float16")
        as_text = replace(config, heads=2 * heads, kv_heads=heads, head_dim=_WIDTH)
        macros = {
            **{"HEADS": 2 * heads, "KV_HEADS": heads, "HEAD_DIM": _WIDTH},
            **{"BLOCK_TOKENS": _BLOCK_TOKENS, "INT8": 0},
        }
        self._attention = prompt_attention(device, as_text, layout, macros, rows, setting)
        block_bytes = layout.block_bytes("global")
        pool = PoolMemory("global", self._kv, 0, block_bytes, _blocks(shape), 0)
        self._attention.bind(pool)
        tiles = prompt_tiles([(0, rows, 0, 0)])
        self._tiles = len(tiles)
        blocks = np.arange(_blocks(shape), dtype=np.int32)
        ends = np.full(rows, shape.patches, np.int32)
        words = np.concatenate([tiles.reshape(-1), blocks, np.zeros(1, np.int32), ends])
        self._tiles_at = at["tables"]
        tables = self._tiles_at + 16 * self._tiles
        offset = tables + blocks.nbytes
        self._layer = PagedLayer(
            memory=pool,
            layer_offset=0,
            tables=tables,
            table_offset=offset,
            table_first=0,
            streamed=0,
            window=2 * shape.patches,
            image_end=offset + 4,
        )
        stream = device.stream()
        # What heads do not fill stays zero from here on, and so do positions behind the last.
        device.fill(self._memory.address, 0, self._memory.size, stream)
        device.copy(self._tiles_at, words.ctypes.data, words.nbytes, stream)
        stream.synchronize()

    def __call__(self, stream: Stream, qkv: int, attended: int) -> None:
        patches = self._shape.patches
        spread: tuple[Any, ...] = (qkv, self._q, self._kv, np.int32(patches), self._scale)
        self._spread(stream, patches, _THREADS, spread)
        self._attention(stream, self._tiles_at, self._tiles, self._layer, self._q, self._out)
        self._gather(stream, patches, _THREADS, (self._out, attended, np.int32(patches)))

    def free(self) -> None:
        self._memory.free()
