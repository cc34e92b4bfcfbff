"""What a card can do at best, for benchmarks to measure against."""

from __future__ import annotations

import numpy as np

from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.timing import median_ms

_BYTES = 1 << 30
_REPEATS = 7

_FLOP_A_CLOCK = {(8, 0): 2048, (8, 6): 512, (8, 7): 512, (8, 9): 512, (9, 0): 4096}
"""Floating-point operations of a multiprocessor in a clock: dense products of half, float32 sums. From
NVIDIA's whitepapers of the architectures."""


def ceilings(device: Device) -> dict[str, float]:
    """`copy_bytes_s`: bytes read and written a second by a copy in the card's memory, measured;
    `matmul_flop_s`: of half products at the card's top clock, by the data sheet, where it is known."""
    found = {"copy_bytes_s": _copy_rate(device)}
    flop = _FLOP_A_CLOCK.get(device.capability)
    if flop is not None and device.clock_hz:
        found["matmul_flop_s"] = flop * float(device.sms) * device.clock_hz
    return found


def _copy_rate(device: Device) -> float:
    size = min(_BYTES, device.memory_free // 4) // 4096 * 4096
    source, target = (device.allocate(size, "a measurement") for _ in range(2))
    stream = device.stream()
    copy = device.compile("copy.cu", {}).function("copy_words")
    device.fill(source.address, 1, size, stream)
    args = (source.address, target.address, np.int64(size // 16))
    ms = median_ms(device, stream, lambda: copy(stream, 8 * device.sms, 512, args), _REPEATS)
    source.free()
    target.free()
    return 2 * size / (ms / 1e3)
