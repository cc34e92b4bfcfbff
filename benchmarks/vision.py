"""Time and memory of an image in the CPU engine's vision tower, with random weights in the published shape.

`python -m benchmarks.vision [--images 3] [--threads 0]`: whole images, with the layers' matrices as half and
as float32, each in a process of its own, beside what float32 products of a layer's shape (4096 x 1152 x 4304)
reach alone on this machine: by ONNX Runtime, with constant weights, and by numpy, whichever is faster. Why no
matrices are 8-bit: the same product with the text engine's, and how far rows are off when matrices are
rounded so. Memory is the process's, above what it takes between images; Linux only. Times are the shortest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from wicore.bench.hardware import describe
from wicore.engine.cpu.onnx_graph import Graph
from wicore.engine.cpu.vision import CpuVision, TowerFormat
from wicore.engine.cpu.weights import GROUP, DenseLinear, Linear, quantize
from wicore.engine.tensorrt.vision_networks import VisionShape, flops
from wicore.gemma3.checkpoint import Checkpoint, StoredTensor
from wicore.gemma3.config import PUBLISHED, Gemma3Config

Line = dict[str, Any]
Float = NDArray[np.float32]
ROWS, WIDTH, INNER = 4096, 1152, 4304


def random_checkpoint(
    config: Gemma3Config, change: Callable[[Float], Float] = lambda matrix: matrix
) -> Checkpoint:
    """Weights that are drawn when read, the same each time; the layers' matrices as `change` makes them."""

    def stored(name: str, shape: tuple[int, ...]) -> StoredTensor:
        def draw(_: NDArray[np.uint8]) -> Float:
            width = shape[0] if name.endswith("projection_weight") else math.prod(shape[1:])
            deviation = np.float32(0.1 if len(shape) == 1 else width**-0.5)
            values = deviation * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(
                shape, np.float32
            )
            if len(shape) == 1:
                return values + np.float32("layer" in name and "norm" in name and name.endswith(".weight"))
            return change(values) if ".layers." in name else values

        return StoredTensor(shape, "F32", np.empty((1, 0), np.uint8), draw)

    shapes = config.tensor_shapes() | config.vision_shapes()
    return Checkpoint(Path("random"), config, {n: stored(n, s) for n, s in shapes.items()}, bytes)


def rounded(matrix: Float) -> Float:
    """What the text engine's 8 bits make of a matrix [out, in]."""
    width = matrix.shape[1]
    codes = quantize(np.pad(matrix, ((0, 0), (0, -width % GROUP))))
    values = (codes.codes.astype(np.float32) - 128) * codes.scales[..., None]
    return np.ascontiguousarray(values.reshape(len(matrix), -1)[:, :width])


def shortest(work: Callable[[], object], times: int = 5) -> float:
    def timed() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(timed() for _ in range(times))


def product_rate(weights: Linear, threads: int) -> float:
    """Operations a second of one product, by ONNX Runtime."""
    graph = Graph()
    graph.linear(graph.input("x", TensorProto.FLOAT, [1, ROWS, WIDTH]), weights)
    graph.nodes[-1].output[0] = "y"
    graph.output("y", TensorProto.FLOAT, [1, ROWS, INNER])
    session = graph.session("product", threads)
    feed = {"x": np.random.default_rng(0).standard_normal((1, ROWS, WIDTH), np.float32)}
    return 2 * ROWS * WIDTH * INNER / shortest(lambda: session.run(None, feed))


def numpy_rate() -> float:
    left, right = np.ones((ROWS, WIDTH), np.float32), np.ones((WIDTH, INNER), np.float32)
    return 2 * ROWS * WIDTH * INNER / shortest(lambda: left @ right)


def memory(field: str) -> int:
    """Bytes: VmRSS, what the process has now; VmHWM, the most it had since `forget_peak`."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def image(side: int) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)


def images(config: Gemma3Config, form: TowerFormat, threads: int, count: int) -> tuple[Line, Float]:
    """What images take in a tower of this format, and their rows."""
    assert config.vision is not None
    pixels, before = image(config.vision.image_size), memory("VmRSS")
    vision = CpuVision(random_checkpoint(config), weights=form, threads=threads)
    loaded = memory("VmRSS")
    forget_peak()
    rows = vision.encode(pixels)
    peak = memory("VmHWM")
    seconds = shortest(lambda: vision.encode(pixels), count)
    vision.close()
    line = {
        "measurement": "image",
        "matrices": form,
        "seconds": round(seconds, 2),
        "tflop": round(flops(VisionShape.of(config), config.vision.layers) / 1e12, 2),
        "tower_mb": round((loaded - before) / 1e6),
        "image_mb": round((peak - loaded) / 1e6),
    }
    return line, rows


def alone(work: Callable[..., Any], *given: Any) -> Any:
    """What a function gives in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def relative_error(found: Float, expected: Float) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def measure(threads: int, count: int) -> list[Line]:
    config = PUBLISHED["gemma-3-4b"]
    assert config.vision is not None
    weights = np.random.default_rng(2).standard_normal((INNER, WIDTH), np.float32)
    rates = {
        "float32": product_rate(DenseLinear(np.ascontiguousarray(weights.T)), threads),
        "float32, numpy": numpy_rate(),
        "int8": product_rate(quantize(weights), threads),
    }
    shape = f"{ROWS}x{WIDTH}x{INNER}"
    lines: list[Line] = [
        {"measurement": "product", "shape": shape, "weights": form, "gflop_s": round(rate / 1e9)}
        for form, rate in rates.items()
    ]
    ceiling = max(rates["float32"], rates["float32, numpy"])
    exact, expected = alone(images, config, "float32", threads, count)
    half, found = alone(images, config, "half", threads, count)
    half["relative_error"] = float(f"{relative_error(found, expected):.1e}")
    for line in (exact, half):
        rate = flops(VisionShape.of(config), config.vision.layers) / line["seconds"]
        line |= {"gflop_s": round(rate / 1e9), "share_of_float32_product": round(rate / ceiling, 3)}
        lines.append(line)
    in_8_bits = CpuVision(random_checkpoint(config, rounded), weights="float32", threads=threads)
    off = relative_error(in_8_bits.encode(image(config.vision.image_size)), expected)
    lines.append({"measurement": "rows of matrices rounded to 8 bits", "relative_error": round(off, 4)})
    common = {
        "hidden": config.vision.hidden_size,
        "layers": config.vision.layers,
        "patches": config.vision.patches,
    }
    common |= {"computed_in": "float32", "threads": threads, **describe()}
    return [line | common for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: one a core")
    given = parser.parse_args()
    for line in measure(given.threads or os.cpu_count() or 1, given.images):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
