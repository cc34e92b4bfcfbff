"""A card, pools of random K and V, and steps over them, with a reference by PyTorch."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.graphs import graph_ms
from wicore.engine.base import KVLayout, Pool
from wicore.engine.tensorrt.attention import Attention, StepTables
from wicore.engine.tensorrt.ceilings import ceilings
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.engine.tensorrt.device import HostBuffer
from wicore.engine.tensorrt.prompt_attention import PoolMemory, prompt_tiles
from wicore.gemma3.config import Gemma3Config, alternating_layers

SHAPES = {  # heads, kv_heads, head_dim, layers, window
    "270m": (4, 1, 256, 18, 512),
    "1b": (4, 1, 256, 26, 512),
    "4b": (8, 4, 256, 34, 1024),
    "12b": (16, 8, 256, 48, 1024),
    "27b": (32, 16, 128, 62, 1024),
}


class Bench:
    """A card, a model's shape, and what is written down."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        heads, kv_heads, width, layers, window = SHAPES[arguments.model]
        self.config = Gemma3Config(
            hidden_size=64,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=width,
            intermediate_size=64,
            vocab_size=64,
            max_context=131072,
            sliding_window=window,
            layer_kinds=alternating_layers(layers),
            query_pre_attn_scalar=width,
        )
        counts = self.config.global_layers, self.config.window_layers
        self.layout = KVLayout(
            arguments.block_tokens, *counts, kv_heads, width, window=window, dtype=arguments.kv
        )
        torch.cuda.init()
        self.device = CudaDevice()
        self.stream = self.device.stream()
        self.record = Path(os.environ["OUT"]) / "attention.jsonl" if os.environ.get("OUT") else None
        self.copy_rate = ceilings(self.device)["copy_bytes_s"] / 1e12
        self.model, self.kv = arguments.model, arguments.kv
        self.note(kind="card", name=self.device.name, sms=self.device.sms, copy_tb_s=self.copy_rate)

    def note(self, **line: Any) -> None:
        if self.record:
            with self.record.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def time_ms(self, work: Callable[[], None], repeats: int = 7) -> float:
        """Milliseconds of what `work` enqueues, as a graph: the median of some runs."""
        work()
        return graph_ms(self.device, self.stream, work, repeats)


class Step:
    """Some sequences of `context` tokens with `rows` new ones each, over random pools.

    streamed: of a single sequence: how many of its first blocks are in pinned host memory.
    """

    def __init__(
        self,
        bench: Bench,
        sequences: int,
        context: int,
        rows: int = 1,
        *,
        streamed: int = 0,
        **settings: Any,
    ) -> None:
        self.bench, self.rows, self.context = bench, sequences * rows, context
        config, layout, size = bench.config, bench.layout, bench.layout.block_tokens
        first = max(0, context - rows - layout.window + 1) // size
        counts = {"global": -(-context // size), "window": -(-context // size) - first}
        generator = np.random.default_rng(1)
        ints = lambda x: self.keep(torch.from_numpy(np.ascontiguousarray(x, np.int32)).cuda())  # noqa: E731
        self.kept: list[torch.Tensor] = []
        self.positions = np.tile(np.arange(context - rows, context), sequences)
        self.order = {
            pool: generator.permutation(sequences * count).astype(np.int32) for pool, count in counts.items()
        }
        self.counts, self.first = counts, first
        self.tables = StepTables(
            ids=0,
            positions=ints(self.positions),
            row_seq=ints(np.repeat(np.arange(sequences), rows)),
            global_offset=ints(np.arange(sequences) * counts["global"]),
            window_offset=ints(np.arange(sequences) * counts["window"]),
            window_first=ints(np.full(sequences, first)),
            streamed=ints(np.full(sequences, streamed)),
            global_tables=ints(self.order["global"]),
            window_tables=ints(self.order["window"]),
        )
        self.attention = Attention(
            bench.device, config, layout, self.rows, self.rows, sequences * counts["global"], **settings
        )
        self.pools: dict[str, torch.Tensor] = {}
        self.host: HostBuffer | None = None
        for pool in ("global", "window"):
            data = torch.empty(
                sequences * counts[pool], layout.block_bytes(pool), dtype=torch.uint8, device="cuda"
            )
            if layout.dtype == "float16":
                data.view(torch.float16).normal_()
            else:
                data.fill_(0x3C)
                data[:, ::3].random_(0, 0x3D)
                data.view(-1, 4)[:, 3] = 0x3C
            self.pools[pool] = data
            host, count = self.on_host(data, self.order[pool], streamed if pool == "global" else 0)
            self.attention.bind(
                PoolMemory(pool, data.data_ptr(), host, layout.block_bytes(pool), len(data), count)
            )
        shape = (self.rows, config.heads, config.head_dim)
        self.q = torch.randn(shape, dtype=torch.float16, device="cuda") * 2 * config.head_dim**-0.5
        self.out = torch.full(shape, float("nan"), dtype=torch.float16, device="cuda")
        wide = config.heads + 2 * config.kv_heads
        self.qkv = torch.randn(self.rows, wide, config.head_dim, dtype=torch.float16, device="cuda")
        self.norm = torch.ones(config.head_dim, device="cuda")
        torch.cuda.synchronize()

    def keep(self, tensor: torch.Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def on_host(self, data: torch.Tensor, order: np.ndarray, count: int) -> tuple[int, int]:
        """A pinned copy of a pool, from which the sequence's first `count` blocks are read: on the device
        they are no numbers from now on. Its address and its blocks."""
        if not count:
            return 0, 0
        self.host = self.bench.device.allocate_host(data.numel())
        self.host.array[:] = data.cpu().numpy().reshape(-1)
        self.unread = torch.from_numpy(order[:count]).cuda().long()
        self.read_by_reference = data.clone()
        data[self.unread] = 0xFF
        return self.host.address, len(data)

    def close(self) -> None:
        self.attention.close()
        if self.host is not None:
            self.host.free()
        self.pools.clear()
        del self.q, self.out, self.qkv
        torch.cuda.empty_cache()

    def layers(self, pools: Sequence[Pool]) -> list[tuple[Pool, int]]:
        """In the order of the model's layers."""
        found: list[tuple[Pool, int]] = []
        for kind in self.bench.config.layer_kinds:
            if kind in pools:
                found.append((kind, sum(pool == kind for pool, _ in found)))
        return found

    def decode(self, pools: Sequence[Pool] = ("global", "window"), mass: bool = True) -> None:
        a, stream, address = self.attention, self.bench.stream, (self.q.data_ptr(), self.out.data_ptr())
        for pool, layer in self.layers(pools):
            a.decode(stream, self.rows, pool, layer, *address, self.tables, mass=mass)

    def append(self, pool: Pool, layer: int) -> None:
        norm = self.norm.data_ptr()
        addresses = self.qkv.data_ptr(), norm, norm, self.q.data_ptr()
        self.attention.append(self.bench.stream, self.rows, pool, layer, *addresses, self.tables)

    def append_and_decode(self) -> None:
        a, stream, address = self.attention, self.bench.stream, (self.q.data_ptr(), self.out.data_ptr())
        for pool, layer in self.layers(("global", "window")):
            self.append(pool, layer)
            a.decode(stream, self.rows, pool, layer, *address, self.tables)

    def schedule(self) -> None:
        self.attention.schedule(self.bench.stream, self.rows, self.tables)

    def bytes_read(self, pools: Sequence[Pool]) -> int:
        layout = self.bench.layout
        vector = 2 * layout.kv_heads * layout.vector_bytes
        seen = {"global": self.positions + 1, "window": np.minimum(self.positions + 1, layout.window)}
        return sum(vector * int(seen[pool].sum()) for pool, _ in self.layers(pools))

    def reference(self, pool: Pool, layer: int, row: int) -> torch.Tensor:
        """Attention of one row of one of the sequences, float32 [heads][head_dim]."""
        layout, config = self.bench.layout, self.bench.config
        per_sequence = self.rows * self.counts[pool] // len(self.order[pool])
        sequence, position = row // per_sequence, int(self.positions[row])
        blocks = self.order[pool][sequence * self.counts[pool] :][: self.counts[pool]]
        start = self.first * layout.block_tokens if pool == "window" else 0
        size = layout.kv_heads * layout.block_tokens * layout.vector_bytes
        found = []
        for part in range(2):
            at = (2 * layer + part) * size
            whole = self.read_by_reference if pool == "global" and self.host else self.pools[pool]
            data = whole[torch.from_numpy(blocks).cuda().long()][:, at : at + size]
            shape = (len(blocks), layout.kv_heads, layout.block_tokens)
            codes = layout.kv_heads * layout.block_tokens * layout.head_dim
            if layout.dtype == "int8":
                x = data[:, :codes].contiguous().view(torch.int8).float().reshape(*shape, layout.head_dim)
                x *= data[:, codes:].contiguous().view(torch.float32).reshape(*shape, 1)
            else:
                x = data.contiguous().view(torch.float16).float().reshape(*shape, layout.head_dim)
            x = x.transpose(0, 1).reshape(layout.kv_heads, -1, layout.head_dim)
            low = max(0, position - layout.window + 1) if pool == "window" else 0
            x = x[:, low - start : position + 1 - start]
            found.append(x.repeat_interleave(config.heads // config.kv_heads, 0))
        scores = torch.einsum("hd,hkd->hk", self.q[row].float(), found[0])
        return torch.einsum("hk,hkd->hd", scores.softmax(-1), found[1])

    def error(self, pool: Pool, layer: int, rows: Sequence[int]) -> float:
        """Largest error of `out`, in units of the reference's standard deviation."""
        self.bench.stream.synchronize()
        errors = []
        for row in rows:
            expected = self.reference(pool, layer, row)
            errors.append(float((self.out[row].float() - expected).abs().max() / expected.std()))
        return float(np.max(errors))

    def prefill_flops(self, pool: Pool) -> int:
        """Of a layer: the two products with every key that a row sees."""
        config, seen = self.bench.config, self.positions + 1
        pairs = int((np.minimum(seen, self.bench.layout.window) if pool == "window" else seen).sum())
        return 4 * config.head_dim * config.heads * pairs

    def prefill_work(self, chunk: int) -> tuple[int, int]:
        tiles = prompt_tiles([(0, chunk, 0, self.context - chunk)])
        return self.keep(torch.from_numpy(tiles).cuda()), len(tiles)
