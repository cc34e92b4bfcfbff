"""Attention of prompt chunks by tiles of 64 positions, through one of two kernels of the same meaning.

prefill_attention.cu runs on every card; hopper_attention.cu, on Hopper's own products, is faster where it can
be used (`prompt_setting`). What either writes for a row depends on that row's q and the K and V that it sees,
and on nothing else, to the bit; the two differ from each other by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import KVLayout, Pool
from wicore.engine.tensorrt.attention_settings import (
    TILE_POSITIONS,
    HopperSetting,
    MmaSetting,
    PromptSetting,
)
from wicore.engine.tensorrt.device import Device, TensorMap
from wicore.errors import EngineError
from wicore.gemma3.config import Gemma3Config

_MOST_VECTORS = (1 << 31) - 1
"""Of a pool: the copy engine takes 32-bit coordinates."""
_PANEL = 64
"""Values of a vector that a box of the copy engine holds."""


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """Where a pool's blocks are."""

    pool: Pool
    device_address: int
    host_address: int
    """Of pinned host memory, as kernels see it; 0 where nothing is streamed."""
    block_bytes: int
    """From one block, or row of host memory, to the next."""
    device_blocks: int
    host_blocks: int


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """A layer's K and V, as prompt chunks of a step see them. Device addresses are named as in StepTables."""

    memory: PoolMemory
    layer_offset: int
    """Where the layer's part begins in a block, in bytes."""
    tables: int
    table_offset: int
    table_first: int
    streamed: int
    window: int
    """Positions that a row sees, counted from its own."""
    image_end: int


class PromptAttention(Protocol):
    """One of the kernels."""

    def bind(self, memory: PoolMemory) -> None:
        """Use this memory for a pool from now on. Raises EngineError for more than it can reach."""

    def __call__(self, stream: Any, tiles: int, count: int, layer: PagedLayer, q: int, out: int) -> None:
        """Enqueue the attention of `count` tiles, at device address `tiles` as `prompt_tiles` makes them.

        q, out: half [rows of the step][heads][head_dim].
        """


def prompt_attention(
    device: Device,
    config: Gemma3Config,
    layout: KVLayout,
    shape: Mapping[str, int | str],
    max_rows: int,
    setting: PromptSetting,
) -> PromptAttention:
    """Compile a kernel. `shape`: the macros of attention.cuh."""
    if isinstance(setting, HopperSetting):
        return _Hopper(device, config, layout, shape, max_rows, setting)
    return _Mma(device, config, layout, shape, setting)


def prompt_tiles(chunks: Iterable[tuple[int, int, int, int]]) -> NDArray[np.int32]:
    """The work list of a step, [tiles][4], longest first: (first row, rows, sequence, position).

    chunks: (first row, rows, sequence, position of the first row). Tiles end where a multiple of
    TILE_POSITIONS does, and so fewest keys are read in vain.
    """
    found = []
    for row, count, sequence, position in chunks:
        end = row + count
        while row < end:
            size = min(end - row, TILE_POSITIONS - position % TILE_POSITIONS)
            found.append((row, size, sequence, position))
            row, position = row + size, position + size
    found.sort(key=lambda tile: -tile[3])
    return np.array(found, np.int32).reshape(-1, 4)


class _Mma:
    """prefill_attention.cu"""

    def __init__(
        self,
        device: Device,
        config: Gemma3Config,
        layout: KVLayout,
        shape: Mapping[str, int | str],
        setting: MmaSetting,
    ) -> None:
        self._heads, self._setting = config.heads, setting
        self._shared = setting.shared_bytes(config, layout)
        s = setting
        macros = {"PACK": s.pack, "M_TILES": s.m_tiles, "TILE_KEYS": s.tile_keys, "MIN_BLOCKS": s.blocks}
        module = device.compile("prefill_attention.cu", {**shape, **macros})
        self._function = module.function("prefill_attention", self._shared)

    def bind(self, memory: PoolMemory) -> None: ...

    def __call__(self, stream: Any, tiles: int, count: int, layer: PagedLayer, q: int, out: int) -> None:
        memory, setting = layer.memory, self._setting
        args = (
            *(tiles, q, out, memory.device_address + layer.layer_offset),
            *(memory.host_address + layer.layer_offset, np.int64(memory.block_bytes), layer.tables),
            *(layer.table_offset, layer.table_first, layer.streamed, np.int32(layer.window)),
            layer.image_end,
        )
        grid = count * (self._heads // setting.pack)
        self._function(stream, grid, setting.threads, args, dynamic_shared=self._shared)


class _Hopper:
    """hopper_attention.cu"""

    _THREADS = 384
    _HEADS = 2
    """Query heads of an item of work."""

    def __init__(
        self,
        device: Device,
        config: Gemma3Config,
        layout: KVLayout,
        shape: Mapping[str, int | str],
        max_rows: int,
        setting: HopperSetting,
    ) -> None:
        self._device, self._config, self._max_rows = device, config, max_rows
        self._box = math.gcd(layout.block_tokens, setting.tile_keys)
        self._vector = layout.vector_bytes
        self._shared = setting.shared_bytes(config)
        self._pools: dict[Pool, tuple[TensorMap, TensorMap]] = {}
        """Of the pool, and of its host memory."""
        self._queries: dict[int, TensorMap] = {}
        s = setting
        macros = {
            "TILE_KEYS": s.tile_keys,
            "K_STAGES": s.k_stages,
            "V_STAGES": s.v_stages,
            "TURNS": int(s.turns),
            "VALUES": s.values or config.head_dim,
        }
        module = device.compile("hopper_attention.cu", {**shape, **macros})
        self._function = module.function("hopper_attention", self._shared)

    def bind(self, memory: PoolMemory) -> None:
        rows = memory.block_bytes // self._vector
        maps = []
        for address, blocks in (
            (memory.device_address, memory.device_blocks),
            (memory.host_address, memory.host_blocks),
        ):
            if blocks * rows > _MOST_VECTORS:
                raise EngineError(
                    f"attention: {blocks} blocks of {memory.block_bytes} bytes: expected at most "
                    f"{_MOST_VECTORS * self._vector} bytes in one pool; lower hmt.host_bytes"
                )
            if not blocks:  # never read
                address, blocks = memory.device_address, memory.device_blocks
            maps.append(self._map(address, blocks * rows, self._config.head_dim, self._box))
        self._pools[memory.pool] = maps[0], maps[1]

    def __call__(self, stream: Any, tiles: int, count: int, layer: PagedLayer, q: int, out: int) -> None:
        config, memory = self._config, layer.memory
        if q not in self._queries:
            wide = config.heads * config.head_dim
            self._queries[q] = self._map(q, self._max_rows, wide, TILE_POSITIONS)
        items = count * (config.heads // self._HEADS)
        args = (
            *(self._queries[q], *self._pools[memory.pool], tiles, np.int32(items), out),
            np.int32(memory.block_bytes // self._vector),
            np.int32(layer.layer_offset // self._vector),
            *(layer.tables, layer.table_offset, layer.table_first, layer.streamed),
            *(np.int32(layer.window), layer.image_end),
        )
        grid = min(items, self._device.sms)
        self._function(stream, grid, self._THREADS, args, dynamic_shared=self._shared)

    def _map(self, address: int, rows: int, columns: int, box: int) -> TensorMap:
        return self._device.tensor_map_2d(address, rows, columns, 2 * columns, box, _PANEL)
