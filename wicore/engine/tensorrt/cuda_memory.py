"""Memory of a card under a budget, and pinned memory of its host."""

from __future__ import annotations

import mmap
import threading
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wicore.engine.tensorrt.pinned import HUGE_PAGE, DriverMemory, HugePages, available_memory
from wicore.errors import EngineError

if TYPE_CHECKING:
    from wicore.engine.tensorrt.cuda import CudaDevice

_OUT_OF_MEMORY = 2


class CudaBuffer:
    """Device memory."""

    def __init__(self, memory: CudaMemory, address: int, size: int, what: str) -> None:
        self._memory = memory
        self.address, self.size, self.what = address, size, what

    def free(self) -> None:
        self._memory.release(self)


class CudaMemory:
    """What is allocated on a device. `allocate`, `allocate_host` and `report` are those of `Device`."""

    def __init__(self, device: CudaDevice, budget: int | None) -> None:
        """`budget`: the most device memory to allocate; None: as much as the card has free."""
        self._device, self._budget = device, budget
        self._lock = threading.Lock()
        self._buffers: dict[int, CudaBuffer] = {}
        self._host_buffers: set[DriverMemory | HugePages] = set()
        self._reserved = 0
        """Bytes in use and being allocated."""

    @property
    def free(self) -> int:
        """Bytes of device memory that can still be allocated, within the budget."""
        on_card = int(self._device.call("cuMemGetInfo", whole=True)[0])
        return on_card if self._budget is None else max(0, min(on_card, self._budget - self._reserved))

    def allocate(self, size: int, what: str) -> CudaBuffer:
        if size <= 0:
            raise EngineError(f"{what}: expected a size above 0; found {size} bytes")
        with self._lock:
            if self._budget is not None and self._reserved + size > self._budget:
                raise EngineError(
                    f"engine.device_memory_bytes: {what} need {_gb(size)}, "
                    f"{_gb(self._budget - self._reserved)} of {_gb(self._budget)} are left{self._usage()}; "
                    "raise it or lower what else is kept on the GPU"
                )
            self._reserved += size
        device = self._device
        try:
            device.enter()
            answer = device.driver.cuMemAlloc(size)
            if int(answer[0]) == _OUT_OF_MEMORY:
                free, total = device.call("cuMemGetInfo", whole=True)
                raise EngineError(
                    f"GPU memory: {what} need {_gb(size)}, {_gb(int(free))} of {device.name}'s "
                    f"{_gb(int(total))} are free{self._usage()}; end other programs on the GPU, or lower "
                    "what is kept on it"
                )
            device.check(answer, f"allocating {_gb(size)} for {what}")
        except BaseException:
            with self._lock:
                self._reserved -= size
            raise
        buffer = CudaBuffer(self, int(answer[1]), size, what)
        with self._lock:
            self._buffers[buffer.address] = buffer
        return buffer

    def release(self, buffer: CudaBuffer) -> None:
        with self._lock:
            if self._buffers.get(buffer.address) is not buffer:
                return
            del self._buffers[buffer.address]
            self._reserved -= buffer.size
        if not self._device.lost:
            self._device.call("cuMemFree", buffer.address)

    def allocate_host(self, size: int, step: int = 0) -> DriverMemory | HugePages:
        if size <= 0:
            raise EngineError(f"pinned memory: expected a size above 0; found {size} bytes")
        self._device.enter()
        buffer: DriverMemory | HugePages
        if size >= HUGE_PAGE and self._device.shares_addresses:
            self._check_host_memory(size)
            buffer = HugePages(self, size, step)
        else:
            buffer = self._driver_memory(size)
        with self._lock:
            self._host_buffers.add(buffer)
        return buffer

    def _check_host_memory(self, size: int) -> None:
        """Raise where the system has too little memory: touching it would end a process, maybe this one."""
        available = available_memory()
        if available is None:
            return
        with self._lock:
            left = available - sum(buffer.size - buffer.pinned for buffer in self._host_buffers)
        if size > left:
            raise EngineError(
                f"pinned memory: expected {_gb(size)} of host memory, found {_gb(max(0, left))} free; lower"
                " what is kept in host memory (hmt.host_bytes), or raise a container's limit"
            )

    def _driver_memory(self, size: int) -> DriverMemory:
        driver = self._device.driver
        flags = driver.CU_MEMHOSTALLOC_PORTABLE | driver.CU_MEMHOSTALLOC_DEVICEMAP
        # The driver cuts small ones out of larger pages.
        host = int(self._locked(size, "cuMemHostAlloc", size + mmap.PAGESIZE, flags))
        address = int(self._device.call("cuMemHostGetDevicePointer", host, 0))
        return DriverMemory(self, host, address, size, -host % mmap.PAGESIZE)

    def pin(self, address: int, size: int) -> None:
        """Pin memory of the host's, whose address is then the device's too."""
        driver = self._device.driver
        flags = driver.CU_MEMHOSTREGISTER_PORTABLE | driver.CU_MEMHOSTREGISTER_DEVICEMAP
        self._locked(size, "cuMemHostRegister", address, size, flags)

    def discard(self, function: str, *args: Any) -> None:
        """`CudaDevice.discard`."""
        self._device.discard(function, *args)

    def _locked(self, size: int, function: str, *args: Any) -> Any:
        """The value of a driver function that locks memory."""
        self._device.enter()
        answer = getattr(self._device.driver, function)(*args)
        if int(answer[0]) == _OUT_OF_MEMORY:
            raise EngineError(
                f"pinned memory: {_gb(size)} of host memory cannot be locked; lower what is kept in host "
                "memory, or raise its limit (ulimit -l, a container's memory)"
            )
        self._device.check(answer, f"locking {_gb(size)} of host memory")
        return answer[1] if len(answer) > 1 else None

    def release_host(self, buffer: DriverMemory | HugePages) -> None:
        with self._lock:
            if buffer not in self._host_buffers:
                return
            self._host_buffers.remove(buffer)
        buffer.release()

    def report(self) -> Mapping[str, int]:
        counts: Counter[str] = Counter()
        with self._lock:
            for buffer in self._buffers.values():
                counts[buffer.what] += buffer.size
        return counts

    def _usage(self) -> str:
        """What is in use, for messages; called with or without the lock."""
        counts: Counter[str] = Counter()
        for buffer in list(self._buffers.values()):
            counts[buffer.what] += buffer.size
        words = ", ".join(f"{what} {_gb(size)}" for what, size in counts.most_common(4))
        return f" ({words})" if words else ""

    def close(self) -> None:
        """Give everything back."""
        for buffer in list(self._buffers.values()):
            self._device.discard("cuMemFree", buffer.address)
        for host in list(self._host_buffers):
            host.release()
        self._buffers.clear()
        self._host_buffers.clear()
        self._reserved = 0


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
