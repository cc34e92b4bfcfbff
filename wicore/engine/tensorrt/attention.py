"""Attention over the paged KV pool: RoPE, KV append, single rows, prompt chunks and attention mass.

The kernels are kernels/rope.cu, decode_attention.cu and those of `prompt_attention`. Methods only enqueue
work on the stream they are given; addresses are of device memory. Array shapes use the names of
`Gemma3Config`.

Invariance: what `decode` writes for a row depends on that row's q and the K and V that it sees, and on
nothing else, to the bit. The same is true of `prefill`; the two differ from each other by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from wicore.engine.base import KVLayout, Pool
from wicore.engine.tensorrt.attention_settings import (
    MERGE_THREADS,
    DecodeSetting,
    PromptSetting,
    prompt_setting,
)
from wicore.engine.tensorrt.device import Buffer, Device
from wicore.engine.tensorrt.prompt_attention import PagedLayer, PoolMemory, prompt_attention
from wicore.errors import EngineError
from wicore.gemma3.config import Gemma3Config
from wicore.gemma3.rope import inverse_frequencies

MASS_ONLY = 1 << 30
"""Added to a row's index in `schedule`: its attention mass is wanted, not its output."""

_LIST_ROWS = 64
"""Listed rows that share scratch; more are launched group by group."""

_SCHEDULE_THREADS = 1024
_ITEM_BYTES, _ENTRY_BYTES = 48, 32
_EVERYTHING = 1 << 30
"""The window of layers that have none."""


@dataclass(frozen=True, slots=True)
class StepTables:
    """Device addresses of a step's int32 arrays, of M rows and B sequences."""

    ids: int
    """[M] token ids"""
    positions: int
    """[M]; -1 in padding rows, for which nothing is read or written"""
    row_seq: int
    """[M] the row's sequence; rows of one sequence follow each other, in order of position"""
    global_offset: int
    """[B] where the sequence's table begins in `global_tables`"""
    window_offset: int
    window_first: int
    """[B] logical block of the sequence's first entry in `window_tables`"""
    streamed: int
    """[B] how many first entries of its global table are rows of pinned host memory"""
    global_tables: int
    window_tables: int
    image_end: int = 0
    """[M] where the image ends that the row's token is part of, as a position; 0 for text. The address 0:
    text only."""


class Attention:
    """The attention of all layers of one model, for steps of at most `max_rows` rows, of which `schedule` is
    given at most `listed_rows`, and whose global tables have at most `max_table` entries together.

    A layer is named by its pool and its index among that pool's layers. Per step: `rope` and `schedule`; then
    for each layer `append`, and `decode`, `prefill` or both; at the end `mass`.

    mass_blocks: blocks of context, summed over listed rows, that attention mass can be counted for in a step.
    The last listed row of each sequence comes first; rows that no longer fit are left out.
    """

    def __init__(
        self,
        device: Device,
        config: Gemma3Config,
        layout: KVLayout,
        max_rows: int,
        listed_rows: int,
        max_table: int,
        *,
        mass_blocks: int | None = None,
        decode_setting: DecodeSetting | None = None,
        prefill_setting: PromptSetting | None = None,
    ) -> None:
        """Compiles the kernels and takes the scratch. Raises EngineError for a shape they cannot do."""
        _check(config, layout)
        self._device, self._config, self._layout = device, config, layout
        self._max_rows, self._max_table = max_rows, max_table
        self._listed_rows = listed_rows
        self._mass_blocks = min(max_table, 1 << 17) if mass_blocks is None else mass_blocks
        self._decode_setting = decode_setting or DecodeSetting.of(config, layout, device.capability)
        self._prefill_setting = prefill_setting or prompt_setting(config, layout, device.capability)
        self._pools: dict[Pool, PoolMemory] = {}
        self._just_scheduled = False
        """Whether nothing of this was enqueued since `schedule`."""
        self._buffers: list[Buffer] = []
        self._compile()
        self._reserve()

    def _compile(self) -> None:
        config, layout, d = self._config, self._layout, self._decode_setting
        shape: dict[str, int | str] = {
            "HEADS": config.heads,
            "KV_HEADS": config.kv_heads,
            "HEAD_DIM": config.head_dim,
            "BLOCK_TOKENS": layout.block_tokens,
            "INT8": int(layout.dtype == "int8"),
        }
        rope = self._device.compile("rope.cu", shape)
        self._rope_table, self._append_kv = rope.function("rope_table"), rope.function("append_kv")
        self._decode_shared = d.shared_bytes(config, layout)
        decode = self._device.compile(
            "decode_attention.cu",
            {
                **shape,
                "WARPS": d.warps,
                "TILES": d.tiles,
                "MIN_BLOCKS": d.blocks,
                "SPAN": d.span,
                "ROWS": _LIST_ROWS,
                "MAX_SPANS": d.max_spans,
                "MERGE_PARTS": d.merge_parts,
            },
        )
        self._schedule = decode.function("schedule")
        self._decode = decode.function("decode_attention", self._decode_shared)
        self._merge = decode.function("merge_spans", d.merge_shared_bytes(config))
        self._mass_of_sequences = decode.function("mass_of_sequences")
        self._prompt = prompt_attention(
            self._device, config, layout, shape, self._max_rows, self._prefill_setting
        )

    def _reserve(self) -> None:
        config, setting = self._config, self._decode_setting
        max_rows, listed = self._max_rows, self._listed_rows
        group_rows = min(listed, _LIST_ROWS)
        self._groups = -(-listed // _LIST_ROWS)
        self._group_items = _LIST_ROWS * setting.max_spans
        slots = group_rows * setting.max_spans
        half = config.head_dim // 2
        self._cosines = self._allocate(2 * max_rows * half * 4)
        self._sines = self._allocate(2 * max_rows * half * 4)
        self._entries = self._allocate(listed * _ENTRY_BYTES)
        self._items = self._allocate(2 * self._groups * self._group_items * _ITEM_BYTES)
        self._counts = self._allocate(2 * self._groups * 4)
        self._acc = self._allocate(slots * config.heads * config.head_dim * 4)
        self._ml = self._allocate(slots * config.heads * 8)
        self._mass_tiles = self._mass_blocks * (self._layout.block_tokens // 16)
        self._tile_mass = self._allocate(self._mass_tiles * config.heads * 4)
        self._head_mass = self._allocate(self._mass_blocks * config.kv_heads * 4)
        self._mass = self._allocate(self._max_table * 4)
        frequencies = np.stack([inverse_frequencies(config, kind) for kind in _KINDS])
        self._frequencies = self._allocate(frequencies.nbytes)
        stream = self._device.stream()
        self._device.copy(self._frequencies, frequencies.ctypes.data, frequencies.nbytes, stream)
        stream.synchronize()

    def _allocate(self, size: int) -> int:
        buffer = self._device.allocate(max(size, 16), "attention scratch")
        self._buffers.append(buffer)
        return buffer.address

    def bind(self, memory: PoolMemory) -> None:
        """Use this memory for a pool from now on (graphs keep what they were captured with)."""
        self._prompt.bind(memory)
        self._pools[memory.pool] = memory

    def close(self) -> None:
        """Give the scratch back."""
        for buffer in self._buffers:
            buffer.free()
        self._buffers.clear()

    # --- once a step ----------------------------------------------------------------------------------

    def rope(self, stream: Any, rows: int, tables: StepTables) -> None:
        """The RoPE tables of rows 0 .. rows - 1, for `append`."""
        threads = 2 * rows * self._config.head_dim // 2
        args = (
            *(np.int32(rows), np.int32(self._max_rows), tables.positions, self._frequencies),
            *(self._cosines, self._sines),
        )
        self._rope_table(stream, -(-threads // 128), 128, args)

    def schedule(self, stream: Any, rows: int, tables: StepTables, indices: int = 0) -> None:
        """The work lists of `decode`, `mass` for `rows` rows of the step.

        indices: device address of int32 [rows]: the index of each listed row; plus MASS_ONLY for one whose
        mass is wanted and whose output is not; -1 for none. Those of one sequence follow each other. The
        address 0: rows 0 .. rows - 1.
        """
        self._check_rows(rows)
        args = (
            *(np.int32(rows), np.int32(self._groups), indices, tables.positions, tables.row_seq),
            *(tables.image_end, tables.global_offset, tables.window_offset, tables.window_first),
            *(tables.streamed, np.int32(self._layout.window), np.int32(self._mass_blocks)),
            *(self._entries, self._items, self._counts),
        )
        threads = min(_SCHEDULE_THREADS, -(-rows // _LIST_ROWS) * _LIST_ROWS)
        self._schedule(stream, 1, threads, args, dynamic_shared=3 * threads * 4)
        self._just_scheduled = True

    # --- a layer --------------------------------------------------------------------------------------

    def append(
        self,
        stream: Any,
        rows: int,
        pool: Pool,
        layer: int,
        qkv: int,
        q_norm: int,
        k_norm: int,
        q: int,
        tables: StepTables,
    ) -> None:
        """QK-norm and RoPE; K and V into the pool.

        qkv: half [rows][(heads + 2 kv_heads) * head_dim]; q_norm, k_norm: float32 [head_dim], the factors
        (q's with the scale of attention); q, written: half [rows][heads][head_dim].
        """
        config, kind = self._config, _KINDS.index(pool)
        memory = self._pools[pool]
        half = config.head_dim // 2
        rotation = 4 * kind * self._max_rows * half
        offset, first, entries = self._table_arguments(pool, tables)
        args = (
            *(np.int32(rows), qkv, q_norm, k_norm, np.float32(config.rms_norm_eps)),
            *(self._cosines + rotation, self._sines + rotation, q),
            *(memory.device_address + self._layer_offset(layer), np.int64(memory.block_bytes)),
            *(tables.positions, tables.row_seq, offset, first, entries),
        )
        lanes = 1
        while lanes * 8 < half:
            lanes *= 2
        threads = rows * (config.heads + 2 * config.kv_heads) * lanes
        self._append_kv(stream, -(-threads // 128), 128, args)
        self._just_scheduled = False

    def decode(
        self,
        stream: Any,
        rows: int,
        pool: Pool,
        layer: int,
        q: int,
        out: int,
        tables: StepTables,
        *,
        mass: bool = True,
    ) -> None:
        """Attention of the `rows` rows that `schedule` listed, one by one.

        q, out: half [rows of the step][heads][head_dim]. mass: count attention mass, where the pool is
        global; layer 0 begins the count, so switch it the same way in all layers of a step.
        """
        self._check_rows(rows)
        config, setting, kind = self._config, self._decode_setting, _KINDS.index(pool)
        memory, offset = self._pools[pool], self._layer_offset(layer)
        counted = mass and pool == "global"
        tile_mass = self._tile_mass if counted else 0
        entries = tables.global_tables if pool == "global" else tables.window_tables
        for group in range(-(-rows // _LIST_ROWS)):
            listed = min(rows - group * _LIST_ROWS, _LIST_ROWS)
            which = kind * self._groups + group
            args = (
                *(q, memory.device_address + offset, memory.host_address + offset),
                *(np.int64(memory.block_bytes), entries),
                *(self._items + which * self._group_items * _ITEM_BYTES, self._counts + 4 * which),
                *(self._acc, self._ml, tile_mass, np.int64(self._mass_tiles)),
            )
            # The kernel reads the lists before it waits for the launch ahead of it.
            self._decode(
                stream,
                self._device.sms * setting.blocks,
                setting.warps * 32,
                args,
                dynamic_shared=self._decode_shared,
                dependent=not self._just_scheduled,
            )
            self._just_scheduled = False
            merge_args = (
                *(self._entries + group * _LIST_ROWS * _ENTRY_BYTES, np.int32(kind), self._acc, self._ml),
                *(tile_mass, np.int64(self._mass_tiles), out),
                *(self._head_mass, np.int64(self._mass_blocks), np.int32(layer == 0)),
            )
            self._merge(
                stream,
                listed * config.kv_heads * setting.merge_parts,
                MERGE_THREADS,
                merge_args,
                dynamic_shared=setting.merge_shared_bytes(config),
            )

    def prefill(
        self,
        stream: Any,
        tiles_address: int,
        tile_count: int,
        pool: Pool,
        layer: int,
        q: int,
        out: int,
        tables: StepTables,
    ) -> None:
        """Attention of prompt chunks, by tiles: int32 [tile_count][4] as `prompt_tiles` makes them.

        q, out: half [rows of the step][heads][head_dim]; q has room for `max_rows`. Counts no mass: list a
        chunk's last row in `schedule` with MASS_ONLY for a sample of it.
        """
        is_global = pool == "global"
        offset, first, entries = self._table_arguments(pool, tables)
        view = PagedLayer(
            memory=self._pools[pool],
            layer_offset=self._layer_offset(layer),
            tables=entries,
            table_offset=offset,
            table_first=first,
            streamed=tables.streamed if is_global else 0,
            window=_EVERYTHING if is_global else self._layout.window,
            image_end=tables.image_end,
        )
        self._prompt(stream, tiles_address, tile_count, view, q, out)

    # --- mass -----------------------------------------------------------------------------------------

    def clear_mass(self, stream: Any) -> None:
        """Forget the mass of the steps so far."""
        self._device.fill(self._mass, 0, 4 * self._max_table, stream)

    def mass(self, stream: Any, rows: int, tables: StepTables) -> int:
        """Add the mass of the `rows` listed rows, after the last global layer.

        Returns the address of float32 [entries of the global tables]: the sum since `clear_mass`, where each
        row that was counted gives its blocks 1 in all: the mean over heads and global layers. Divided by
        its own sum, a sequence's stretch is the mean over its rows.
        """
        args = (
            *(np.int32(rows), self._entries, tables.row_seq, tables.global_offset, self._head_mass),
            *(np.int64(self._mass_blocks), np.int32(self._layout.global_layers), self._mass),
        )
        self._mass_of_sequences(stream, (4, rows), 128, args)
        return self._mass

    # --------------------------------------------------------------------------------------------------

    def _check_rows(self, rows: int) -> None:
        if not 0 < rows <= self._listed_rows:
            raise ValueError(f"{rows} rows, and there is room for {self._listed_rows}")

    def _layer_offset(self, layer: int) -> int:
        layout = self._layout
        return 2 * layer * layout.block_tokens * layout.kv_heads * layout.vector_bytes

    def _table_arguments(self, pool: Pool, tables: StepTables) -> tuple[int, int, int]:
        """(offset, first, entries)"""
        if pool == "global":
            return tables.global_offset, 0, tables.global_tables
        return tables.window_offset, tables.window_first, tables.window_tables


_KINDS: tuple[Pool, Pool] = ("global", "window")


def _check(config: Gemma3Config, layout: KVLayout) -> None:
    group = config.heads // config.kv_heads
    wrong = [
        text
        for bad, text in (
            (config.heads % config.kv_heads or group > 8, f"{config.heads} heads over {config.kv_heads}"),
            (config.head_dim % 16 or not 0 < config.head_dim <= 256, f"heads of {config.head_dim}"),
            (layout.block_tokens % 16 or layout.block_tokens <= 0, f"blocks of {layout.block_tokens} tokens"),
            (layout.dtype not in ("float16", "int8"), f"KV as {layout.dtype}"),
            (
                (layout.kv_heads, layout.head_dim) != (config.kv_heads, config.head_dim),
                "a layout of another model",
            ),
        )
        if bad
    ]
    if wrong:
        raise EngineError(
            f"attention: {', '.join(wrong)}: expected at most 8 query heads a KV head, heads of a multiple "
            "of 16 up to 256, blocks of a multiple of 16 tokens, and KV as float16 or int8"
        )
