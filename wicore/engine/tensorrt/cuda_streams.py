"""Queues of work on a card, points in them, and work that was captured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wicore.errors import EngineError

if TYPE_CHECKING:
    from wicore.engine.tensorrt.cuda import CudaDevice


class CudaStream:
    """A stream that does not wait for the legacy default stream."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        flags = device.driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.native = device.call("cuStreamCreate", flags)
        self.handle = int(self.native)

    def wait(self, event: CudaEvent) -> None:
        self._device.call("cuStreamWaitEvent", self.native, event.native, 0)

    def synchronize(self) -> None:
        self._device.call("cuStreamSynchronize", self.native)

    def __del__(self) -> None:
        if hasattr(self, "native"):
            self._device.discard("cuStreamDestroy", self.native)


class CudaEvent:
    """An event; without timing it costs less."""

    def __init__(self, device: CudaDevice, timing: bool) -> None:
        self._device = device
        flags = device.driver.CUevent_flags
        self.native = device.call(
            "cuEventCreate", flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING
        )

    def record_in_graph(self, stream: CudaStream) -> None:
        """Record at each replay of the graph that is being captured."""
        external = self._device.driver.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL
        self._device.call("cuEventRecordWithFlags", self.native, stream.native, external)

    def record(self, stream: CudaStream) -> None:
        self._device.call("cuEventRecord", self.native, stream.native)

    def done(self) -> bool:
        return self._device.query("cuEventQuery", self.native)

    def wait(self) -> None:
        self._device.call("cuEventSynchronize", self.native)

    def elapsed_ms(self, start: CudaEvent) -> float:
        return float(self._device.call("cuEventElapsedTime", start.native, self.native))

    def __del__(self) -> None:
        if hasattr(self, "native"):
            self._device.discard("cuEventDestroy", self.native)


class CudaGraph:
    """An instantiated graph."""

    def __init__(self, device: CudaDevice, native: Any) -> None:
        self._device, self._native = device, native

    def launch(self, stream: CudaStream) -> None:
        if self._native is None:
            raise EngineError("graph: was closed")
        self._device.call("cuGraphLaunch", self._native, stream.native)

    def close(self) -> None:
        native, self._native = self._native, None
        if native is not None:
            self._device.discard("cuGraphExecDestroy", native)

    def __del__(self) -> None:
        self.close()
