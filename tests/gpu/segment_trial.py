"""One segment on a device: its inputs uploaded, its outputs checked against float64, its runs timed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wicore.engine.tensorrt.device import Buffer, Device, Stream
from wicore.engine.tensorrt.networks import Binding
from wicore.engine.tensorrt.plan_kinds import AnyKind, AnyShape, bindings

Array = NDArray[Any]
_POISON = 0xFF
"""Bytes of a NaN in every float type: what is not written shows."""


class Networks(Protocol):
    """What runs segments, as `Segments` does."""

    def run(self, stream: Stream, kind: Any, rows: int, addresses: Mapping[str, int]) -> None: ...


class SegmentTrial:
    """Device copies of a segment's inputs, for runs of the first so many of their rows."""

    def __init__(self, device: Device, kind: AnyKind, shape: AnyShape, given: Mapping[str, Array]) -> None:
        self._device, self._kind = device, kind
        self._bindings = {binding.name: binding for binding in bindings(kind, shape)}
        self._stream = device.stream()
        self._buffers: dict[str, Buffer] = {}
        most = next((len(given[b.name]) for b in self._bindings.values() if b.dynamic and not b.output), 0)
        for binding in self._bindings.values():
            buffer = device.allocate(binding.nbytes(most), f"{binding.name} of a test")
            self._buffers[binding.name] = buffer
            if not binding.output:
                array = np.ascontiguousarray(given[binding.name])
                assert array.nbytes == buffer.size
                device.copy(buffer.address, array.ctypes.data, array.nbytes, self._stream)
                self._stream.synchronize()
        self._addresses = {name: buffer.address for name, buffer in self._buffers.items()}

    def run(self, networks: Networks, rows: int) -> dict[str, Array]:
        """The outputs of one run, by name."""
        outputs = [binding for binding in self._bindings.values() if binding.output]
        for binding in outputs:
            self._device.fill(self._addresses[binding.name], _POISON, binding.nbytes(rows), self._stream)
        networks.run(self._stream, self._kind, rows, self._addresses)
        return {binding.name: self._download(binding, rows) for binding in outputs}

    def milliseconds(self, networks: Networks, rows: int, budget_ms: float = 300.0) -> tuple[float, float]:
        """(time of a run inside a CUDA graph, host time of enqueueing one without), in milliseconds."""

        def work() -> None:
            networks.run(self._stream, self._kind, rows, self._addresses)

        work()
        self._stream.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            work()
        host = (time.perf_counter() - started) * 100
        graph = self._device.capture(self._stream, work)
        start, end = self._device.event(timing=True), self._device.event(timing=True)
        try:
            runs = 3
            for _ in range(2):  # the first pass warms up and says how long a run takes
                start.record(self._stream)
                for _ in range(runs):
                    graph.launch(self._stream)
                end.record(self._stream)
                self._stream.synchronize()
                each = end.elapsed_ms(start) / runs
                runs = max(3, min(1000, int(budget_ms / max(each, 1e-3))))
            return each, host
        finally:
            graph.close()

    def close(self) -> None:
        self._stream.synchronize()
        for buffer in self._buffers.values():
            buffer.free()

    def _download(self, binding: Binding, rows: int) -> Array:
        dtype = np.float16 if binding.dtype == "half" else np.float32
        array = np.empty(binding.sized(rows), dtype)
        self._device.copy(array.ctypes.data, self._addresses[binding.name], array.nbytes, self._stream)
        self._stream.synchronize()
        return array
