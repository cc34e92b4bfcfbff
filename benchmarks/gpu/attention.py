"""Speed of the attention kernels at the shapes of Gemma 3.

    python benchmarks/gpu/attention.py                      # 27B: correctness, decode, prefill, append
    python benchmarks/gpu/attention.py --model 4b --kv int8
    python benchmarks/gpu/attention.py --only check,prefill # what a prompt needs, and nothing else
    python benchmarks/gpu/attention.py --tune decode        # candidates of settings instead; or prefill

Needs numpy, cuda-bindings and torch, which makes the pools and the reference. Times are of CUDA graph replays
between events: a decode line is the attention of all layers of a step, one launch after the other; "+append"
is the same with QK-norm, RoPE and the KV append of each layer. "mass" is what counting attention mass adds to
the global layers. A prefill line is one layer of each kind, by each kernel that can do the shape, in turns;
its TFLOP/s count the products of what each row sees, "all ms" is what all layers take. One JSON line a
measurement goes to $OUT/attention.jsonl where OUT is set.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.attention_step import SHAPES, Bench, Step
from wicore.engine.base import Pool
from wicore.engine.tensorrt.attention import StepTables
from wicore.engine.tensorrt.attention_settings import (
    DecodeSetting,
    HopperSetting,
    MmaSetting,
    PromptSetting,
)
from wicore.errors import EngineError

POOLS: tuple[Pool, Pool] = ("global", "window")
DECODE = ((1, 640), (16, 640), (64, 640), (1, 8192), (1, 32768), (1, 131072), (8, 8192))
"""Rows, tokens of context each."""
PREFILL = ((1024, 1024), (8192, 8192), (2048, 32768))
"""New tokens, tokens of context with them."""
HOPPER_TFLOPS = 989
"""Of the data sheet: dense half products of an H100 or H200 SXM."""


def correctness(bench: Bench, settings: dict[str, Any]) -> None:
    print(f"{'check':34} {'error':>9}   (largest, in standard deviations of the result)")
    for name, sequences, context in (("decode 3 x 700", 3, 700), ("decode 1 x 20000", 1, 20000)):
        step = Step(bench, sequences, context, 1, **settings)
        step.schedule()
        for pool, layer, address in checked_layers(step):
            step.attention.decode(bench.stream, step.rows, pool, layer, *address)
            report(step, name, pool, layer)
        total = mass_sum(step)
        print(f"{name + ' mass a row':34} {abs(total - 1):9.1e}{'' if abs(total - 1) < 1e-3 else '  WRONG'}")
        step.close()
    for kernel, setting in prompt_settings(bench).items():
        for what, context, rows, streamed in (
            ("1500 after 500", 2000, 1500, 0),
            ("77 after 3", 80, 77, 0),
            ("4000 after 4193", 8193, 4000, 0),
            ("700 after 2300, streamed", 3000, 700, 90),
        ):
            step = Step(bench, 1, context, rows, streamed=streamed, prefill_setting=setting)
            tiles, count = step.prefill_work(rows)
            for pool, layer, address in checked_layers(step):
                step.attention.prefill(bench.stream, tiles, count, pool, layer, *address)
                report(step, f"{kernel} {what}", pool, layer)
            step.close()


def checked_layers(step: Step) -> Iterator[tuple[Pool, int, tuple[int, int, StepTables]]]:
    """A layer of each kind, and what attention is given besides."""
    for pool in POOLS:
        step.out.fill_(float("nan"))
        torch.cuda.synchronize()
        yield pool, step.bench.config.global_layers - 1, (step.q.data_ptr(), step.out.data_ptr(), step.tables)


def report(step: Step, name: str, pool: Pool, layer: int) -> None:
    """Print how far some rows are off."""
    rows = sorted({0, step.rows - 1, *np.random.default_rng(2).integers(0, step.rows, 30).tolist()})
    error = step.error(pool, layer, rows)
    print(f"{name + ' ' + pool:34} {error:9.1e}{'' if error < 0.02 else '  WRONG'}", flush=True)
    step.bench.note(kind="check", what=name, pool=pool, error=error)


def prompt_settings(bench: Bench) -> dict[str, PromptSetting]:
    """By name, of the kernels that can do the shape."""
    shape = bench.config, bench.layout, bench.device.capability
    found: dict[str, PromptSetting] = {"mma": MmaSetting.of(*shape)}
    if hopper := HopperSetting.of(*shape):
        found["hopper"] = hopper
    return found


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


def prefill(
    bench: Bench, lengths: Sequence[tuple[int, int]], settings: dict[str, PromptSetting], rounds: int = 3
) -> None:
    """Medians of some rounds, in which the kernels take turns."""
    print(
        f"{'prefill':>16} {'kernel':>8} {'us/global':>9} {'TFLOP/s':>8} {'share':>6} "
        f"{'us/window':>9} {'TFLOP/s':>8} {'share':>6} {'all ms':>7}"
    )
    of_pool = {"global": bench.config.global_layers, "window": bench.config.window_layers}
    layers = min(4, bench.config.global_layers)
    for length, context in lengths:
        steps = {name: Step(bench, 1, context, length, prefill_setting=s) for name, s in settings.items()}
        times: dict[tuple[str, Pool], list[float]] = {(name, pool): [] for name in steps for pool in POOLS}
        for _ in range(rounds):
            for name, pool in times:
                step = steps[name]
                tiles, count = step.prefill_work(length)
                address = step.q.data_ptr(), step.out.data_ptr(), step.tables

                def work() -> None:
                    for layer in range(layers):
                        step.attention.prefill(bench.stream, tiles, count, pool, layer, *address)  # noqa: B023

                times[name, pool].append(bench.time_ms(work) / layers * 1e3)
        for name, step in steps.items():
            us = {pool: statistics.median(times[name, pool]) for pool in POOLS}
            rate = {pool: step.prefill_flops(pool) / us[pool] / 1e6 for pool in POOLS}
            ms = sum(us[pool] * of_pool[pool] for pool in POOLS) / 1e3
            print(
                f"{f'{length} of {context}':>16} {name:>8}",
                *(f"{us[pool]:9.1f} {rate[pool]:8.0f} {rate[pool] / HOPPER_TFLOPS:6.1%}" for pool in POOLS),
                f"{ms:7.2f}",
                flush=True,
            )
            bench.note(
                kind="prefill", model=bench.model, kv=bench.kv, length=length, context=context, kernel=name,
                us=us, tflop_s=rate, all_ms=ms, setting=asdict(settings[name]),
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


def tune_decode(bench: Bench) -> None:
    """Candidates; what does not fit or compile is skipped."""
    base = DecodeSetting.of(bench.config, bench.layout, bench.device.capability)
    for warps, tiles, span, blocks in (
        (4, 2, 128, 3), (4, 2, 256, 3), (4, 2, 512, 3), (4, 2, 256, 2), (4, 1, 128, 3), (4, 1, 256, 3),
        (4, 4, 256, 1), (8, 1, 128, 2), (8, 1, 256, 2), (8, 2, 256, 1), (2, 4, 128, 3), (2, 4, 256, 3),
    ):  # fmt: skip
        setting = replace(base, warps=warps, tiles=tiles, span=span, blocks=blocks)
        if setting.shared_bytes(bench.config, bench.layout) > 227 << 10:
            continue
        print(setting)
        shapes = ((1, 640), (16, 640), (64, 640), (1, 32768))
        attempt(lambda: decode(bench, shapes, {"decode_setting": setting}))  # noqa: B023


def tune_prefill(bench: Bench) -> None:
    """The same of the prompt kernels."""
    candidates: list[PromptSetting] = []
    for pack, m_tiles, keys, blocks in (
        (2, 2, 64, 2), (2, 2, 32, 2), (2, 1, 64, 1), (2, 1, 32, 1), (2, 1, 32, 2), (1, 1, 64, 2),
        (1, 1, 64, 3), (1, 2, 64, 3), (1, 2, 64, 4), (2, 2, 128, 1),
    ):  # fmt: skip
        mma = MmaSetting(pack, m_tiles, keys, blocks)
        if mma.shared_bytes(bench.config, bench.layout) <= 227 << 10:
            candidates.append(mma)
    if HopperSetting.of(bench.config, bench.layout, bench.device.capability):
        for keys in (48, 64, 80, 96, 112, 128, 144):
            for k_stages, v_stages in ((2, 2), (3, 2), (3, 3)):
                for turns in (True, False):
                    hopper = HopperSetting(keys, k_stages, v_stages, turns)
                    if hopper.shared_bytes(bench.config) <= 227 << 10:
                        candidates.append(hopper)
    for setting in candidates:
        print(setting)
        attempt(lambda: prefill(bench, ((8192, 8192),), {"": setting}, rounds=1))  # noqa: B023


def attempt(work: Callable[[], None]) -> None:
    """Go on after what does not compile."""
    try:
        work()
    except EngineError as err:
        print(f"  failed: {str(err)[:300]}")
        if "context is lost" in str(err):
            raise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="27b")
    parser.add_argument("--kv", choices=("float16", "int8"), default="float16")
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--only", default="check,decode,prefill,append", help="parts, by commas")
    parser.add_argument("--tune", choices=("decode", "prefill"))
    arguments = parser.parse_args()
    bench = Bench(arguments)
    print(
        f"{bench.device.name}: copy {bench.copy_rate:.2f} TB/s; Gemma 3 {arguments.model}, KV {arguments.kv}"
    )
    if arguments.tune:
        (tune_decode if arguments.tune == "decode" else tune_prefill)(bench)
        return
    parts: dict[str, Callable[[], None]] = {
        "check": lambda: correctness(bench, {}),
        "decode": lambda: decode(bench, DECODE, {}),
        "prefill": lambda: prefill(bench, PREFILL, prompt_settings(bench)),
        "append": lambda: append(bench),
    }
    for part in arguments.only.split(","):
        parts[part]()


if __name__ == "__main__":
    main()
