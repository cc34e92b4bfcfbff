"""A CUDA driver in Python: the types are the real bindings', the device's memory is the host's.

Calls are noted; `fails` makes a function answer an error, once or for good.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from wicore.engine.tensorrt import cuda
from wicore.engine.tensorrt.cuda import CudaDevice

real: Any = pytest.importorskip("cuda.bindings.driver")
Result = real.CUresult
OK = Result.CUDA_SUCCESS


class FakeDriver:
    """One GPU of 1 GB, unless said otherwise."""

    def __init__(
        self, capability: tuple[int, int] = (9, 0), total: int = 10**9, version: int = 13000
    ) -> None:
        self.capability, self.total, self.version, self.count = capability, total, version, 1
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.launches: list[tuple[Any, list[bytes]]] = []
        self.fails: dict[str, Any] = {}
        self.parameters: list[int] = []
        """Sizes of every kernel's parameters."""
        self.memory: dict[int, Any] = {}
        self.shares_addresses = True
        self.capturing = False
        self._next = 1

    def __getattr__(self, name: str) -> Any:
        if not (name.startswith("cu") and name[2:3].isupper()):
            return getattr(real, name)  # a type, an enumeration or a constant
        answer = getattr(type(self), f"_{name}", None)

        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append((name, args))
            if name in self.fails:
                return (self.fails[name], *([None] * 3))
            return (OK, *(answer(self, *args) if answer else ()))

        return call

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of the calls of a function."""
        return [args for function, args in self.calls if function == name]

    def new(self, kind: Callable[[int], Any] = int) -> tuple[Any]:
        self._next += 1
        return (kind(self._next),)

    @property
    def used(self) -> int:
        return sum(len(block) for block in self.memory.values())

    def _cuDriverGetVersion(self) -> tuple[int]:  # noqa: N802
        return (self.version,)

    def _cuDeviceGetCount(self) -> tuple[int]:  # noqa: N802
        return (self.count,)

    def _cuDeviceGet(self, index: int) -> tuple[int]:  # noqa: N802
        return (index,)

    def _cuDeviceGetName(self, length: int, device: int) -> tuple[bytes]:  # noqa: N802
        return (b"Fake H200".ljust(length, b"\0"),)

    def _cuDeviceGetAttribute(self, attribute: Any, device: int) -> tuple[int]:  # noqa: N802
        kinds = real.CUdevice_attribute
        return (
            {
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: self.capability[0],
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: self.capability[1],
                kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: 132,
                kinds.CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM: int(self.shares_addresses),
                kinds.CU_DEVICE_ATTRIBUTE_CLOCK_RATE: 1_980_000,
                kinds.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: 232448,
            }[attribute],
        )

    def _cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any]:  # noqa: N802
        return self.new(real.CUcontext)

    def _cuMemGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return self.total - self.used, self.total

    def _cuMemAlloc(self, size: int) -> tuple[Any]:  # noqa: N802
        memory = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(memory)] = memory
        return (real.CUdeviceptr(ctypes.addressof(memory)),)

    def _cuMemFree(self, address: int) -> tuple[()]:  # noqa: N802
        del self.memory[address]
        return ()

    def _cuMemHostAlloc(self, size: int, flags: int) -> tuple[int]:  # noqa: N802
        return (int(self._cuMemAlloc(size)[0]),)

    def _cuMemHostGetDevicePointer(self, host: int, flags: int) -> tuple[Any]:  # noqa: N802
        return (real.CUdeviceptr(host),)

    def _cuMemFreeHost(self, host: int) -> tuple[()]:  # noqa: N802
        return self._cuMemFree(host)

    def _cuMemcpyAsync(self, dst: int, src: int, size: int, stream: Any) -> tuple[()]:  # noqa: N802
        ctypes.memmove(dst, src, size)
        return ()

    def _cuMemcpyBatchAsync(  # noqa: N802
        self, dsts: Any, srcs: Any, sizes: Any, count: int, attrs: Any, firsts: Any, kinds: int, stream: Any
    ) -> tuple[()]:
        assert (len(attrs), firsts, kinds) == (1, [0], 1)
        for dst, src, size in zip(dsts[:count], srcs[:count], sizes[:count], strict=True):
            ctypes.memmove(int(dst), int(src), size)
        return ()

    def _cuMemsetD8Async(self, dst: int, byte: int, size: int, stream: Any) -> tuple[()]:  # noqa: N802
        ctypes.memset(dst, byte, size)
        return ()

    def _cuStreamCreate(self, flags: int) -> tuple[Any]:  # noqa: N802
        return self.new(real.CUstream)

    def _cuEventCreate(self, flags: int) -> tuple[Any]:  # noqa: N802
        return self.new(real.CUevent)

    def _cuEventElapsedTime(self, start: Any, end: Any) -> tuple[float]:  # noqa: N802
        return (1.5,)

    def _cuModuleLoadData(self, image: bytes) -> tuple[Any]:  # noqa: N802
        return self.new(real.CUmodule)

    def _cuModuleGetFunction(self, module: Any, name: bytes) -> tuple[Any]:  # noqa: N802
        return self.new(real.CUfunction)

    def cuFuncGetParamInfo(self, function: Any, index: int) -> tuple[Any, int, int]:  # noqa: N802
        if index >= len(self.parameters):
            return Result.CUDA_ERROR_INVALID_VALUE, 0, 0
        return OK, 0, self.parameters[index]

    def cuLaunchKernelEx(self, config: Any, function: Any, parameters: int, extra: int) -> tuple[Any]:  # noqa: N802
        if "cuLaunchKernelEx" in self.fails:
            return (self.fails["cuLaunchKernelEx"],)
        pointers = (ctypes.c_void_p * len(self.parameters)).from_address(parameters)
        values = [ctypes.string_at(pointers[i] or 0, size) for i, size in enumerate(self.parameters)]
        self.launches.append((config, values))
        return (OK,)

    def _cuStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[()]:  # noqa: N802
        self.capturing = True
        return ()

    def _cuStreamEndCapture(self, stream: Any) -> tuple[Any]:  # noqa: N802
        self.capturing = False
        return self.new(real.CUgraph)

    def _cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any]:  # noqa: N802
        return self.new(real.CUgraphExec)

    def _cuTensorMapEncodeTiled(self, *args: Any) -> tuple[Any]:  # noqa: N802
        return (real.CUtensorMap(),)

    def cuGetErrorName(self, result: Any) -> tuple[Any, bytes]:  # noqa: N802
        return OK, Result(result).name.encode()

    def cuGetErrorString(self, result: Any) -> tuple[Any, bytes]:  # noqa: N802
        return OK, f"words of {int(result)}".encode()


def installed(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A fake driver that devices made from now on use; kernels are not compiled."""
    fake = FakeDriver()
    monkeypatch.setattr(cuda, "_driver", lambda: fake)
    monkeypatch.setattr(
        cuda, "compile_kernel", lambda source, defines, capability: b"cubin of " + source.encode()
    )
    return fake


def opened(driver: FakeDriver) -> Iterator[CudaDevice]:
    """A device of it, closed at the end: for a fixture."""
    device = CudaDevice()
    yield device
    driver.fails.clear()
    device.close()
