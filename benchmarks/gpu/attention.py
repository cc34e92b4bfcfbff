"""Speed of the attention kernels at the shapes of Gemma 3.

    python benchmarks/gpu/attention.py                      # 27B: correctness, decode, prefill, append
    python benchmarks/gpu/attention.py --model 4b --kv int8
    python benchmarks/gpu/attention.py --tune               # candidates of settings instead

Needs numpy, cuda-bindings and torch, which makes the pools and the reference. Times are of CUDA graph replays
between events: a decode line is the attention of all layers of a step, one launch after the other; "+append"
is the same with QK-norm, RoPE and the KV append of each layer. "mass" is what counting attention mass adds to
the global layers. One JSON line a measurement goes to
$OUT/attention.jsonl where OUT is set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from wicore.engine.base import KVLayout, Pool
from wicore.engine.tensorrt.attention import (
    Attention,
    DecodeSetting,
    PoolMemory,
    PrefillSetting,
    StepTables,
)
from wicore.engine.tensorrt.ceilings import ceilings
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.gemma3.config import Gemma3Config, alternating_layers

SHAPES = {  # heads, kv_heads, head_dim, layers, window
    "270m": (4, 1, 256, 18, 512),
    "1b": (4, 1, 256, 26, 512),
    "4b": (8, 4, 256, 34, 1024),
    "12b": (16, 8, 256, 48, 1024),
    "27b": (32, 16, 128, 62, 1024),
}
DECODE = ((1, 640), (16, 640), (64, 640), (1, 8192), (1, 32768), (1, 131072), (8, 8192))
"""Rows, tokens of context each."""
PREFILL = (1024, 8192)


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

    def time_ms(self, work: Callable[[], None], repeats: int = 7, replays: int = 3) -> float:
        """Milliseconds of what `work` enqueues, as a graph: the median of some runs."""
        work()
        graph = self.device.capture(self.stream, work)
        graph.launch(self.stream)
        times = []
        for _ in range(repeats):
            start, end = self.device.event(timing=True), self.device.event(timing=True)
            start.record(self.stream)
            for _ in range(replays):
                graph.launch(self.stream)
            end.record(self.stream)
            self.stream.synchronize()
            times.append(end.elapsed_ms(start) / replays)
        graph.close()
        return statistics.median(times)


class Step:
    """Some sequences of `context` tokens with `rows` new ones each, over random pools."""

    def __init__(self, bench: Bench, sequences: int, context: int, rows: int = 1, **settings: Any) -> None:
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
            streamed=ints(np.zeros(sequences)),
            global_tables=ints(self.order["global"]),
            window_tables=ints(self.order["window"]),
        )
        self.attention = Attention(
            bench.device, config, layout, self.rows, self.rows, sequences * counts["global"], **settings
        )
        self.pools: dict[str, torch.Tensor] = {}
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
            self.attention.bind(PoolMemory(pool, data.data_ptr(), 0, layout.block_bytes(pool)))
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

    def close(self) -> None:
        self.attention.close()
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
            data = self.pools[pool][torch.from_numpy(blocks).cuda().long()][:, at : at + size]
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

    def prefill_work(self, chunk: int) -> tuple[int, int]:
        tiles = Attention.tiles([(0, chunk, 0, self.context - chunk)])
        return self.keep(torch.from_numpy(tiles).cuda()), len(tiles)


def correctness(bench: Bench, settings: dict[str, Any]) -> None:
    print(f"{'check':28} {'error':>9}   (largest, in standard deviations of the result)")
    for name, sequences, context, rows in (
        ("decode 3 x 700", 3, 700, 1),
        ("decode 1 x 20000", 1, 20000, 1),
        ("prefill 1500 after 500", 1, 2000, 1500),
    ):
        step = Step(bench, sequences, context, rows, **settings)
        checked = [0, step.rows // 2, step.rows - 1]
        for pool in ("global", "window"):
            layer = bench.config.global_layers - 1
            address = step.q.data_ptr(), step.out.data_ptr(), step.tables
            if rows == 1:
                step.schedule()
                step.attention.decode(bench.stream, step.rows, pool, layer, *address)
            else:
                tiles, count = step.prefill_work(rows)
                step.attention.prefill(bench.stream, tiles, count, pool, layer, *address)
            error = step.error(pool, layer, checked)
            mark = "" if error < 0.02 else "  WRONG"
            print(f"{name + ' ' + pool:28} {error:9.1e}{mark}")
            bench.note(kind="check", what=name, pool=pool, error=error)
        if rows == 1:
            total = mass_sum(step)
            print(
                f"{name + ' mass a row':28} {abs(total - 1):9.1e}{'' if abs(total - 1) < 1e-3 else '  WRONG'}"
            )
        step.close()


def mass_sum(step: Step) -> float:
    """What a row's mass sums to."""
    stream = step.bench.stream
    step.schedule()
    step.attention.clear_mass(stream)
    step.decode(("global",))
    address = step.attention.mass(stream, step.rows, step.tables)
    found = np.empty(len(step.order["global"]), np.float32)
    step.bench.device.copy(found.ctypes.data, address, found.nbytes, stream)
    stream.synchronize()
    return float(found.sum()) / step.rows


def decode(bench: Bench, shapes: Sequence[tuple[int, int]], settings: dict[str, Any]) -> None:
    print(
        f"{'decode':>16} {'GB':>6} {'ms':>8} {'TB/s':>6} {'share':>6} {'+append':>8} "
        f"{'us/global':>9} {'TB/s':>6} {'us/window':>9} {'TB/s':>6} {'mass':>6} {'schedule us':>11}"
    )
    for rows, context in shapes:
        step = Step(bench, rows, context, **settings)
        step.schedule()
        both: tuple[Pool, Pool] = ("global", "window")
        ms = bench.time_ms(step.decode)
        one = {pool: bench.time_ms(lambda: step.decode((pool,), False)) for pool in both}  # noqa: B023
        with_mass = bench.time_ms(lambda: step.decode(("global",)))  # noqa: B023
        step.attention.rope(bench.stream, step.rows, step.tables)
        appended = bench.time_ms(step.append_and_decode)
        schedule = bench.time_ms(step.schedule) * 1e3
        size = step.bytes_read(both)
        rate = size / ms / 1e9
        layers = {"global": bench.config.global_layers, "window": bench.config.window_layers}
        us = {pool: one[pool] / layers[pool] * 1e3 for pool in both}
        rates = {pool: step.bytes_read((pool,)) / one[pool] / 1e9 for pool in both}
        mass = with_mass / one["global"] - 1
        cells = [f"{f'{rows} x {context}':>16} {size / 1e9:6.2f} {ms:8.3f} {rate:6.2f}"]
        cells += [f"{rate / bench.copy_rate:6.1%} {appended:8.3f}"]
        cells += [f"{us[pool]:9.1f} {rates[pool]:6.2f}" for pool in both]
        print(*cells, f"{mass:6.1%} {schedule:11.1f}", flush=True)
        bench.note(
            kind="decode", model=bench.model, kv=bench.kv, rows=rows, context=context, ms=ms, tb_s=rate,
            us=us, tb_s_of=rates, mass=mass, append_ms=appended, schedule_us=schedule,
            setting=asdict(settings["decode_setting"]) if settings else None,
        )  # fmt: skip
        step.close()


def prefill(bench: Bench, lengths: Sequence[int], settings: dict[str, Any]) -> None:
    print(f"{'prefill':>16} {'us/global':>9} {'TFLOP/s':>8} {'us/window':>9} {'TFLOP/s':>8}")
    for length in lengths:
        step = Step(bench, 1, length, length, **settings)
        tiles, count = step.prefill_work(length)
        address = step.q.data_ptr(), step.out.data_ptr(), step.tables
        us, rate = {}, {}
        for pool in ("global", "window"):
            layers = min(4, bench.config.global_layers)

            def work() -> None:
                for layer in range(layers):  # noqa: B023
                    step.attention.prefill(bench.stream, tiles, count, pool, layer, *address)  # noqa: B023

            us[pool] = bench.time_ms(work) / layers * 1e3
            seen = step.positions + 1
            pairs = int((np.minimum(seen, bench.layout.window) if pool == "window" else seen).sum())
            rate[pool] = 4 * bench.config.head_dim * bench.config.heads * pairs / us[pool] / 1e6
        print(f"{length:>16}", *(f"{us[pool]:9.1f} {rate[pool]:8.0f}" for pool in us), flush=True)
        bench.note(
            kind="prefill", model=bench.model, kv=bench.kv, length=length, us=us, tflop_s=rate,
            setting=asdict(settings["prefill_setting"]) if settings else None,
        )  # fmt: skip
        step.close()


def append(bench: Bench) -> None:
    config = bench.config
    print(f"{'append':>16} {'us':>8} {'TB/s':>6} {'rope us':>8}")
    for sequences, rows in ((1, 1), (16, 1), (64, 1), (1, 8192)):
        step = Step(bench, sequences, max(640, rows), rows)

        def rope() -> None:
            step.attention.rope(bench.stream, step.rows, step.tables)  # noqa: B023

        def work() -> None:
            for pool, layer in step.layers(("global", "window")):  # noqa: B023
                step.append(pool, layer)  # noqa: B023

        wide = config.heads + 2 * config.kv_heads
        us, rope_us = bench.time_ms(work) * 1e3 / config.layers, bench.time_ms(rope) * 1e3
        size = step.rows * config.head_dim * (2 * wide + 2 * config.heads)
        size += step.rows * 2 * config.kv_heads * bench.layout.vector_bytes
        print(f"{step.rows:>16} {us:8.1f} {size / us / 1e6:6.2f} {rope_us:8.1f}", flush=True)
        bench.note(kind="append", model=bench.model, kv=bench.kv, rows=step.rows, us=us, rope_us=rope_us)
        step.close()


def tune(bench: Bench) -> None:
    """Candidates; what does not fit or compile is skipped."""
    base = DecodeSetting.of(bench.config, bench.layout, bench.device.capability)
    plain = PrefillSetting.of(bench.config, bench.layout, bench.device.capability)
    for warps, tiles, span, blocks in (
        (4, 2, 128, 3), (4, 2, 256, 3), (4, 2, 512, 3), (4, 2, 256, 2), (4, 1, 128, 3), (4, 1, 256, 3),
        (4, 4, 256, 1), (8, 1, 128, 2), (8, 1, 256, 2), (8, 2, 256, 1), (2, 4, 128, 3), (2, 4, 256, 3),
    ):  # fmt: skip
        setting = replace(base, warps=warps, tiles=tiles, span=span, blocks=blocks)
        if setting.shared_bytes(bench.config, bench.layout) > 227 << 10:
            continue
        print(setting)
        try:
            shapes = ((1, 640), (16, 640), (64, 640), (1, 32768))
            decode(bench, shapes, {"decode_setting": setting, "prefill_setting": plain})
        except Exception as err:
            print(f"  failed: {err}")
            if "context is lost" in str(err):
                raise
    for pack, m_tiles, keys, blocks in (
        (2, 2, 64, 2), (2, 2, 32, 2), (2, 1, 64, 1), (2, 1, 32, 1), (2, 1, 32, 2), (1, 1, 64, 2),
        (1, 1, 64, 3), (1, 2, 64, 3), (1, 2, 64, 4), (2, 2, 128, 1),
    ):  # fmt: skip
        prefill_setting = PrefillSetting(pack, m_tiles, keys, blocks)
        if prefill_setting.shared_bytes(bench.config, bench.layout) > 227 << 10:
            continue
        print(prefill_setting)
        try:
            prefill(bench, (8192,), {"decode_setting": base, "prefill_setting": prefill_setting})
        except Exception as err:
            print(f"  failed: {err}")
            if "context is lost" in str(err):
                raise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="27b")
    parser.add_argument("--kv", choices=("float16", "int8"), default="float16")
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    print(
        f"{bench.device.name}: copy {bench.copy_rate:.2f} TB/s; Gemma 3 {arguments.model}, KV {arguments.kv}"
    )
    if arguments.tune:
        tune(bench)
        return
    correctness(bench, {})
    decode(bench, DECODE, {})
    prefill(bench, PREFILL, {})
    append(bench)


if __name__ == "__main__":
    main()
