"""What the machine is and what it could do at best, measured now."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np

from wicore.engine.base import Engine

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Bounds of one machine. A share above 1 means that data came from a cache."""

    read_gb_s: float
    """Bytes read from memory a second, every core at once."""
    int8_gflop_s: float
    """A large product of 8-bit weights, 2 operations a multiply-add."""


@cache
def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe() -> dict[str, object]:
    """The machine, as every line of a benchmark names it."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def measure_ceiling(threads: int) -> Ceiling:
    """Takes about two seconds and 512 MiB. The best of several runs, since others share the machine."""
    return Ceiling(_read_rate(threads), _product_rate(threads))


def _read_rate(threads: int) -> float:
    parts = [np.ones(512 * _MIB // threads // 4, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        best = min(_timed(lambda: list(pool.map(np.max, parts))) for _ in range(5))
    return sum(part.nbytes for part in parts) / best / 1e9


def _product_rate(threads: int) -> float:
    # Imported here: only the CPU engine's benchmark needs ONNX Runtime.
    import onnx

    from wicore.engine.cpu.onnx_graph import Graph
    from wicore.engine.cpu.weights import quantize

    rows, width, out = 512, 2048, 2048
    graph = Graph()
    x = graph.input("x", onnx.TensorProto.FLOAT, [1, "N", width])
    graph.linear(x, quantize(np.ones((out, width), np.float32)))
    graph.nodes[-1].output[0] = "y"
    graph.output("y", onnx.TensorProto.FLOAT, [1, "N", out])
    session = graph.session("product", threads)
    feed = {"x": np.ones((1, rows, width), np.float32)}
    best = min(_timed(lambda: session.run(None, feed)) for _ in range(8))
    return 2 * rows * width * out / best / 1e9


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a device could do at best, whichever it is; None where nobody knows."""

    bytes_s: float | None = None
    """Bytes a second moved through its memory."""
    flop_s: float | None = None
    """Operations a second of a large matrix product in the format that the engine computes in."""


def measure_bounds(engine: Engine, threads: int) -> Bounds:
    """From the engine's `ceilings()` ({"copy_bytes_s", "matmul_flop_s"}) where it has that, or of
    this machine's processor; none for an engine that computes nothing."""
    ceilings = getattr(engine, "ceilings", None)
    if ceilings is not None:
        found = ceilings()
        return Bounds(found["copy_bytes_s"], found["matmul_flop_s"])
    if engine.info.name != "cpu":
        return Bounds()
    ceiling = measure_ceiling(threads)
    return Bounds(ceiling.read_gb_s * 1e9, ceiling.int8_gflop_s * 1e9)
