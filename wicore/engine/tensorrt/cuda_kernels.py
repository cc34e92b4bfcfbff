"""Kernels of a card: loaded modules, launches whose arguments cost little to pack, and traces of them."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wicore.engine.tensorrt.cuda_streams import CudaEvent, CudaStream
from wicore.engine.tensorrt.device import DEFAULT_SHARED_BYTES, Argument, Dimensions, dimensions
from wicore.errors import EngineError

if TYPE_CHECKING:
    from wicore.engine.tensorrt.cuda import CudaDevice

MAP_BYTES = 128
"""Of an encoded tensor map."""
_MAP_ALIGNMENT = 64
_MAX_CONFIGS = 4096
"""Prepared launches of a function that are kept; prompts of all lengths make ever new ones."""


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
        return f"{MAP_BYTES}s", MAP_BYTES, _MAP_ALIGNMENT
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


class Trace:
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
