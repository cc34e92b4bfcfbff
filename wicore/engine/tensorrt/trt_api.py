"""TensorRT's three dialects behind one face.

    tensorrt 8.6      weakly typed: what is to be float32 must be said layer by layer; float16 only
    tensorrt 10, 11   strongly typed: the types of the inputs and the casts decide; bfloat16 too
    tensorrt_rtx      as 11, but builds ahead of time for a card that need not be there

A library is imported when it is first asked for; everything raises EngineError with what TensorRT logged.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from wicore.engine.tensorrt.networks import Binding, HalfType
from wicore.errors import EngineError

BackendName = Literal["tensorrt", "tensorrt_rtx"]

BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
_EXTRAS: Mapping[BackendName, str] = {"tensorrt": "gpu", "tensorrt_rtx": "rtx"}
_LOG = logging.getLogger(__name__)


class _Said(NamedTuple):
    """The last of what TensorRT logged."""

    errors: deque[str]
    warnings: deque[str]


class Backend:
    """One TensorRT library. Attributes: name, version, and the module itself."""

    def __init__(self, name: BackendName, module: Any) -> None:
        self.name = name
        self.module = module
        self.version: str = module.__version__
        self._said = _Said(deque(maxlen=3), deque(maxlen=1))
        self.logger = _logger(module, self._said)

    @property
    def strongly_typed(self) -> bool:
        return hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds for cards that are not there, without measuring anything."""
        return self.name == "tensorrt_rtx"

    def element(self, dtype: str) -> Any:
        """TensorRT's name of "int32", "float32", "float16" or "bfloat16"."""
        names = {"int32": "INT32", "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
        found = getattr(self.module.DataType, names[dtype], None)
        if found is None:
            raise EngineError(f"{self.name} {self.version} has no {dtype}; use float16")
        return found

    def error(self, what: str) -> EngineError:
        """An error that ends with what TensorRT said; forgets it."""
        said = "; ".join(self._said.errors or self._said.warnings) or "TensorRT gave no reason"
        self._said.errors.clear()
        self._said.warnings.clear()
        return EngineError(f"{what}: {said}")


@cache
def load_backend(name: BackendName) -> Backend:
    """The library of that name. Raises EngineError naming the extra that installs it."""
    try:
        return Backend(name, importlib.import_module(name))
    except (ImportError, OSError, AttributeError) as err:
        raise EngineError(
            f"{name} cannot be loaded ({err}); install it with pip install 'wicore[{_EXTRAS[name]}]'"
        ) from None


def installed_backends() -> list[Backend]:
    """Those that can be loaded here."""
    found = []
    for name in BACKENDS:
        try:
            found.append(load_backend(name))
        except EngineError:
            continue
    return found


def _logger(module: Any, said: _Said) -> Any:
    """TensorRT's log, sent on to `logging`; the last of it is also kept for exceptions."""
    severity = module.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
    }

    class Forward(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity)
            if level is None:  # verbose: a hundred thousand lines a build
                return
            if level == logging.ERROR:
                said.errors.append(message.strip())
            elif level == logging.WARNING:
                said.warnings.append(message.strip())
            _LOG.log(level, "%s", message.strip())

    return Forward()


@dataclass(frozen=True, slots=True)
class Card:
    """The first GPU that this process may use."""

    name: str
    capability: str
    """E.g. "9.0"."""
    driver: str
    """The newest CUDA that the driver knows, e.g. "13.0"."""


def find_card() -> Card | None:
    """The card, by the driver's own library; None where there is no driver or no card."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, driver = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    parts = []
    for attribute in (75, 76):  # compute capability, major and minor
        value = ctypes.c_int()
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        parts.append(str(value.value))
    if cuda.cuDeviceGetName(name, len(name), device) or cuda.cuDriverGetVersion(ctypes.byref(driver)):
        return None
    version = driver.value
    return Card(name.value.decode(), ".".join(parts), f"{version // 1000}.{version % 1000 // 10}")


# --- building -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How hard to try; changes no result but speed."""

    workspace_bytes: int = 4 << 30
    """Most scratch memory a kernel of the plan may use."""
    effort: int | None = None
    """TensorRT's builder_optimization_level, 0 to 5; None: its default."""
    detailed: bool = False
    """Let the plan name the kernels it uses, to look at."""


def compute_capabilities(backend: Backend) -> list[str]:
    """What an ahead-of-time backend builds for, e.g. ["7.5", "8.9", "12.0"]."""
    names = (str(name) for name in backend.module.ComputeCapability.__members__)
    digits = (name.removeprefix("SM") for name in names if name.startswith("SM"))
    return [f"{d[:-1]}.{d[-1]}" for d in sorted(digits, key=int)]


def _capability(backend: Backend, wanted: str) -> Any:
    known = compute_capabilities(backend)
    if wanted not in known:
        raise EngineError(
            f"{backend.name} {backend.version} builds for compute capability {', '.join(known)}; not {wanted}"
        )
    return getattr(backend.module.ComputeCapability, "SM" + wanted.replace(".", ""))


def build(
    backend: Backend,
    describe: Callable[[TensorRTOps], None],
    *,
    half: HalfType,
    rows: int,
    capability: str,
    options: BuildOptions,
    timing: Callable[[Any], None] | None = None,
) -> bytes:
    """Build a plan for 1 to `rows` rows, fastest at `rows`.

    `describe` defines the network. `capability` is for ahead-of-time backends; others build for the card
    that is there. `timing` is called with the builder's configuration before and after, to set and to keep
    its timing cache. Raises EngineError with TensorRT's reason.
    """
    module = backend.module
    try:
        builder = module.Builder(backend.logger)
    except TypeError:
        raise backend.error(f"{backend.name} {backend.version} cannot build here") from None
    ops = TensorRTOps(backend, builder, half)
    describe(ops)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.max_aux_streams = 0
    if options.effort is not None:
        config.builder_optimization_level = options.effort
    if options.detailed:
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if not backend.strongly_typed:
        config.set_flag(module.BuilderFlag.FP16)
        config.set_flag(module.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        config.set_tactic_sources(0)  # no cuBLAS, no cuDNN: neither is faster here, nor always installed
    if hasattr(module.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)  # so that a run can be captured
    if backend.ahead_of_time:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability(backend, capability), 0)
    if ops.dynamic_inputs:
        profile = builder.create_optimization_profile()
        for binding in ops.dynamic_inputs:
            profile.set_shape(binding.name, binding.sized(1), binding.sized(rows), binding.sized(rows))
        config.add_optimization_profile(profile)
    if timing is not None:
        timing(config)
    plan = builder.build_serialized_network(ops.network, config)
    if plan is None:
        raise backend.error(f"{backend.name} {backend.version} could not build a plan for {rows} rows")
    if timing is not None:
        timing(config)
    return bytes(plan)


class TensorRTOps:
    """`networks.Ops` that adds layers to a TensorRT network."""

    def __init__(self, backend: Backend, builder: Any, half: HalfType) -> None:
        self._backend = backend
        self._trt = module = backend.module
        flag = module.NetworkDefinitionCreationFlag
        chosen = flag.STRONGLY_TYPED if backend.strongly_typed else flag.EXPLICIT_BATCH
        self.network = builder.create_network(1 << int(chosen))
        self._half = backend.element(half)
        self._float = backend.element("float32")
        self._alive: list[Any] = []
        """Constants, which TensorRT reads when it builds."""
        self.dynamic_inputs: list[Binding] = []

    def input(self, binding: Binding) -> Any:
        if binding.dynamic:
            self.dynamic_inputs.append(binding)
        return self.network.add_input(binding.name, self._type(binding), binding.shape)

    def output(self, binding: Binding, value: Any) -> None:
        value.name = binding.name
        self.network.mark_output(value)
        if not self._backend.strongly_typed:
            value.dtype = self._type(binding)

    def constant(self, value: float) -> Any:
        data = np.array([[value]], np.float32)
        self._alive.append(data)
        layer = self.network.add_constant((1, 1), self._trt.Weights(data))
        if not self._backend.strongly_typed:
            layer.set_output_type(0, self._float)
        return self._layer(layer, None)

    def widen(self, x: Any) -> Any:
        return self._layer(self.network.add_cast(x, self._float), None)

    def narrow(self, x: Any) -> Any:
        return self._layer(self.network.add_cast(x, self._half), None)

    def add(self, a: Any, b: Any) -> Any:
        return self._elementwise(a, b, self._trt.ElementWiseOperation.SUM)

    def multiply(self, a: Any, b: Any) -> Any:
        return self._elementwise(a, b, self._trt.ElementWiseOperation.PROD)

    def divide(self, a: Any, b: Any) -> Any:
        return self._elementwise(a, b, self._trt.ElementWiseOperation.DIV)

    def clip(self, x: Any, limit: float) -> Any:
        layer = self.network.add_activation(x, self._trt.ActivationType.CLIP)
        layer.alpha, layer.beta = -limit, limit
        return self._layer(layer, self._float)

    def root(self, x: Any) -> Any:
        return self._layer(self.network.add_unary(x, self._trt.UnaryOperation.SQRT), self._float)

    def tanh(self, x: Any) -> Any:
        return self._layer(self.network.add_activation(x, self._trt.ActivationType.TANH), self._float)

    def mean(self, x: Any) -> Any:
        layer = self.network.add_reduce(x, self._trt.ReduceOperation.AVG, axes=1 << 1, keep_dims=True)
        return self._layer(layer, self._float)

    def product(self, x: Any, weight: Any, *, transposed: bool = True) -> Any:
        plain = self._trt.MatrixOperation.NONE
        turned = self._trt.MatrixOperation.TRANSPOSE if transposed else plain
        return self._layer(self.network.add_matrix_multiply(x, plain, weight, turned), self._half)

    def gather(self, table: Any, ids: Any) -> Any:
        return self._layer(self.network.add_gather(table, ids, 0), self._half)

    def columns(self, x: Any, first: int, count: int) -> Any:
        layer = self.network.add_slice(x, (0, first), (x.shape[0], count), (1, 1))
        return self._layer(layer, self._half)

    def heads(self, x: Any, count: int) -> Any:
        rows, width = x.shape
        return self._turned(self._shaped(x, (rows, count, width // count), self._half), self._half)

    def joined(self, x: Any) -> Any:
        count, rows, width = x.shape
        return self._shaped(self._turned(x, self._half), (rows, count * width), self._half)

    def softmax(self, x: Any) -> Any:
        layer = self.network.add_softmax(x)
        layer.axes = 1 << 2
        return self._layer(layer, self._float)

    def pool(self, x: Any, side: int, window: int) -> Any:
        width = x.shape[1]
        cells = self._shaped(x, (side, window, side, window, width), self._float)
        over = 1 << 1 | 1 << 3
        means = self.network.add_reduce(cells, self._trt.ReduceOperation.AVG, axes=over, keep_dims=False)
        return self._shaped(self._layer(means, self._float), (side * side, width), self._float)

    def _shaped(self, x: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        layer = self.network.add_shuffle(x)
        layer.reshape_dims = shape
        return self._layer(layer, dtype)

    def _turned(self, x: Any, dtype: Any) -> Any:
        """With the first two of three dimensions exchanged."""
        layer = self.network.add_shuffle(x)
        layer.first_transpose = self._trt.Permutation([1, 0, 2])
        return self._layer(layer, dtype)

    def _elementwise(self, a: Any, b: Any, operation: Any) -> Any:
        return self._layer(self.network.add_elementwise(a, b, operation), self._float)

    def _layer(self, layer: Any, dtype: Any) -> Any:
        """Its output. Weakly typed networks compute in whatever type is fastest unless told."""
        if layer is None:
            raise self._backend.error("TensorRT refused a layer")
        if dtype is not None and not self._backend.strongly_typed:
            layer.precision = dtype
            layer.set_output_type(0, dtype)
        return layer.get_output(0)

    def _type(self, binding: Binding) -> Any:
        return self._half if binding.dtype == "half" else self._backend.element(binding.dtype)


# --- running ------------------------------------------------------------------------------------


class LoadedPlan:
    """A plan with the one execution context that all layers share."""

    def __init__(self, backend: Backend, runtime: Any, plan: bytes, what: str) -> None:
        """Raises EngineError naming `what` when the plan does not load here."""
        self._backend = backend
        self._what = what
        self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise backend.error(
                f"{what}: {backend.name} {backend.version} refuses the plan; build it again with "
                "`wicore plan build --rebuild`"
            )
        self._context = self._create_context()
        if self._context is None:
            raise backend.error(f"{what}: no execution context")
        self._rows = 0
        engine = self._engine
        self.names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]

    @property
    def memory_bytes(self) -> int:
        """Device memory that a run uses for what is between the layers."""
        engine = self._engine
        return int(
            engine.device_memory_size_v2
            if hasattr(engine, "device_memory_size_v2")
            else engine.device_memory_size
        )

    def use_memory(self, address: int, size: int) -> None:
        """Let runs use this memory, 256-byte aligned and `memory_bytes` at least; others may in between."""
        if hasattr(self._context, "set_device_memory"):
            self._context.set_device_memory(address, size)
        else:
            self._context.device_memory = address

    def run(self, stream: int, rows: int, dynamic: tuple[Binding, ...], addresses: Mapping[str, int]) -> None:
        """Enqueue one run on a stream. Raises EngineError, also for a tensor without an address."""
        context = self._context
        if rows != self._rows:
            self._rows = 0
            for binding in dynamic:
                if not context.set_input_shape(binding.name, binding.sized(rows)):
                    raise self._backend.error(f"{self._what}: {binding.name} cannot have {rows} rows")
            self._rows = rows
        try:
            for name in self.names:
                context.set_tensor_address(name, addresses[name])
        except KeyError as err:
            raise EngineError(f"{self._what}: nothing is bound to {err.args[0]!r}") from None
        if not context.execute_async_v3(stream):
            raise self._backend.error(f"{self._what}: the run of {rows} rows failed")

    def layers(self) -> list[str]:
        """TensorRT's description of each layer in JSON; its name only, if the plan is not detailed."""
        inspector, form = self._engine.create_engine_inspector(), self._backend.module.LayerInformationFormat
        return [inspector.get_layer_information(i, form.JSON).strip() for i in range(self._engine.num_layers)]

    def profile(self, report: Any) -> None:
        """Let `report`, an IProfiler, hear the time of each layer after each run; slows runs down."""
        self._context.profiler = report

    def _create_context(self) -> Any:
        module, engine = self._backend.module, self._engine
        strategies = getattr(module, "ExecutionContextAllocationStrategy", None)
        if strategies is None:
            return engine.create_execution_context_without_device_memory()
        if not self._backend.ahead_of_time:
            return engine.create_execution_context(strategies.USER_MANAGED)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategies.USER_MANAGED)
        # Kernels made for a shape while others run would change a row's numbers from one run to the next.
        specialise = module.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = specialise.NONE
        return engine.create_execution_context(config)
