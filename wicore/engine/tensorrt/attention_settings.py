"""Macros of the attention kernels, chosen for a model's shape and a card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from wicore.engine.base import KVLayout
from wicore.errors import EngineError
from wicore.gemma3.config import Gemma3Config

TILE_POSITIONS = 64
"""Most positions of a prefill tile."""

MERGE_THREADS = 128
_WORK_BYTES = 128

_SHARED_KIB = {
    (8, 0): (164, 163),
    (8, 7): (164, 163),
    (9, 0): (228, 227),
    (10, 0): (228, 227),
    (10, 3): (228, 227),
}
"""Shared memory of a multiprocessor and of a block, by compute capability; 100 and 99 otherwise."""


@dataclass(frozen=True, slots=True)
class DecodeSetting:
    """Macros of decode_attention.cu. `span` and `max_spans` are part of the arithmetic: results differ in
    rounding from one setting to another."""

    tiles: int
    """16-key tiles of a warp in a step."""
    span: int
    """Positions that a block sums up; a multiple of 16 tiles * warps."""
    max_spans: int
    """Of a row: longer rows have longer spans, by doubling."""
    merge_parts: int
    blocks: int
    """A multiprocessor."""
    warps: int = 4
    """Of a block."""

    @classmethod
    def of(cls, config: Gemma3Config, layout: KVLayout, capability: tuple[int, int]) -> DecodeSetting:
        tiles = 1 if layout.vector_bytes >= 256 else 2
        columns = config.heads // config.kv_heads * config.head_dim // 4
        parts = 1
        while parts * config.kv_heads < 8 and columns % (2 * parts) == 0 and columns // (2 * parts) >= 32:
            parts *= 2
        chosen = cls(
            tiles=tiles,
            span=256 if config.kv_heads > 8 else 128,
            max_spans=min(256, max(64, 1024 // config.kv_heads)),
            merge_parts=parts,
            blocks=1,
        )
        total, _ = _SHARED_KIB.get(capability, (100, 99))
        fits = (total << 10) // (chosen.shared_bytes(config, layout) + 1024)
        # As many as there are registers for.
        return replace(chosen, blocks=max(1, min(2 if config.head_dim > 128 else 3, fits)))

    def shared_bytes(self, config: Gemma3Config, layout: KVLayout) -> int:
        group, int8 = config.heads // config.kv_heads, layout.dtype == "int8"
        keys = 16 * self.tiles
        buffer = keys * _row_bytes(layout.head_dim * np.dtype(layout.dtype).itemsize) + 4 * keys * int8
        return self.warps * (2 * buffer + 4 * group * config.head_dim + 2 * 4 * 8) + 16

    def merge_shared_bytes(self, config: Gemma3Config) -> int:
        return 4 * (config.heads // config.kv_heads * self.max_spans + 8) + 16 * MERGE_THREADS


@dataclass(frozen=True, slots=True)
class MmaSetting:
    """Macros of prefill_attention.cu. `tile_keys` is part of the arithmetic."""

    pack: int
    """Query heads of a tile."""
    m_tiles: int
    """16-row tiles of a warp."""
    tile_keys: int
    blocks: int
    """A multiprocessor."""

    @classmethod
    def of(cls, config: Gemma3Config, layout: KVLayout, capability: tuple[int, int]) -> MmaSetting:
        even = config.heads // config.kv_heads % 2 == 0
        wide = config.head_dim > 128
        _, most = _SHARED_KIB.get(capability, (100, 99))
        for pack, keys in ((2, 64), (1, 64), (2, 32), (1, 32), (1, 16)):
            if layout.dtype == "int8" and not wide:
                keys = min(keys, 32)  # for want of registers
            setting = cls(pack, 2 if pack == 2 and not wide else 1, keys, 1 if wide and pack == 2 else 2)
            if (even or pack == 1) and setting.shared_bytes(config, layout) <= most << 10:
                return setting
        raise EngineError(f"attention: heads of {config.head_dim} do not fit in shared memory")

    @property
    def threads(self) -> int:
        return TILE_POSITIONS * self.pack // (16 * self.m_tiles) * 32

    def shared_bytes(self, config: Gemma3Config, layout: KVLayout) -> int:
        half_row = _row_bytes(2 * config.head_dim)
        queries, decoded = TILE_POSITIONS * self.pack * half_row, 2 * self.tile_keys * half_row
        stage = decoded
        if layout.dtype == "int8":
            stage = 2 * self.tile_keys * (_row_bytes(config.head_dim) + 4)
        work = 4 * TILE_POSITIONS + _WORK_BYTES
        return queries + 2 * stage + (decoded if layout.dtype == "int8" else 0) + work


@dataclass(frozen=True, slots=True)
class HopperSetting:
    """Macros of hopper_attention.cu. `tile_keys` is part of the arithmetic."""

    tile_keys: int
    """A multiple of 16, up to 256."""
    k_stages: int
    """Tiles of K that are on their way or in use."""
    v_stages: int
    turns: bool = True
    """One warpgroup multiplies while the other takes exponents."""
    values: int = 0
    """Of a head, a multiple of 16, where the rest of it is zeros; 0: all."""

    @classmethod
    def of(cls, config: Gemma3Config, layout: KVLayout, capability: tuple[int, int]) -> HopperSetting | None:
        """None where the card, the heads or the KV are not what the kernel is for."""
        if capability != (9, 0) or layout.dtype != "float16" or config.heads // config.kv_heads % 2:
            return None
        return {128: cls(128, 3, 3), 256: cls(64, 2, 2)}.get(config.head_dim)

    def shared_bytes(self, config: Gemma3Config) -> int:
        """With what the alignment of the copy engine's boxes may take."""
        row = 2 * config.head_dim
        ring = self.tile_keys * (self.k_stages + self.v_stages) * row
        return 2 * 1024 + 2 * TILE_POSITIONS * row + ring


PromptSetting: TypeAlias = "MmaSetting | HopperSetting"


def prompt_setting(config: Gemma3Config, layout: KVLayout, capability: tuple[int, int]) -> PromptSetting:
    """Which kernel prompt chunks go through, and how."""
    return HopperSetting.of(config, layout, capability) or MmaSetting.of(config, layout, capability)


def _row_bytes(size: int) -> int:
    """Of a vector of `size` bytes in shared memory; attention.cuh, Tile::STRIDE."""
    pieces = size // 16
    return 16 * (pieces if pieces % 8 == 0 else pieces | 1)
