"""Paged pools with known K and V, steps over them, and what attention must give, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import KVLayout, Pool
from wicore.engine.tensorrt.attention import MASS_ONLY, Attention, StepTables
from wicore.engine.tensorrt.device import Buffer, Device
from wicore.engine.tensorrt.prompt_attention import PoolMemory, prompt_tiles
from wicore.gemma3.config import Gemma3Config, alternating_layers

Float = NDArray[np.float64]
POISON = 0xFF
"""Bytes of what was never written: NaN as half and as float."""


def model(heads: int, kv_heads: int, head_dim: int, *, window: int = 48, layers: int = 4) -> Gemma3Config:
    """A model of which only attention matters; every other layer is global."""
    return Gemma3Config(
        hidden_size=64,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=64,
        vocab_size=64,
        max_context=1 << 20,
        sliding_window=window,
        layer_kinds=alternating_layers(layers, 2),
        query_pre_attn_scalar=head_dim,
        rope_scale=8.0,
    )


def layout_of(config: Gemma3Config, block_tokens: int = 16, dtype: str = "float16") -> KVLayout:
    counts = config.global_layers, config.window_layers
    return KVLayout(
        block_tokens, *counts, config.kv_heads, config.head_dim, window=config.sliding_window, dtype=dtype
    )


def half(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> NDArray[np.float16]:
    return (rng.standard_normal(shape) * scale).astype(np.float16)


class Memory:
    """Buffers of a device, written and read as arrays."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.stream = device.stream()
        self._buffers: dict[int, Buffer] = {}

    def upload(self, array: NDArray[Any]) -> int:
        data = np.ascontiguousarray(array)
        address = self.allocate(max(data.nbytes, 4))
        if data.nbytes:
            self.device.copy(address, data.ctypes.data, data.nbytes, self.stream)
        self.stream.synchronize()
        return address

    def allocate(self, size: int) -> int:
        """Filled with POISON."""
        buffer = self.device.allocate(size, "test")
        self._buffers[buffer.address] = buffer
        self.device.fill(buffer.address, POISON, size, self.stream)
        return buffer.address

    def close(self) -> None:
        for buffer in self._buffers.values():
            buffer.free()

    def read(self, address: int, shape: Sequence[int], dtype: Any) -> NDArray[Any]:
        found = np.empty(shape, dtype)
        self.device.copy(found.ctypes.data, address, found.nbytes, self.stream)
        self.stream.synchronize()
        return found


class Blocks:
    """The bytes of one pool's blocks, and the vectors in them."""

    def __init__(self, layout: KVLayout, pool: Pool, count: int) -> None:
        self.layout, self.pool = layout, pool
        self.data = np.full((count, layout.block_bytes(pool)), POISON, np.uint8)

    def write(self, block: int, offset: int, layer: int, part: int, vectors: NDArray[Any]) -> Float:
        """Store vectors [kv_heads, n, head_dim] at positions offset.. of a block; what is then stored."""
        count = vectors.shape[1]
        codes, scales = self._views(block, layer, part)
        if scales is None:
            codes[:, offset : offset + count] = vectors
            return codes[:, offset : offset + count].astype(np.float64)
        scale = np.abs(vectors).astype(np.float32).max(-1) / np.float32(127)
        scales[:, offset : offset + count] = scale
        safe = np.where(scale > 0, scale, 1)[..., None]
        codes[:, offset : offset + count] = np.rint(vectors.astype(np.float32) / safe)
        return self.read(block, offset, layer, part, count)

    def read(self, block: int, offset: int, layer: int, part: int, count: int = 1) -> Float:
        codes, scales = self._views(block, layer, part)
        found = codes[:, offset : offset + count].astype(np.float64)
        return (
            found if scales is None else found * scales[:, offset : offset + count, None].astype(np.float64)
        )

    def put_back(self, before: Blocks, block: int, offset: int, layer: int, part: int) -> None:
        """Make one position's bytes those of `before`."""
        for mine, other in zip(
            self._views(block, layer, part), before._views(block, layer, part), strict=True
        ):
            if mine is not None and other is not None:
                mine[:, offset] = other[:, offset]

    def _views(self, block: int, layer: int, part: int) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        layout = self.layout
        vectors = layout.kv_heads * layout.block_tokens
        size = vectors * layout.vector_bytes
        data = self.data[block, (2 * layer + part) * size :][:size]
        code_bytes = size - 4 * vectors * (layout.dtype == "int8")
        codes = data[:code_bytes].view(layout.dtype)
        shape = layout.kv_heads, layout.block_tokens
        scales = data[code_bytes:].view(np.float32).reshape(shape) if layout.dtype == "int8" else None
        return codes.reshape(*shape, layout.head_dim), scales


@dataclass
class Text:
    """A sequence in a step: its rows are at `positions`; K and V of all up to the last are in the pool."""

    positions: Sequence[int]
    streamed: int = 0
    images: Sequence[tuple[int, int]] = ()
    """[start, end) positions of images."""
    vectors: dict[tuple[Pool, int, int], Float] = field(default_factory=dict)
    """[kv_heads, positions, head_dim] by pool, layer and part."""

    @property
    def length(self) -> int:
        return max(max(self.positions) + 1, max((end for _, end in self.images), default=0))


class Step:
    """Pools, tables and q of some sequences on a device, in a random order of blocks.

    padding: rows at position -1 after all others.
    """

    def __init__(
        self,
        device: Device,
        config: Gemma3Config,
        layout: KVLayout,
        sequences: Sequence[Text],
        *,
        seed: int = 0,
        padding: int = 0,
        place: int = 0,
        **settings: Any,
    ) -> None:
        """`seed` decides q, K and V of each sequence by its index; `place` where blocks lie."""
        self.config, self.layout, self.sequences = config, layout, sequences
        self.memory = Memory(device)
        rng = np.random.default_rng((seed, place, 1))
        self._tables(rng)
        self._fill(seed)
        self.positions = np.array([p for s in sequences for p in s.positions] + [-1] * padding, np.int32)
        self.row_seq = np.array(
            [i for i, s in enumerate(sequences) for _ in s.positions] + [0] * padding, np.int32
        )
        self.rows = len(self.positions)
        shape = config.heads, config.head_dim
        scale = config.head_dim**-0.5 * 2
        q = [half(np.random.default_rng((seed, i, p)), *shape, scale=scale) for i, p in self._rows()]
        self.q = np.stack(q + [np.full(shape, np.nan, np.float16)] * padding)
        ends = [self._image_end(i, p) for i, p in self._rows()] + [0] * padding
        upload = self.memory.upload
        self.tables = StepTables(
            ids=0,
            positions=upload(self.positions),
            row_seq=upload(self.row_seq),
            global_offset=upload(self.global_offset),
            window_offset=upload(self.window_offset),
            window_first=upload(self.window_first),
            streamed=upload(np.array([s.streamed for s in sequences], np.int32)),
            global_tables=upload(self.global_table),
            window_tables=upload(self.window_table),
            image_end=upload(np.array(ends, np.int32)) if any(ends) else 0,
        )
        self.q_address = upload(self.q)
        self.out = self.memory.allocate(self.q.nbytes)
        settings = {"mass_blocks": self.rows * len(self.global_table)} | settings
        self.attention = Attention(
            device, config, layout, self.rows, self.rows, len(self.global_table), **settings
        )
        self.device_address = {pool: upload(self.blocks[pool].data) for pool in self.blocks}
        self.host = device.allocate_host(max(1, self.host_blocks.data.nbytes))
        self.host.array[: self.host_blocks.data.nbytes] = self.host_blocks.data.reshape(-1)
        for pool in self.blocks:
            host = self.host.address if pool == "global" else 0
            host_blocks = len(self.host_blocks.data) if host else 0
            self.attention.bind(
                PoolMemory(
                    pool,
                    self.device_address[pool],
                    host,
                    layout.block_bytes(pool),
                    device_blocks=len(self.blocks[pool].data),
                    host_blocks=host_blocks,
                )
            )

    def close(self) -> None:
        self.attention.close()
        self.memory.close()
        self.host.free()

    def _rows(self) -> list[tuple[int, int]]:
        return [(i, p) for i, s in enumerate(self.sequences) for p in s.positions]

    def _image_end(self, sequence: int, position: int) -> int:
        ends = [end for start, end in self.sequences[sequence].images if start <= position < end]
        return ends[0] if ends else 0

    def _tables(self, rng: np.random.Generator) -> None:
        size = self.layout.block_tokens
        offsets: list[tuple[int, int, int]] = []
        global_table: list[int] = []
        window_table: list[int] = []
        counts = [-(-s.length // size) for s in self.sequences]
        firsts = [max(0, min(s.positions) - self.config.sliding_window + 1) // size for s in self.sequences]
        on_device = sum(n - s.streamed for n, s in zip(counts, self.sequences, strict=True))
        on_host = sum(s.streamed for s in self.sequences)
        windows = sum(n - first for n, first in zip(counts, firsts, strict=True))
        free, host_free, window_free = (list(rng.permutation(n + 3)) for n in (on_device, on_host, windows))
        for sequence, count, first in zip(self.sequences, counts, firsts, strict=True):
            offsets.append((len(global_table), len(window_table), first))
            global_table += [host_free.pop() for _ in range(sequence.streamed)]
            global_table += [free.pop() for _ in range(count - sequence.streamed)]
            window_table += [window_free.pop() for _ in range(count - first)]
        columns = np.array(offsets, np.int32).T.copy()
        self.global_offset, self.window_offset, self.window_first = columns
        self.global_table = np.array(global_table, np.int32)
        self.window_table = np.array(window_table, np.int32)
        self.blocks: dict[Pool, Blocks] = {
            "global": Blocks(self.layout, "global", on_device + 3),
            "window": Blocks(self.layout, "window", windows + 3),
        }
        self.host_blocks = Blocks(self.layout, "global", on_host + 3)

    def _fill(self, seed: int) -> None:
        layout, size = self.layout, self.layout.block_tokens
        for index, sequence in enumerate(self.sequences):
            layers: list[tuple[Pool, int]] = [("global", i) for i in range(layout.global_layers)]
            layers += [("window", i) for i in range(layout.window_layers)]
            for pool, layer in layers:
                for part in range(2):
                    rng = np.random.default_rng((seed, index, layer, part, pool == "global"))
                    x = half(rng, layout.kv_heads, sequence.length, layout.head_dim)
                    stored = np.full(x.shape, np.nan)
                    for logical in range(-(-sequence.length // size)):
                        at = self.entry(index, pool, logical)
                        if at is None:
                            continue
                        part_of = slice(logical * size, min(sequence.length, (logical + 1) * size))
                        stored[:, part_of] = at[0].write(at[1], 0, layer, part, x[:, part_of])
                    sequence.vectors[pool, layer, part] = stored

    def entry(self, sequence: int, pool: Pool, logical: int) -> tuple[Blocks, int] | None:
        """Where a logical block is; None where the sequence has no longer it."""
        if pool == "global":
            streamed = logical < self.sequences[sequence].streamed
            block = self.global_table[self.global_offset[sequence] + logical]
            return (self.host_blocks if streamed else self.blocks["global"]), int(block)
        logical -= int(self.window_first[sequence])
        if logical < 0:
            return None
        return self.blocks["window"], int(self.window_table[self.window_offset[sequence] + logical])

    # --- running ----------------------------------------------------------------------------------------

    def decode(
        self, pool: Pool, layer: int = 0, *, indices: Sequence[int] | None = None, mass: bool = True
    ) -> NDArray[np.float16]:
        """out, half [rows][heads][head_dim], of the listed rows (all)."""
        a, stream = self.attention, self.memory.stream
        listed = 0 if indices is None else self.memory.upload(np.array(indices, np.int32))
        count = self.rows if indices is None else len(indices)
        a.schedule(stream, count, self.tables, listed)
        a.decode(stream, count, pool, layer, self.q_address, self.out, self.tables, mass=mass)
        return self.output()

    def prefill(
        self, pool: Pool, layer: int = 0, chunks: Sequence[tuple[int, int, int, int]] | None = None
    ) -> NDArray[np.float16]:
        """out, of chunks (first row, rows, sequence, position), or of all."""
        if chunks is None:
            firsts = np.cumsum([0] + [len(s.positions) for s in self.sequences])
            chunks = [
                (int(row), len(s.positions), i, s.positions[0])
                for i, (row, s) in enumerate(zip(firsts, self.sequences, strict=False))
            ]
        tiles = prompt_tiles(chunks)
        address, stream = self.memory.upload(tiles), self.memory.stream
        self.attention.prefill(
            stream, address, len(tiles), pool, layer, self.q_address, self.out, self.tables
        )
        return self.output()

    def mass(self, indices: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Mass by entry of the global tables, after all global layers."""
        a, stream = self.attention, self.memory.stream
        a.clear_mass(stream)
        for layer in range(self.layout.global_layers):
            self.decode("global", layer, indices=indices)
        address = a.mass(stream, self.rows if indices is None else len(indices), self.tables)
        return self.memory.read(address, self.global_table.shape, np.float32)

    def clear(self) -> None:
        """Poison the output."""
        self.memory.device.fill(self.out, POISON, self.q.nbytes, self.memory.stream)

    def output(self) -> NDArray[np.float16]:
        return self.memory.read(self.out, self.q.shape, np.float16)

    # --- what must come out -------------------------------------------------------------------------------

    def weights(self, row: int, pool: Pool, layer: int = 0) -> tuple[Float, int]:
        """Softmax [heads, keys] of one row, and the position of its first key."""
        sequence, position = int(self.row_seq[row]), int(self.positions[row])
        first = max(0, position - self.config.sliding_window + 1) if pool == "window" else 0
        end = max(position + 1, self._image_end(sequence, position))
        keys = self.sequences[sequence].vectors[pool, layer, 0][:, first:end]
        group = self.config.heads // self.config.kv_heads
        scores = np.einsum("hd,hkd->hk", self.q[row].astype(np.float64), np.repeat(keys, group, 0))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True), first

    def expected(self, row: int, pool: Pool, layer: int = 0) -> Float:
        """[heads, head_dim]"""
        weights, first = self.weights(row, pool, layer)
        values = self.sequences[int(self.row_seq[row])].vectors[pool, layer, 1]
        values = values[:, first : first + weights.shape[1]]
        group = self.config.heads // self.config.kv_heads
        found: Float = np.einsum("hk,hkd->hd", weights, np.repeat(values, group, 0))
        return found

    def expected_mass(self, row: int) -> Float:
        """By entry of the global tables: the mean over heads and global layers."""
        total = np.zeros(len(self.global_table))
        offset = int(self.global_offset[self.row_seq[row]])
        for layer in range(self.layout.global_layers):
            weights, _ = self.weights(row, "global", layer)
            np.add.at(
                total, offset + np.arange(weights.shape[1]) // self.layout.block_tokens, weights.mean(0)
            )
        return total / self.layout.global_layers

    def check_mass(self, rows: Sequence[int]) -> None:
        """Of a step all of whose rows are listed."""
        found = self.mass()
        assert abs(found.sum() - len(rows)) < 1e-3
        expected = sum(self.expected_mass(row) for row in rows)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)

    def check(
        self, found: NDArray[np.float16], pool: Pool, layer: int = 0, rows: Sequence[int] | None = None
    ) -> None:
        for row in range(self.rows) if rows is None else rows:
            if self.positions[row] < 0:
                assert np.isnan(found[row]).all(), f"row {row} is padding"
            else:
                np.testing.assert_allclose(
                    found[row], self.expected(row, pool, layer), rtol=4e-3, atol=4e-3, err_msg=f"row {row}"
                )


def mass_only(row: int) -> int:
    return row | MASS_ONLY
