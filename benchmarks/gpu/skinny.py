"""Speed of the products of few rows at the shapes of Gemma 3 27B, and of a decode step made of them.

    python benchmarks/gpu/skinny.py                 # every shape and number of rows with the setting by rule
    python benchmarks/gpu/skinny.py --tune          # all candidates
    python benchmarks/gpu/skinny.py --chain         # a whole step without attention, in milliseconds

Needs numpy and cuda-bindings. Every product is checked against float64 at some columns before it is timed.
Weights rotate among copies that are together far larger than the L2 cache; times are of CUDA graph replays
between events. One JSON line a measurement goes to $OUT/skinny.jsonl where OUT is set.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.graphs import graph_ms

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from wicore.engine.tensorrt.ceilings import ceilings
from wicore.engine.tensorrt.compiler import compile_kernel
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.engine.tensorrt.norms import Norms
from wicore.engine.tensorrt.skinny import (
    BUCKETS,
    Product,
    Setting,
    SkinnyMatmul,
)

HIDDEN, INNER, ATTENTION, QKV, VOCAB, LAYERS = 5376, 21504, 4096, 8192, 262208, 62
SHAPES = {
    "qkv": Product(QKV, HIDDEN, half_out=True),
    "o": Product(HIDDEN, ATTENTION),
    "gate_up": Product(INNER, HIDDEN, gated=True, half_out=True),
    "down": Product(HIDDEN, INNER),
    "head": Product(VOCAB, HIDDEN),
}
ROWS = (1, 2, 4, 8, 16, 32, 64)
LAUNCHES = 20
DISTINCT = 320 << 20
"""Bytes of weights that a chain of launches goes through before it comes back to the first."""

BLOCK = (32 << 20) - 24
"""Random halves that weights repeat; no matrix row divides it."""


class Config:
    """What Norms asks of a model."""

    hidden_size = HIDDEN
    rms_norm_eps = 1e-6


class Bench:
    """A card with one region of weights: random numbers, repeated."""

    def __init__(self, weight_bytes: int) -> None:
        self.device = CudaDevice()
        self.stream = self.device.stream()
        rng = np.random.default_rng(1)
        self.block: NDArray[np.float16] = (rng.standard_normal(BLOCK, np.float32) * 0.03).astype(np.float16)
        self.weights = self.device.allocate(weight_bytes, "weights")
        first = min(self.block.nbytes, weight_bytes)
        self.device.copy(self.weights.address, self.block.ctypes.data, first, self.stream)
        done = first
        while done < weight_bytes:
            # Doubling keeps the period: what is copied begins at a multiple of it.
            size = min(done, weight_bytes - done)
            self.device.copy(self.weights.address + done, self.weights.address, size, self.stream)
            done += size
        self.stream.synchronize()
        self.record = Path(os.environ["OUT"]) / "skinny.jsonl" if os.environ.get("OUT") else None
        self.copy_rate = ceilings(self.device)["copy_bytes_s"] / 1e12
        self.note(kind="card", name=self.device.name, sms=self.device.sms, copy_tb_s=self.copy_rate)

    def note(self, **line: Any) -> None:
        if self.record:
            with self.record.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def values(self, offset: int, count: int) -> NDArray[np.float16]:
        """The halves `offset` and following of the weights."""
        at = offset % BLOCK
        found = self.block[at : at + count]
        return found if len(found) == count else np.concatenate([found, self.values(0, count - len(found))])

    def time_ms(self, work: Callable[[], None], repeats: int = 9) -> float:
        """Milliseconds of what `work` enqueues, as a graph: the median of some runs."""
        return graph_ms(self.device, self.stream, work, repeats)

    def upload(self, array: NDArray[Any]) -> int:
        buffer = self.device.allocate(array.nbytes, "inputs")
        self.device.copy(buffer.address, array.ctypes.data, array.nbytes, self.stream)
        self.stream.synchronize()
        return buffer.address

    def download(self, address: int, shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
        array = np.empty(shape, dtype)
        self.device.copy(array.ctypes.data, address, array.nbytes, self.stream)
        self.stream.synchronize()
        return array


class Products:
    """One shape's inputs and results."""

    def __init__(self, bench: Bench, product: Product, matmul: SkinnyMatmul) -> None:
        self.bench, self.product, self.matmul = bench, product, matmul
        rng = np.random.default_rng(2)
        self.x: NDArray[np.float16] = rng.standard_normal((64, product.k)).astype(np.float16)
        self.x_address = bench.upload(self.x)
        self.dtype = np.float16 if product.half_out or product.gated else np.float32
        self.y = bench.device.allocate(64 * product.n * np.dtype(self.dtype).itemsize, "results")
        needed = -(-DISTINCT // product.matrix_bytes)
        self.copies = max(1, min(bench.weights.size // product.matrix_bytes, needed))

    def run(self, rows: int, setting: Setting, copy: int = 0, dependent: bool = True) -> None:
        weights = self.bench.weights.address + copy * self.product.matrix_bytes
        self.matmul.run(
            self.bench.stream, rows, self.x_address, weights, self.y.address, self.product, setting, dependent
        )

    def error(self, rows: int, setting: Setting) -> tuple[float, str]:
        """Largest error at sampled columns in units of their standard deviation, and a digest of all bits."""
        bench, product = self.bench, self.product
        bench.device.fill(self.y.address, 0xFF, self.y.size, bench.stream)
        self.run(rows, setting)
        found = bench.download(self.y.address, (64, product.n), self.dtype)
        if not np.isfinite(found[:rows]).all():
            return float("nan"), ""
        if not np.isnan(found[rows:]).all():
            return float("inf"), ""
        rng = np.random.default_rng(3)
        columns = np.unique([0, 1, product.n // 2, product.n - 1, *rng.integers(0, product.n, 60)])
        x = self.x[:rows].astype(np.float64)

        def dot(column: int) -> NDArray[np.float64]:
            return x @ bench.values(column * product.k, product.k).astype(np.float64)

        expected = np.stack([dot(c) for c in columns], axis=1)
        if product.gated:
            up = np.stack([dot(c + product.n) for c in columns], axis=1)
            gelu = 0.5 * expected * (1 + np.tanh(np.sqrt(2 / np.pi) * (expected + 0.044715 * expected**3)))
            expected = gelu * up / 64
        error = np.abs(found[:rows][:, columns] - expected).max() / expected.std()
        return float(error), hashlib.sha256(found[:1].tobytes()).hexdigest()[:12]

    def microseconds(self, rows: int, setting: Setting, launches: int, dependent: bool = True) -> float:
        def work() -> None:
            for i in range(launches):
                self.run(rows, setting, i % self.copies, dependent)

        return self.bench.time_ms(work) * 1e3 / launches


def compile_one(job: tuple[dict[str, int], tuple[int, int]]) -> str:
    try:
        compile_kernel("skinny.cu", *job)
    except Exception as err:
        return str(err)
    return ""


def compile_all(bench: Bench, matmul: SkinnyMatmul, wanted: Sequence[tuple[int, Product, Setting]]) -> None:
    """Into the cache, on all cores; errors show when the setting is run."""
    jobs = [(matmul.defines(*one), bench.device.capability) for one in wanted]
    unique = {json.dumps(job, sort_keys=True): job for job in jobs}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        for error in pool.map(compile_one, unique.values()):
            if error:
                print(error, file=sys.stderr)


def describe(setting: Setting) -> str:
    words = [f"{setting.mt}x{setting.wm}", f"lines {setting.lines}", f"stages {setting.stages}"]
    words += [f"ahead {setting.ahead}", f"fetch {setting.fetch}", f"blocks {setting.blocks}"]
    words += ["cluster"] if setting.cluster else []
    words += [f"persistent {setting.persistent}"] if setting.persistent else []
    return " ".join(words)


def settings_of(matmul: SkinnyMatmul, rows: int, product: Product, every: bool) -> list[Setting]:
    return matmul.candidates(rows, product) if every else [matmul.setting(rows, product)]


def shapes(arguments: argparse.Namespace) -> None:
    """Each shape and number of rows, by one setting or all of them."""
    bench = Bench(max(SHAPES[name].matrix_bytes for name in arguments.shapes) + DISTINCT)
    matmul = SkinnyMatmul(bench.device, arguments.chains)
    print(f"{bench.device.name}: copy {bench.copy_rate:.2f} TB/s")
    wanted = [
        (rows, SHAPES[name], setting)
        for name in arguments.shapes
        for rows in arguments.rows
        for setting in settings_of(matmul, rows, SHAPES[name], arguments.tune)
    ]
    compile_all(bench, matmul, wanted)
    print(f"{'shape':8} {'rows':>4} {'us':>8} {'TB/s':>6} {'share':>6} {'alone':>8} {'error':>8}  setting")
    for name in arguments.shapes:
        product = SHAPES[name]
        products = Products(bench, product, matmul)
        launches = max(2, min(LAUNCHES, (8 << 30) // product.matrix_bytes))
        bits: dict[str, list[str]] = {}
        for rows in arguments.rows:
            for setting in settings_of(matmul, rows, product, arguments.tune):
                try:
                    error, digest = products.error(rows, setting)
                    us = products.microseconds(rows, setting, launches)
                    alone = products.microseconds(rows, setting, launches, dependent=False)
                except Exception as err:
                    print(f"{name:8} {rows:4} failed: {describe(setting)}: {err}")
                    if "context is lost" in str(err):
                        raise
                    continue
                bits.setdefault(digest, []).append(f"{rows}: {describe(setting)}")
                rate = product.matrix_bytes / us / 1e6
                share = rate / bench.copy_rate
                limit = 4e-3 if product.gated or product.half_out else 1e-4
                mark = "" if error < limit else "  WRONG"
                print(
                    f"{name:8} {rows:4} {us:8.1f} {rate:6.2f} {share:6.1%} {alone:8.1f} {error:8.1e}  "
                    f"{describe(setting)}{mark}",
                    flush=True,
                )
                bench.note(
                    kind="product", shape=name, rows=rows, us=us, alone_us=alone, tb_s=rate, share=share,
                    error=error, setting=asdict(setting),
                )  # fmt: skip
        if len(bits) > 1:
            groups = "; ".join(f"{len(group)} as {group[0]}" for group in bits.values())
            print(f"{name}: the first row's bits DIFFER: {groups}")
        else:
            print(f"{name}: the first row's bits are the same at all of these")
        products.y.free()


def chain(arguments: argparse.Namespace) -> None:
    """A decode step without attention as one graph."""
    parts = ("qkv", "o", "gate_up", "down")
    layer_bytes = sum(SHAPES[name].matrix_bytes for name in parts)
    weight_bytes = layer_bytes * arguments.layers + SHAPES["head"].matrix_bytes
    bench = Bench(weight_bytes)
    device, stream = bench.device, bench.stream
    matmul, norms = SkinnyMatmul(device, arguments.chains), Norms(device, Config())  # type: ignore[arg-type]
    settings: dict[str, Setting] = {}
    print(f"{device.name}: copy {bench.copy_rate:.2f} TB/s, weights {weight_bytes / 1e9:.1f} GB")
    head = bench.weights.address + layer_bytes * arguments.layers
    rng = np.random.default_rng(4)
    factors = bench.upload(rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32))
    attended = bench.upload(rng.standard_normal((64, ATTENTION)).astype(np.float16))
    ids = bench.upload(rng.integers(0, VOCAB, 64).astype(np.int32))
    sizes = {"residual": 4 * HIDDEN, "normed": 2 * HIDDEN, "qkv": 2 * QKV, "delta": 4 * HIDDEN}
    sizes |= {"act": 2 * INNER, "logits": 4 * VOCAB}
    at = {name: device.allocate(64 * size, name).address for name, size in sizes.items()}

    def step(rows: int, dependent: bool, with_norms: bool = True) -> None:
        norms.embed(stream, rows, ids, head, factors, at["residual"], at["normed"])
        for layer in range(arguments.layers):
            place = bench.weights.address + layer * layer_bytes
            for name in parts:
                product = SHAPES[name]
                x = {"qkv": at["normed"], "o": attended, "gate_up": at["normed"], "down": at["act"]}[name]
                y = {"qkv": at["qkv"], "o": at["delta"], "gate_up": at["act"], "down": at["delta"]}[name]
                matmul.run(stream, rows, x, place, y, product, settings[name], dependent)
                place += product.matrix_bytes
                if y == at["delta"] and with_norms:
                    norms.add(
                        stream, rows, y, factors, at["residual"], factors, at["normed"],
                        -6 if name == "down" else 0, dependent=dependent,
                    )  # fmt: skip
        last = SHAPES["head"]
        matmul.run(stream, rows, at["normed"], head, at["logits"], last, settings["head"], dependent)

    print(
        f"{'rows':>4} {'ahead':>5} {'ms':>8} {'TB/s':>6} {'share':>6} {'no norms':>9} {'not dependent':>14}"
    )
    for rows in arguments.rows:
        ruled = {name: matmul.setting(rows, product) for name, product in SHAPES.items()}
        for ahead in arguments.ahead or [None]:
            for name, setting in ruled.items():
                settings[name] = setting if ahead is None else replace(setting, ahead=ahead)
            wanted = [(rows, product, settings[name]) for name, product in SHAPES.items()]
            compile_all(bench, matmul, wanted)
            for job in wanted:
                matmul.prepare(*job)
            times = [
                bench.time_ms(lambda: step(rows, dependent, with_norms), 5, 2)  # noqa: B023
                for dependent, with_norms in ((True, True), (True, False), (False, True))
            ]
            finite = np.isfinite(bench.download(at["logits"], (rows, VOCAB), np.float32)).all()
            rate = weight_bytes / times[0] / 1e9
            share = rate / bench.copy_rate
            print(
                f"{rows:4} {'rule' if ahead is None else ahead:>5} {times[0]:8.3f} {rate:6.2f} {share:6.1%} "
                f"{times[1]:9.3f} {times[2]:14.3f}{'' if finite else '  NOT FINITE'}",
                flush=True,
            )
            bench.note(
                kind="chain", rows=rows, layers=arguments.layers, ahead=ahead, ms=times[0],
                no_norms_ms=times[1], not_dependent_ms=times[2], tb_s=rate, share=share,
            )  # fmt: skip


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def names(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--shapes", type=names, default=list(SHAPES), help="e.g. qkv,o")
    parser.add_argument("--rows", type=numbers, help="e.g. 1,16,64")
    parser.add_argument("--tune", action="store_true", help="measure all candidates, at the buckets' sizes")
    parser.add_argument("--chain", action="store_true", help="a decode step without attention")
    parser.add_argument("--chains", type=int, default=1, help="sums of a part of k: 1 or 2")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--ahead", type=numbers, help="for --chain: try these, e.g. 0,4,12")
    arguments = parser.parse_args()
    arguments.rows = arguments.rows or list(BUCKETS if arguments.tune else ROWS)
    if arguments.chain:
        chain(arguments)
    else:
        shapes(arguments)


if __name__ == "__main__":
    main()
