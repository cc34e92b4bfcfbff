"""`CudaDevice`: the Device protocol on a card, through the driver API of `cuda.bindings` (12 or 13).

A fault in a kernel (an illegal address, say) leaves the process's context unusable: the call that finds it
raises, and every later one raises at once with the same words.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wicore.engine.tensorrt.compiler import compile_kernel, nvrtc_version
from wicore.engine.tensorrt.device import (
    DEFAULT_SHARED_BYTES,
    Argument,
    Device,
    Dimensions,
    TensorMap,
    dimensions,
)
from wicore.engine.tensorrt.pinned import HUGE_PAGE, DriverMemory, HugePages, available_memory
from wicore.errors import EngineError

_OUT_OF_MEMORY = 2
_NOT_READY = 600
_NOT_LOADABLE = {200, 209, 222}  # invalid image, no binary for the GPU, unsupported PTX version
_FATAL = {214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999}
"""CUresults after which the context cannot be used: uncorrectable memory, faults of kernels, unknown."""

_DEPENDENT_FROM = 12030
"""Programmatic dependent launches can be captured from this driver version (CUDA 12.3) on."""

_BATCHES_FROM = 13000
"""Drivers that take many copies in one call, in its present form."""

_MAX_CONFIGS = 4096
"""Prepared launches of a function that are kept; prompts of all lengths make ever new ones."""

_ELEMENTS = {
    "float16": ("CU_TENSOR_MAP_DATA_TYPE_FLOAT16", 2),
    "bfloat16": ("CU_TENSOR_MAP_DATA_TYPE_BFLOAT16", 2),
    "float32": ("CU_TENSOR_MAP_DATA_TYPE_FLOAT32", 4),
    "int8": ("CU_TENSOR_MAP_DATA_TYPE_UINT8", 1),
    "int32": ("CU_TENSOR_MAP_DATA_TYPE_INT32", 4),
}
_MAP_BYTES = 128
_MAP_ALIGNMENT = 64

_entered = threading.local()
"""`context`: the one that is this thread's current one, as far as this module has set it."""


class CudaBuffer:
    """Device memory."""

    def __init__(self, device: CudaDevice, address: int, size: int, what: str) -> None:
        self._device = device
        self.address, self.size, self.what = address, size, what

    def free(self) -> None:
        self._device.release(self)


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


class CudaTensorMap:
    """An encoded tensor map."""

    def __init__(self, data: bytes) -> None:
        self.bytes = data


class _Layout:
    """Where a launch's arguments lie, for one list of argument types.

    The arguments are packed into one buffer, and a fixed array points at each: a launch writes values only.
    """

    def __init__(self, name: str, args: Sequence[Argument]) -> None:
        code = "="
        offset, self.places = 0, []
        self.maps = False
        for i, arg in enumerate(args):
            letter, size, alignment = _format(name, i, arg)
            self.maps |= letter.endswith("s")
            padding = -offset % alignment
            code += f"{padding}x{letter}"
            self.places.append((offset + padding, size))
            offset += padding + size
        self._struct = struct.Struct(code)
        self._memory = ctypes.create_string_buffer(offset + _MAP_ALIGNMENT)
        self._start = -ctypes.addressof(self._memory) % _MAP_ALIGNMENT
        base = ctypes.addressof(self._memory) + self._start
        self._pointers = (ctypes.c_void_p * max(1, len(args)))(*(base + place for place, _ in self.places))
        self.address = ctypes.addressof(self._pointers)

    def pack(self, args: Sequence[Any]) -> None:
        if self.maps:
            args = [arg.bytes if isinstance(arg, CudaTensorMap) else arg for arg in args]
        self._struct.pack_into(self._memory, self._start, *args)


def _format(name: str, i: int, arg: Argument) -> tuple[str, int, int]:
    """The letter of `struct`, size and alignment of an argument."""
    if isinstance(arg, CudaTensorMap):
        return f"{_MAP_BYTES}s", _MAP_BYTES, _MAP_ALIGNMENT
    if isinstance(arg, np.number | np.bool_):
        letter: str = "?" if isinstance(arg, np.bool_) else arg.dtype.char
        letter = {"l": "q", "L": "Q"}.get(letter, letter)
        if letter in "?bBhHiIqQefd":
            return letter, arg.itemsize, arg.itemsize
    elif isinstance(arg, int) and not isinstance(arg, bool):
        return "Q", 8, 8
    raise EngineError(f"{name}: argument {i}: expected int, a numpy scalar or a tensor map; found {arg!r}")


@dataclass(frozen=True)
class TimedLaunch:
    """A launch of a traced graph, with the events around it."""

    kernel: str
    integers: tuple[int, ...]
    """Its int32 arguments."""
    start: CudaEvent
    end: CudaEvent

    @property
    def ms(self) -> float:
        """Of the graph's last replay, which must be done."""
        return self.end.elapsed_ms(self.start)


class _Trace:
    """What is launched while a graph is captured for `CudaDevice.traced`."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self.launches: list[TimedLaunch] = []

    def begin(self, kernel: str, stream: CudaStream, args: Sequence[Argument]) -> TimedLaunch:
        integers = tuple(int(arg) for arg in args if isinstance(arg, np.int32))
        events = CudaEvent(self._device, True), CudaEvent(self._device, True)
        self.launches.append(TimedLaunch(kernel, integers, *events))
        events[0].record_in_graph(stream)
        return self.launches[-1]


class CudaFunction:
    """A kernel; launches of a known shape cost a few microseconds of this thread."""

    def __init__(self, device: CudaDevice, name: str, native: Any) -> None:
        self._device, self._name, self._native = device, name, native
        self._launch = device.driver.cuLaunchKernelEx
        self._layouts: dict[tuple[type, ...], _Layout] = {}
        self._configs: dict[tuple[Any, ...], Any] = {}
        self._lock = threading.Lock()

    def __call__(
        self,
        stream: CudaStream,
        grid: Dimensions,
        block: Dimensions,
        args: Sequence[Argument],
        dynamic_shared: int = 0,
        dependent: bool = True,
    ) -> None:
        device = self._device
        device.enter()
        dependent = dependent and device.overlapping
        types = tuple(map(type, args))
        with self._lock:  # the arguments' memory is the function's; the driver copies it in the call
            layout = self._layouts.get(types)
            if layout is None:
                layout = self._layouts[types] = self._new_layout(args)
            shape = (stream.handle, grid, block, dynamic_shared, dependent)
            try:
                config = self._configs.get(shape)
            except TypeError:  # a list
                shape = (stream.handle, tuple(dimensions(grid)), tuple(dimensions(block)), *shape[3:])
                config = self._configs.get(shape)
            if config is None:
                config = self._new_config(stream, grid, block, dynamic_shared, dependent)
                if len(self._configs) >= _MAX_CONFIGS:
                    self._configs.clear()
                self._configs[shape] = config
            try:
                layout.pack(args)
            except struct.error as err:
                raise EngineError(f"{self._name}: arguments {args!r}: {err}") from err
            timed = None if device.trace is None else device.trace.begin(self._name, stream, args)
            answer = self._launch(config, self._native, layout.address, 0)
            if timed is not None:
                timed.end.record_in_graph(stream)
        if answer[0]:
            device.check(answer, f"launching {self._name}, grid {grid}, block {block}")

    def _new_layout(self, args: Sequence[Argument]) -> _Layout:
        layout = _Layout(self._name, args)
        if not self._device.knows_parameters:
            return layout
        for i, (_, size) in enumerate(layout.places):
            result, _, expected = self._device.driver.cuFuncGetParamInfo(self._native, i)
            if result:
                raise EngineError(f"{self._name}: takes {i} arguments, given {len(args)}")
            if size != expected:
                raise EngineError(f"{self._name}: argument {i} has {expected} bytes, given {size}")
        if not self._device.driver.cuFuncGetParamInfo(self._native, len(args))[0]:
            raise EngineError(f"{self._name}: takes more than the {len(args)} arguments given")
        return layout

    def _new_config(
        self, stream: CudaStream, grid: Dimensions, block: Dimensions, dynamic_shared: int, dependent: bool
    ) -> Any:
        driver = self._device.driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = dimensions(grid)
        config.blockDimX, config.blockDimY, config.blockDimZ = dimensions(block)
        config.sharedMemBytes = dynamic_shared
        config.hStream = stream.native
        if dependent and self._device.dependent_launches:
            attribute = driver.CUlaunchAttribute()
            ids = driver.CUlaunchAttributeID
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        return config


class CudaModule:
    """A loaded cubin."""

    def __init__(self, device: CudaDevice, source: str, native: Any) -> None:
        self._device, self._source, self._native = device, source, native
        self._functions: dict[tuple[str, int], CudaFunction] = {}

    def function(self, name: str, shared_bytes: int = 0) -> CudaFunction:
        found = self._functions.get((name, shared_bytes))
        if found is None:
            found = self._functions[name, shared_bytes] = self._new_function(name, shared_bytes)
        return found

    def _new_function(self, name: str, shared_bytes: int) -> CudaFunction:
        device = self._device
        if shared_bytes > device.max_shared:
            raise EngineError(
                f"{name}: needs {shared_bytes} bytes of shared memory a block, "
                f"{device.name} has {device.max_shared}"
            )
        native = device.call(
            "cuModuleGetFunction", self._native, name.encode(), doing=f"{self._source}: looking up {name}"
        )
        if shared_bytes > DEFAULT_SHARED_BYTES:
            attribute = device.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            device.call("cuFuncSetAttribute", native, attribute, shared_bytes)
        # Kernels of a step overlap, and blocks that want L1 and shared memory divided otherwise cannot share
        # a multiprocessor: all ask for as much shared memory as there is.
        attribute = device.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        device.call("cuFuncSetAttribute", native, attribute, 100)
        if device.loads_functions:  # else its first launch would, perhaps during a capture
            device.call("cuFuncLoad", native)
        return CudaFunction(device, name, native)


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
        self._buffers: dict[int, CudaBuffer] = {}
        self._host_buffers: set[DriverMemory | HugePages] = set()
        self._modules: dict[tuple[Any, ...], CudaModule] = {}
        self._budget = memory_bytes
        self._reserved = 0
        """Bytes in use and being allocated."""
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
        self.trace: _Trace | None = None
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
        return CudaTensorMap(ctypes.string_at(int(encoded.getPtr()), _MAP_BYTES))

    # --- memory ---------------------------------------------------------------------------------------------

    @property
    def memory_free(self) -> int:
        on_card = int(self.call("cuMemGetInfo", whole=True)[0])
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
        try:
            self.enter()
            answer = self.driver.cuMemAlloc(size)
            if int(answer[0]) == _OUT_OF_MEMORY:
                free, total = self.call("cuMemGetInfo", whole=True)
                raise EngineError(
                    f"GPU memory: {what} need {_gb(size)}, {_gb(int(free))} of {self.name}'s "
                    f"{_gb(int(total))} are free{self._usage()}; end other programs on the GPU, or lower "
                    "what is kept on it"
                )
            self.check(answer, f"allocating {_gb(size)} for {what}")
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
        if self._lost is None:
            self.call("cuMemFree", buffer.address)

    def allocate_host(self, size: int, step: int = 0) -> DriverMemory | HugePages:
        if size <= 0:
            raise EngineError(f"pinned memory: expected a size above 0; found {size} bytes")
        self.enter()
        buffer: DriverMemory | HugePages
        if size >= HUGE_PAGE and self.shares_addresses:
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
        flags = self.driver.CU_MEMHOSTALLOC_PORTABLE | self.driver.CU_MEMHOSTALLOC_DEVICEMAP
        # The driver cuts small ones out of larger pages.
        host = int(self._locked(size, "cuMemHostAlloc", size + mmap.PAGESIZE, flags))
        address = int(self.call("cuMemHostGetDevicePointer", host, 0))
        return DriverMemory(self, host, address, size, -host % mmap.PAGESIZE)

    def pin(self, address: int, size: int) -> None:
        """Pin memory of the host's, whose address is then the device's too (`shares_addresses`)."""
        flags = self.driver.CU_MEMHOSTREGISTER_PORTABLE | self.driver.CU_MEMHOSTREGISTER_DEVICEMAP
        self._locked(size, "cuMemHostRegister", address, size, flags)

    def _locked(self, size: int, function: str, *args: Any) -> Any:
        """The value of a driver function that locks memory."""
        self.enter()
        answer = getattr(self.driver, function)(*args)
        if int(answer[0]) == _OUT_OF_MEMORY:
            raise EngineError(
                f"pinned memory: {_gb(size)} of host memory cannot be locked; lower what is kept in host "
                "memory, or raise its limit (ulimit -l, a container's memory)"
            )
        self.check(answer, f"locking {_gb(size)} of host memory")
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
        trace = self.trace = _Trace(self)
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
        for buffer in list(self._buffers.values()):
            self.discard("cuMemFree", buffer.address)
        for host in list(self._host_buffers):
            host.release()
        for module in self._modules.values():
            self.discard("cuModuleUnload", module._native)
        self._buffers.clear()
        self._host_buffers.clear()
        self._modules.clear()
        self._reserved = 0
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


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


_device: type[Device] = CudaDevice
_map: type[TensorMap] = CudaTensorMap
