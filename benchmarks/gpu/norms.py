"""Speed of the norms along the residual stream at the width of Gemma 3 27B, beside what their bytes take.

    python -m benchmarks.gpu.norms [--rows 64,1024,8192]

A norm reads the delta (float32, or half where there are many rows) and the residual stream, and writes that
stream and the rows normed. The floor is these bytes at 3.0 TB/s, what PyTorch's copy reaches on an H100, and
the share is how much of the time it is. Buffers rotate, so that nothing is found in L2; `behind o` is what a
norm adds to the time of the product that makes its delta, as in a layer, where some is. Times are medians of
CUDA graph replays between events. Every kernel is first checked against float64. Needs cuda-bindings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wicore.engine.tensorrt.ceilings import ceilings
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.engine.tensorrt.matmuls import Matmuls
from wicore.engine.tensorrt.norms import Norms
from wicore.engine.tensorrt.timing import median_ms

HIDDEN, ATTENTION, LAYERS, EPS = 5376, 4096, 62, 1e-6
FLOOR_BYTES_S = 3.0e12
DISTINCT = 400 << 20
"""Bytes that pass between two uses of the same buffers."""
LAUNCHES = 20


class Bench:
    """The card, with operands for so many rows; o_proj's product makes the deltas."""

    def __init__(self, device: CudaDevice, rows: int) -> None:
        self.device, self.rows, self.stream = device, rows, device.stream()
        config: Any = SimpleNamespace(hidden_size=HIDDEN, rms_norm_eps=EPS)
        self.norms, self.matmuls = Norms(device, config), Matmuls(device)
        rng = np.random.default_rng(0)
        self.factors = rng.uniform(0.5, 2, (2, HIDDEN)).astype(np.float32)
        self.post, self.next = (self.put(row) for row in self.factors)
        self.copies = -(-DISTINCT // (rows * HIDDEN * 10))
        x = rng.standard_normal((rows, ATTENTION), np.float32).astype(np.float16)
        w = (rng.standard_normal((HIDDEN, ATTENTION), np.float32) / ATTENTION**0.5).astype(np.float16)
        self.x, self.w = self.put(x), self.put(w)
        self.stream_rows = rng.standard_normal((rows, HIDDEN), np.float32)
        self.residual = [self.put(self.stream_rows) for _ in range(self.copies)]
        self.delta, self.normed = ([self.room(size) for _ in range(self.copies)] for size in (4, 2))

    def put(self, array: NDArray[Any]) -> int:
        buffer = self.device.allocate(array.nbytes, "operands")
        self.device.copy(buffer.address, np.ascontiguousarray(array).ctypes.data, array.nbytes, self.stream)
        self.stream.synchronize()
        return buffer.address

    def room(self, item: int) -> int:
        return self.device.allocate(item * self.rows * HIDDEN, "results").address

    def get(self, address: int, dtype: type) -> NDArray[Any]:
        array = np.empty((self.rows, HIDDEN), dtype)
        self.device.copy(array.ctypes.data, address, array.nbytes, self.stream)
        self.stream.synchronize()
        return array

    def product(self, half: bool, copy: int) -> None:
        """By the kernel that a pass would use. Half only where `half_deltas` says so."""
        args = (self.stream, self.rows, self.x, self.w, self.delta[copy], HIDDEN, ATTENTION)
        if half:
            self.matmuls.delta(*args, -6)
        else:
            self.matmuls.plain(*args, False)

    def norm(self, half: bool, copy: int) -> None:
        at = self.residual[copy], self.next, self.normed[copy]
        exponent = -6 if half else 0
        self.norms.add(self.stream, self.rows, self.delta[copy], self.post, *at, exponent, half_delta=half)

    def error(self, half: bool) -> float:
        """The largest of the normed rows, relative to 1 and the value."""
        for copy in range(self.copies):
            self.product(half, copy)
        before = self.get(self.residual[0], np.float32).astype(np.float64)
        delta = self.get(self.delta[0], np.float16 if half else np.float32).astype(np.float64)
        self.norm(half, 0)
        found = self.get(self.normed[0], np.float16)
        scaled = delta * 64 if half else delta
        stream = before + normed(scaled) * self.factors[0]
        expected = normed(stream) * self.factors[1]
        return float((np.abs(found - expected) / (1 + np.abs(expected))).max())

    def us(self, launch: Callable[[int], None]) -> float:
        """Microseconds of a launch, given which buffers to use."""

        def work() -> None:
            for i in range(LAUNCHES):
                launch(i % self.copies)

        graph = self.device.capture(self.stream, work)
        ms = median_ms(self.device, self.stream, lambda: graph.launch(self.stream), 15)
        graph.close()
        return ms * 1e3 / LAUNCHES


def normed(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPS)


def measure(bench: Bench, half: bool) -> None:
    error = bench.error(half)
    moved = bench.rows * HIDDEN * (4 + 4 + 2 + (2 if half else 4))
    floor = moved / FLOOR_BYTES_S * 1e6

    def both(copy: int) -> None:
        bench.product(half, copy)
        bench.norm(half, copy)

    us = bench.us(lambda copy: bench.norm(half, copy))
    behind = bench.us(both) - bench.us(lambda copy: bench.product(half, copy))
    print(
        f"{bench.rows:5} {'half' if half else 'float32':>8} {moved / 1e6:8.1f} {floor:9.1f} {us:8.1f} "
        f"{moved / us / 1e6:6.2f} {floor / us:6.0%} {behind:9.1f} {2 * LAYERS * us / 1e3:10.2f} {error:9.1e}"
        f"{'' if error < 1e-3 else '  WRONG'}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="64,1024,8192")
    sizes = [int(rows) for rows in parser.parse_args().rows.split(",")]
    device = CudaDevice()
    copy = ceilings(device)["copy_bytes_s"] / 1e12
    print(
        f"{device.name}, width {HIDDEN}; the floor is at {FLOOR_BYTES_S / 1e12} TB/s, a copy moves {copy:.2f}"
    )
    print(" rows    delta       MB  floor us       us   TB/s  share  behind o  124 of, ms    error")
    for rows in sizes:
        bench = Bench(device, rows)
        for half in (False, True) if bench.matmuls.half_deltas(rows) else (False,):
            measure(bench, half)
    device.close()


if __name__ == "__main__":
    main()
