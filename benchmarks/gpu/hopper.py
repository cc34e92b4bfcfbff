"""Matrix products of many rows on a Hopper card: right, and how fast.

`python benchmarks/gpu/hopper.py --check` compares many odd shapes, tilings and orders with torch.
`python benchmarks/gpu/hopper.py` times the matrices of Gemma-3-27B at prompt lengths, by events over graph
replays, with enough copies of the weights that none is found in the cache, next to torch's half product of
the same shape. Prints a table; all measurements go to $OUT/hopper.jsonl. Needs numpy, cuda-bindings, torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from wicore.engine.tensorrt.compiler import compile_kernel
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.engine.tensorrt.hopper import HopperMatmul, Kind, Tiling

LAYERS = 62
MATRICES: dict[str, tuple[Kind, int, int]] = {
    "qkv": ("half", 8192, 5376),
    "o": ("half", 5376, 4096),
    "gate_up": ("glu", 21504, 5376),
    "down": ("half", 5376, 21504),
}
CACHE_BYTES = 400 << 20
"""Weights that pass between two uses of the same copy."""

HANG_SECONDS = 40
TIMED_SECONDS = 20e-3
"""Of work in a timed graph: long enough for the clocks of sustained work."""
TOLERANCE = {"half": 1e-3, "float": 1e-4, "glu": 1e-3}


@contextmanager
def watched(what: str, seconds: float = HANG_SECONDS) -> Iterator[None]:
    """End the process where this takes too long: a kernel that waits for itself never ends."""

    def give_up() -> None:
        print(f"HANGS: {what}", flush=True)
        os._exit(3)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def build(variants: Iterable[tuple[Tiling, Kind]], capability: tuple[int, int]) -> None:
    """Compile what will be needed, on all cores; the cache hands it out later."""
    sets = {tuple(sorted(tiling.defines(kind).items())) for tiling, kind in variants}
    begin = time.perf_counter()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, sets, [capability] * len(sets)))
    print(f"{len(sets)} kernels compiled in {time.perf_counter() - begin:.1f} s", flush=True)


def _compile(defines: tuple[tuple[str, int], ...], capability: tuple[int, int]) -> None:
    compile_kernel("hopper.cu", dict(defines), capability)


class Bench:
    """The card, with operands in torch's memory."""

    def __init__(self) -> None:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = False
        torch.manual_seed(11)
        torch.zeros(1, device="cuda")
        self.torch = torch
        self.device = CudaDevice()
        self.stream = self.device.stream()
        self.matmul = HopperMatmul(self.device)
        self.log = (Path(os.environ.get("OUT", ".")) / "hopper.jsonl").open("a")

    def note(self, **fields: Any) -> None:
        print(json.dumps(fields), file=self.log, flush=True)

    def random(self, rows: int, columns: int, scale: float = 1.0) -> Any:
        torch = self.torch
        return (torch.randn(rows, columns, device="cuda", dtype=torch.float32) * scale).half()

    def weights(self, kind: Kind, n: int, k: int) -> Any:
        # Gate and up near 1, so that the activation is neither its linear part nor zero.
        return self.random(2 * n if kind == "glu" else n, k, k**-0.5)

    def empty(self, kind: Kind, rows: int, n: int) -> Any:
        """An output of NaN."""
        torch = self.torch
        dtype = torch.float32 if kind == "float" else torch.float16
        return torch.full((rows, n), float("nan"), device="cuda", dtype=dtype)

    def expected(self, kind: Kind, x: Any, w: Any) -> Any:
        torch = self.torch
        y = x.float() @ w.float().T
        if kind != "glu":
            return y
        gate, up = y.chunk(2, dim=1)
        y = torch.nn.functional.gelu(gate, approximate="tanh") * up / 64
        return y.clamp(-65504, 65504)

    def error(self, kind: Kind, y: Any, expected: Any) -> float:
        """Relative error, by norms; infinite where y has NaN."""
        torch = self.torch
        error = float(torch.linalg.vector_norm(y.float() - expected) / torch.linalg.vector_norm(expected))
        return error if error == error else float("inf")

    def run(self, kind: Kind, rows: int, x: Any, w: Any, y: Any, n: int, k: int, tiling: Tiling) -> None:
        """Enqueue."""
        a, b, c = x.data_ptr(), w.data_ptr(), y.data_ptr()
        if kind == "glu":
            self.matmul.glu(self.stream, rows, a, b, c, n, k, tiling)
        else:
            self.matmul.plain(self.stream, rows, a, b, c, n, k, kind == "half", tiling)

    def finish(self, what: str) -> None:
        with watched(what):
            self.stream.synchronize()

    def time(self, launches: list[Callable[[], None]], replays: int) -> float:
        """Milliseconds a launch: the median over replays of a graph of all launches."""
        graph = self.device.capture(self.stream, lambda: [launch() for launch in launches] and None)
        times = []
        for _ in range(replays + 1):
            begin, end = self.device.event(timing=True), self.device.event(timing=True)
            begin.record(self.stream)
            graph.launch(self.stream)
            end.record(self.stream)
            with watched("a timed graph"):
                end.wait()
            times.append(end.elapsed_ms(begin) / len(launches))
        graph.close()
        return median(times[1:])

    def time_torch(self, x: Any, weights: list[Any], launches: int, replays: int) -> float:
        """The same of torch's product to half."""
        torch = self.torch
        out = torch.empty(x.shape[0], weights[0].shape[0], device="cuda", dtype=torch.float16)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.mm(x, weights[0].T, out=out)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for i in range(launches):
                torch.mm(x, weights[i % len(weights)].T, out=out)
        times = []
        for _ in range(replays + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / launches)
        return median(times[1:])


CHECKED: list[Tiling] = [
    Tiling(256),
    Tiling(256, cluster_rows=2),
    Tiling(256, cluster_rows=2, stagger=2),
    Tiling(240, cluster_rows=2),
    Tiling(192, cluster_columns=2),
    Tiling(176, consumers=3),
    Tiling(160, cluster_rows=2, cluster_columns=2),
    Tiling(128, cluster_rows=2, group=1),
    Tiling(64, cluster_columns=4),
    Tiling(64, consumers=1),
    Tiling(48, stages=2),
]
ODD = [
    (1, 8, 8),
    (65, 264, 72),
    (128, 256, 64),
    (129, 1000, 640),
    (257, 4096, 2048),
    (300, 640, 1024),
    (777, 1536, 200),
    (1024, 2560, 512),
    (2049, 5376, 328),
    (4100, 1288, 1152),
]


def check(bench: Bench) -> bool:
    """Many shapes by many tilings: right, the same bits over and over, nothing written beyond."""
    torch = bench.torch
    kinds: list[Kind] = ["half", "float", "glu"]
    build([(t, kind) for t in CHECKED for kind in kinds], bench.device.capability)
    wrong = 0
    for kind in kinds:
        worst, unlike = 0.0, 0
        for rows, n, k in ODD:
            x = bench.random(rows + 64, k)
            x[rows:] = float("nan")  # behind the rows: must not be read
            w = bench.weights(kind, n, k)
            expected = bench.expected(kind, x[:rows], w)
            first = None
            for tiling in CHECKED:
                for _ in range(3):
                    y = bench.empty(kind, rows + 64, n)
                    torch.cuda.synchronize()
                    bench.run(kind, rows, x, w, y, n, k, tiling)
                    bench.finish(f"{kind} {rows} x {n} x {k} by {tiling}")
                    error = bench.error(kind, y[:rows], expected)
                    beyond = int((~torch.isnan(y[rows:])).sum())
                    first = y[:rows].clone() if first is None else first
                    same = torch.equal(y[:rows], first)
                    worst, unlike = max(worst, error), unlike + (not same)
                    if error > TOLERANCE[kind] or beyond:
                        wrong += 1
                        print(
                            f"WRONG {kind} {rows} x {n} x {k}: error {error:.2e}, {beyond} beyond, {tiling}"
                        )
                        break
                bench.note(check=kind, rows=rows, n=n, k=k, error=error, same=same, tiling=asdict(tiling))
            few = max(1, rows // 3)
            y = bench.empty(kind, few, n)
            torch.cuda.synchronize()
            bench.run(kind, few, x, w, y, n, k, CHECKED[-1])
            bench.finish(f"{kind} {few} x {n} x {k}")
            unlike += not torch.equal(y, first[:few])
        print(f"check {kind:6s} worst error {worst:.2e}, results with other bits: {unlike}", flush=True)
    wrong += check_chain(bench)
    print("check:", "all right" if not wrong else f"{wrong} WRONG", flush=True)
    return not wrong


def check_chain(bench: Bench) -> int:
    """Products that read what the one before has written, launched so that they may start early."""
    torch = bench.torch
    wrong = 0
    for rows, width, tiling in [(1024, 2048, Tiling(256, cluster_rows=2)), (200, 640, Tiling(64))]:
        w = [bench.weights("half", width, width) for _ in range(8)]
        x = [bench.random(rows, width)] + [bench.empty("half", rows, width) for _ in w]
        torch.cuda.synchronize()

        def chain(x: list[Any] = x, w: list[Any] = w, tiling: Tiling = tiling) -> None:
            rows, width = x[0].shape
            for i, matrix in enumerate(w):
                bench.run("half", rows, x[i], matrix, x[i + 1], width, width, tiling)

        chain()
        bench.finish("a chain")
        graph = bench.device.capture(bench.stream, chain)
        for _ in range(5):
            for y in x[1:]:
                y.fill_(float("nan"))
            torch.cuda.synchronize()
            graph.launch(bench.stream)
            bench.finish("a chain's graph")
            expected = x[0]
            for i, matrix in enumerate(w):
                expected = (expected.float() @ matrix.float().T).half()
                error = bench.error("half", x[i + 1], expected.float())
                wrong += not error < 5e-3
        graph.close()
    print(f"check chain  {'all right' if not wrong else f'{wrong} WRONG'}", flush=True)
    return wrong


def tilings_of(matmul: HopperMatmul, rows: int, kind: Kind, n: int, k: int, count: int) -> list[Tiling]:
    """The model's first ones, and the usual one with what may better it."""
    found = matmul.candidates(rows, n, k, kind)[:count]
    if rows >= 1024:
        usual = Tiling(256, cluster_rows=2)
        found += [usual, Tiling(256), Tiling(192, consumers=3, cluster_rows=2)]
        found += [replace(usual, stagger=steps) for steps in (1, 2, 3)]
        found += [replace(usual, group=height) for height in (4, 16)]
        found += [replace(found[0], stagger=2)]
    return list(dict.fromkeys(found))


def measure(bench: Bench, rows_list: list[int], names: list[str], count: int, replays: int) -> None:
    torch = bench.torch
    cases = [(name, rows) for name in names for rows in rows_list]
    variants = [
        (tiling, kind)
        for name, rows in cases
        for kind, n, k in [MATRICES[name]]
        for tiling in tilings_of(bench.matmul, rows, kind, n, k, count)
    ]
    build(variants, bench.device.capability)
    totals: dict[int, list[float]] = {rows: [0.0, 0.0, 0.0] for rows in rows_list}
    print(
        f"{'matrix':8s} {'rows':>5s} {'torch':>7s} {'model':>7s} {'best':>7s} TFLOP/s  "
        "of torch  error  best tiling"
    )
    for name in names:
        kind, n, k = MATRICES[name]
        width = 2 * n if kind == "glu" else n
        copies = max(2, -(-CACHE_BYTES // (2 * width * k)))
        weights = [bench.weights(kind, n, k) for _ in range(copies)]
        for rows in rows_list:
            x = bench.random(rows, k)
            y = bench.empty(kind, rows, n)
            expected = bench.expected(kind, x, weights[0])
            flops = 2.0 * rows * width * k
            launches = copies * max(1, round(TIMED_SECONDS / (flops / 6e14) / copies))
            torch.cuda.synchronize()
            library = bench.time_torch(x, weights, launches, replays)
            bench.note(matrix=name, rows=rows, torch_ms=library)
            results: list[tuple[float, float, Tiling]] = []
            for tiling in tilings_of(bench.matmul, rows, kind, n, k, count):
                y.fill_(float("nan"))
                torch.cuda.synchronize()
                bench.run(kind, rows, x, weights[0], y, n, k, tiling)
                bench.finish(f"{name} {rows} by {tiling}")
                error = bench.error(kind, y, expected)
                work = [
                    partial(bench.run, kind, rows, x, weights[i % copies], y, n, k, tiling)
                    for i in range(launches)
                ]
                ms = bench.time(work, replays)
                results.append((ms, error, tiling))
                bench.note(matrix=name, rows=rows, ms=ms, error=error, tiling=asdict(tiling))
            model_ms = results[0][0]
            best_ms, error, best = min(results, key=lambda result: result[0])
            worst = max(error for _, error, _ in results)
            if worst > TOLERANCE[kind]:
                print(f"WRONG {name} {rows}: error {worst:.2e}")
            rates = [flops / ms / 1e9 for ms in (library, model_ms, best_ms)]
            row = totals[rows]
            totals[rows] = [a + b for a, b in zip(row, (library, model_ms, best_ms), strict=True)]
            words = f"{best.columns}x{best.rows} cluster {best.cluster_rows}x{best.cluster_columns}"
            words += f" group {best.group}" * bool(best.group) + f" stagger {best.stagger}" * bool(
                best.stagger
            )
            print(
                f"{name:8s} {rows:5d} {rates[0]:7.0f} {rates[1]:7.0f} {rates[2]:7.0f}          "
                f"{100 * library / best_ms:5.0f}%   {worst:.0e}  {words}",
                flush=True,
            )
            del work
        torch.cuda.empty_cache()
    if len(names) == len(MATRICES):
        for rows, (library, model_ms, best_ms) in totals.items():
            print(
                f"{LAYERS} layers of {rows} rows: torch {LAYERS * library:.1f} ms, model's tilings "
                f"{LAYERS * model_ms:.1f} ms, best tilings {LAYERS * best_ms:.1f} ms"
            )
            bench.note(rows=rows, layers=LAYERS, torch_ms=library, model_ms=model_ms, best_ms=best_ms)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="odd shapes only")
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 8192])
    parser.add_argument("--matrices", nargs="+", choices=list(MATRICES), default=list(MATRICES))
    parser.add_argument("--tilings", type=int, default=8, help="candidates of the model a case")
    parser.add_argument("--replays", type=int, default=7)
    args = parser.parse_args()
    bench = Bench()
    print(f"{bench.device.name}, {bench.device.sms} multiprocessors", flush=True)
    if args.check:
        return 0 if check(bench) else 1
    measure(bench, args.rows, args.matrices, args.tilings, args.replays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
