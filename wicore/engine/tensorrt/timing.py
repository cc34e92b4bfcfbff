"""How long enqueued work takes on the device."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from wicore.engine.tensorrt.device import Device, Stream


def median_ms(device: Device, stream: Stream, enqueue: Callable[[], None], repeats: int = 3) -> float:
    """Milliseconds by events of what `enqueue` puts on the stream: the median of `repeats`, after one that is
    not counted. Waits for each."""
    enqueue()
    times = []
    for _ in range(repeats):
        begin, end = device.event(timing=True), device.event(timing=True)
        begin.record(stream)
        enqueue()
        end.record(stream)
        end.wait()
        times.append(end.elapsed_ms(begin))
    return statistics.median(times)
