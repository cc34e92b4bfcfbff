"""`CudaDevice`: the Device protocol on a card, through the driver API of `cuda.bindings` (12 or 13).

A fault in a kernel (an illegal address, say) leaves the process's context unusable: the call that finds it
raises, and every later one raises at once with the same words.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wicore.engine.tensorrt.compiler import compile_kernel, nvrtc_version
from wicore.engine.tensorrt.cuda_kernels import MAP_BYTES, CudaModule, CudaTensorMap, TimedLaunch, Trace
from wicore.engine.tensorrt.cuda_memory import CudaBuffer, CudaMemory
from wicore.engine.tensorrt.cuda_streams import CudaEvent, CudaGraph, CudaStream
from wicore.engine.tensorrt.device import (
    Device,
    TensorMap,
)
from wicore.engine.tensorrt.pinned import DriverMemory, HugePages
from wicore.errors import EngineError

_NOT_READY = 600
_NOT_LOADABLE = {200, 209, 222}  # invalid image, no binary for the GPU, unsupported PTX version
_FATAL = {214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999}
"""CUresults after which the context cannot be used: uncorrectable memory, faults of kernels, unknown."""

_DEPENDENT_FROM = 12030
"""Programmatic dependent launches can be captured from this driver version (CUDA 12.3) on."""

_BATCHES_FROM = 13000
"""Drivers that take many copies in one call, in its present form."""

_ELEMENTS = {
    "float16": ("CU_TENSOR_MAP_DATA_TYPE_FLOAT16", 2),
    "bfloat16": ("CU_TENSOR_MAP_DATA_TYPE_BFLOAT16", 2),
    "float32": ("CU_TENSOR_MAP_DATA_TYPE_FLOAT32", 4),
    "int8": ("CU_TENSOR_MAP_DATA_TYPE_UINT8", 1),
    "int32": ("CU_TENSOR_MAP_DATA_TYPE_INT32", 4),
}

_entered = threading.local()
"""`context`: the one that is this thread's current one, as far as this module has set it."""


class CudaDevice:
    """A GPU, shared with whoever uses its primary context in this process (TensorRT does).

    index: among the GPUs that CUDA shows this process. memory_bytes: the most device memory to allocate here;
    None: as much as the card has free. Raises EngineError, with what to install or change, where there is no
    GPU, driver or binding, or the GPU is older than compute capability 8.0.
    """

    def __init__(self, index: int = 0, memory_bytes: int | None = None) -> None:
        self.driver = _driver()
        self._lost: str | None = None
        self._context: Any = None
        self._lock = threading.Lock()
        self._memory = CudaMemory(self, memory_bytes)
        self._modules: dict[tuple[Any, ...], CudaModule] = {}
        self._index = index
        self._initialise(index)
        attributes = self.driver.CUdevice_attribute
        self.capability = (
            self._attribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            self._attribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        )
        name = self.call("cuDeviceGetName", 256, self._native)
        self.name = name.split(b"\0")[0].decode(errors="replace").strip()
        if self.capability < (8, 0):
            major, minor = self.capability
            raise EngineError(
                f"GPU {index} ({self.name}): expected compute capability 8.0 or newer; found {major}.{minor}"
            )
        self.sms = self._attribute(attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self.clock_hz = 1e3 * self._attribute(attributes.CU_DEVICE_ATTRIBUTE_CLOCK_RATE)
        self.max_shared = self._attribute(attributes.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        self.dependent_launches = self.capability >= (9, 0) and self.driver_version >= _DEPENDENT_FROM
        self.shares_addresses = bool(
            self._attribute(attributes.CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM)
        )
        """Whether pinned memory has the same address for host and device."""
        self.trace: Trace | None = None
        self.overlapping = True
        """Whether launches that may are taken as dependent now."""
        self.loads_functions = self.driver_version >= 12040 and hasattr(self.driver, "cuFuncLoad")
        self.knows_parameters = self.driver_version >= 12040 and hasattr(self.driver, "cuFuncGetParamInfo")
        self._context = self.call("cuDevicePrimaryCtxRetain", self._native)
        self.enter()
        self.memory_total = int(self.call("cuMemGetInfo", whole=True)[1])

    def _initialise(self, index: int) -> None:
        try:
            answer = self.driver.cuInit(0)
        except Exception as err:  # the loader's own classes, other ones in every version
            raise EngineError(
                f"the NVIDIA driver cannot be loaded ({err}); install the driver, or set the engine to cpu"
            ) from err
        self.check(answer, "starting CUDA (is a GPU visible, and the driver of this kernel's version?)")
        self.driver_version = int(self.call("cuDriverGetVersion"))
        count = int(self.call("cuDeviceGetCount"))
        if not 0 <= index < count:
            raise EngineError(
                f"GPU {index}: CUDA shows {count} GPUs to this process; "
                "check the index and CUDA_VISIBLE_DEVICES"
            )
        self._native = self.call("cuDeviceGet", index)

    def _attribute(self, attribute: Any) -> int:
        return int(self.call("cuDeviceGetAttribute", attribute, self._native))

    @property
    def lost(self) -> bool:
        """Whether the context cannot be used any more."""
        return self._lost is not None

    # --- calls ----------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Make the context this thread's current one; raise where it is lost."""
        if self._lost is not None:
            raise EngineError(self._lost)
        if self._context is not None and getattr(_entered, "context", None) is not self._context:
            self.check(self.driver.cuCtxSetCurrent(self._context), "entering the context")
            _entered.context = self._context

    def call(self, function: str, *args: Any, doing: str = "", whole: bool = False) -> Any:
        """A driver function's value (all its values with `whole`); EngineError says what failed."""
        self.enter()
        try:
            answer = getattr(self.driver, function)(*args)
        except (AttributeError, RuntimeError) as err:  # the driver's library does not have it
            raise EngineError(
                f"the NVIDIA driver is too old for these bindings ({function}: {err}); update the driver"
            ) from err
        if answer[0]:
            self.check(answer, doing or function)
        if whole:
            return answer[1:]
        return answer[1] if len(answer) > 1 else None

    def check(self, answer: Sequence[Any], doing: str) -> None:
        """Raise EngineError where the answer's result is not success."""
        code = int(answer[0])
        if not code:
            return
        words = f"{doing}: {self._words(answer[0])}"
        if code in _FATAL:
            self._lost = self._lost or f"{words}; the GPU's context is lost, restart this process"
            raise EngineError(self._lost)
        raise EngineError(words)

    def query(self, function: str, *args: Any) -> bool:
        """Whether the answer is success and not "not ready"."""
        self.enter()
        answer = getattr(self.driver, function)(*args)
        if int(answer[0]) == _NOT_READY:
            return False
        self.check(answer, function)
        return True

    def discard(self, function: str, *args: Any) -> None:
        """Give something back where that is still possible; for destructors."""
        if self._context is None or self._lost is not None:
            return
        try:
            self.call(function, *args)
        except Exception:
            pass  # lost with the context

    def _words(self, result: Any) -> str:
        parts = []
        for function in (self.driver.cuGetErrorName, self.driver.cuGetErrorString):
            failed, text = function(result)
            if not failed and text:
                parts.append(text.decode(errors="replace") if isinstance(text, bytes) else str(text))
        return f"{parts[0]} ({parts[1]})" if len(parts) == 2 else f"CUDA error {int(result)}"

    # --- kernels --------------------------------------------------------------------------------------------

    def compile(self, source: str, defines: Mapping[str, int | str]) -> CudaModule:
        key = (source, *sorted((name, str(value)) for name, value in defines.items()))
        with self._lock:
            module = self._modules.get(key)
        if module is None:
            cubin = compile_kernel(source, defines, self.capability)
            module = CudaModule(self, source, self._load(source, cubin))
            with self._lock:
                module = self._modules.setdefault(key, module)
        return module

    def _load(self, source: str, cubin: bytes) -> Any:
        self.enter()
        answer = self.driver.cuModuleLoadData(cubin)
        if int(answer[0]) in _NOT_LOADABLE:
            major, minor = nvrtc_version()
            version = f"{self.driver_version // 1000}.{self.driver_version % 1000 // 10}"
            raise EngineError(
                f"kernels/{source}: the driver (CUDA {version}) cannot load what NVRTC {major}.{minor} "
                f"compiled: {self._words(answer[0])}; update the driver, or install cuda-bindings and "
                "nvidia-cuda-nvrtc of the driver's CUDA version"
            )
        self.check(answer, f"loading kernels/{source}")
        return answer[1]

    def tensor_map_2d(
        self,
        address: int,
        rows: int,
        columns: int,
        row_stride_bytes: int,
        box_rows: int,
        box_columns: int,
        element: str = "float16",
        swizzle: int = 128,
    ) -> CudaTensorMap:
        driver = self.driver
        kind, size = _ELEMENTS[element]
        swizzles = driver.CUtensorMapSwizzle
        mode = f"CU_TENSOR_MAP_SWIZZLE_{swizzle}B" if swizzle else "CU_TENSOR_MAP_SWIZZLE_NONE"
        encoded = self.call(
            "cuTensorMapEncodeTiled",
            getattr(driver.CUtensorMapDataType, kind),
            2,
            address,
            [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
            [driver.cuuint64_t(row_stride_bytes)],
            [driver.cuuint32_t(box_columns), driver.cuuint32_t(box_rows)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(swizzles, mode),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            doing=(
                f"encoding a tensor map of {rows} x {columns} {element}, {row_stride_bytes} bytes a row, "
                f"boxes of {box_rows} x {box_columns} ({box_columns * size} bytes a row), swizzle {swizzle}"
            ),
        )
        return CudaTensorMap(ctypes.string_at(int(encoded.getPtr()), MAP_BYTES))

    # --- memory ---------------------------------------------------------------------------------------------

    @property
    def memory_free(self) -> int:
        return self._memory.free

    def allocate(self, size: int, what: str) -> CudaBuffer:
        return self._memory.allocate(size, what)

    def allocate_host(self, size: int, step: int = 0) -> DriverMemory | HugePages:
        return self._memory.allocate_host(size, step)

    def report(self) -> Mapping[str, int]:
        return self._memory.report()

    # --- streams --------------------------------------------------------------------------------------------

    def stream(self) -> CudaStream:
        return CudaStream(self)

    def event(self, timing: bool = False) -> CudaEvent:
        return CudaEvent(self, timing)

    def copy(self, dst: int, src: int, size: int, stream: CudaStream) -> None:
        self.call("cuMemcpyAsync", dst, src, size, stream.native)

    def copy_many(
        self, targets: NDArray[np.uint64], sources: NDArray[np.uint64], size: int, stream: CudaStream
    ) -> None:
        count = len(targets)
        if self.driver_version < _BATCHES_FROM:
            for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
                self.copy(target, source, size, stream)
            return
        at = self.driver.CUdeviceptr
        to, of = ([at(address) for address in addresses.tolist()] for addresses in (targets, sources))
        attributes = self.driver.CUmemcpyAttributes()
        attributes.srcAccessOrder = self.driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        self.call("cuMemcpyBatchAsync", to, of, [size] * count, count, [attributes], [0], 1, stream.native)

    def fill(self, dst: int, byte: int, size: int, stream: CudaStream) -> None:
        self.call("cuMemsetD8Async", dst, byte, size, stream.native)

    def capture(self, stream: CudaStream, work: Callable[[], None], overlapping: bool = True) -> CudaGraph:
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call("cuStreamBeginCapture", stream.native, mode)
        before, self.overlapping = self.overlapping, overlapping
        try:
            work()
        except BaseException:
            try:
                self.discard("cuGraphDestroy", self.call("cuStreamEndCapture", stream.native))
            except EngineError:
                pass  # what went wrong in the capture says more
            raise
        finally:
            self.overlapping = before
        graph = self.call("cuStreamEndCapture", stream.native)
        try:
            executable = self.call("cuGraphInstantiate", graph, 0)
        finally:
            self.discard("cuGraphDestroy", graph)
        return CudaGraph(self, executable)

    def traced(self, stream: Any, work: Callable[[], None]) -> tuple[CudaGraph, list[TimedLaunch]]:
        """As `capture`, of kernels that do not overlap, with the means to time each of them."""
        trace = self.trace = Trace(self)
        try:
            return self.capture(stream, work, overlapping=False), trace.launches
        finally:
            self.trace = None

    def synchronize(self) -> None:
        self.call("cuCtxSynchronize")

    def close(self) -> None:
        if self._context is None:
            return
        if self._lost is None:
            self.discard("cuCtxSynchronize")
        self._memory.close()
        for module in self._modules.values():
            self.discard("cuModuleUnload", module._native)
        self._modules.clear()
        if self._lost is None:
            self.discard("cuDevicePrimaryCtxRelease", self._native)
            self._lost = f"GPU {self._index}: the device was closed"
        self._context = None
        _entered.context = None


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as err:
        raise EngineError(
            f"cuda-bindings is not installed ({err}); install wicore[gpu] or wicore[rtx]"
        ) from err
    return driver


_device: type[Device] = CudaDevice
_map: type[TensorMap] = CudaTensorMap
