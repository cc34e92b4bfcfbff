"""Work on a card timed as a graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from wicore.engine.tensorrt.device import Device, Stream


def graph_ms(
    device: Device, stream: Stream, work: Callable[[], None], repeats: int = 7, replays: int = 3
) -> float:
    """Milliseconds of what `work` enqueues, as a graph: the median of `repeats` stretches of `replays`.

    What a kernel compiles or allocates the first time must have been done.
    """
    graph = device.capture(stream, work)
    graph.launch(stream)
    times = []
    for _ in range(repeats):
        start, end = device.event(timing=True), device.event(timing=True)
        start.record(stream)
        for _ in range(replays):
            graph.launch(stream)
        end.record(stream)
        stream.synchronize()
        times.append(end.elapsed_ms(start) / replays)
    graph.close()
    return statistics.median(times)
