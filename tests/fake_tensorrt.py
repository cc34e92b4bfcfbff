"""TensorRT's Python face as far as WiCore uses it, without TensorRT: it records what it is told.

Two dialects: "8.6" (weakly typed) and "11.0" (strongly typed, memory given by the user with its size).
"""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class Logger:
    """The base of the logger that Backend makes."""

    Severity = Severity


class Layer:
    def __init__(self, what: str, *inputs: Any) -> None:
        self.what, self.inputs = what, inputs
        self.precision: Any = None
        self.output_type: Any = None
        self.reshape_dims: tuple[int, ...] | None = None
        self.first_transpose: tuple[int, ...] | None = None
        self._output = Output(self)

    def set_output_type(self, index: int, dtype: Any) -> None:
        assert index == 0
        self.output_type = dtype

    def get_output(self, index: int) -> Any:
        assert index == 0
        return self._output


class Output:
    """A layer's output, whose shape is found where the networks ask for it."""

    def __init__(self, layer: Layer) -> None:
        self.name, self.dtype, self.layer = "", None, layer

    @property
    def shape(self) -> tuple[int, ...]:
        layer = self.layer
        shape = layer.inputs[0].shape
        if layer.what == "slice":
            return layer.inputs[2]
        if layer.what == "matrix_multiply":
            turned = layer.inputs[3].name == "TRANSPOSE"
            return (*shape[:-1], layer.inputs[2].shape[-2 if turned else -1])
        if layer.first_transpose is not None:
            return tuple(shape[i] for i in layer.first_transpose)
        return layer.reshape_dims or shape


class Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.layers: list[Layer] = []
        self.inputs: dict[str, Any] = {}
        self.outputs: list[Any] = []

    def add_input(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Any:
        self.inputs[name] = SimpleNamespace(name=name, dtype=dtype, shape=shape)
        return self.inputs[name]

    def mark_output(self, tensor: Any) -> None:
        self.outputs.append(tensor)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("add_"):
            raise AttributeError(name)

        def add(*args: Any, **kwargs: Any) -> Layer:
            self.layers.append(Layer(name.removeprefix("add_"), *args, *kwargs.values()))
            return self.layers[-1]

        return add


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.lines = set(data.split())

    def combine(self, other: TimingCache, ignore_mismatch: bool) -> bool:
        self.lines |= other.lines
        return not ignore_mismatch

    def serialize(self) -> bytes:
        return b" ".join(sorted(self.lines))


class Config:
    def __init__(self) -> None:
        self.flags: set[Any] = set()
        self.profiles: list[Any] = []
        self.tactic_sources: int | None = None
        self.workspace = 0
        self.timing: TimingCache | None = None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.workspace = size

    def set_tactic_sources(self, sources: int) -> None:
        self.tactic_sources = sources

    def add_optimization_profile(self, profile: Any) -> None:
        self.profiles.append(profile)

    def create_timing_cache(self, data: bytes) -> TimingCache:
        return TimingCache(data)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self.timing = cache
        return not ignore_mismatch


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, Any, Any]] = {}

    def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
        self.shapes[name] = (least, best, most)


class Engine:
    """A loaded plan. A fake plan is b"PLAN name name ...": the tensors it wants."""

    def __init__(self, module: FakeTensorRT, plan: bytes) -> None:
        self._module = module
        self._names = plan.decode().split()[1:]
        self.num_io_tensors = len(self._names)
        self.contexts: list[Context] = []
        size = 1000 * len(self._names)
        if module.dialect == "8.6":
            self.device_memory_size = size
            self.create_execution_context_without_device_memory = self._context
        else:
            self.device_memory_size_v2 = size
            self.create_execution_context = self._context

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def _context(self, strategy: Any = None) -> Context:
        assert (strategy is None) == (self._module.dialect == "8.6")
        context = Context(self._module) if self._module.dialect == "8.6" else SizedContext(self._module)
        self._module.contexts.append(context)
        return context


class Context:
    def __init__(self, module: FakeTensorRT) -> None:
        self._module = module
        self.device_memory = 0
        self.shapes: list[tuple[str, tuple[int, ...]]] = []
        self.addresses: dict[str, int] = {}
        self.runs: list[tuple[int, dict[str, int]]] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes.append((name, shape))
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self._module.failure:
            self._module.loggers[-1].log(Severity.ERROR, self._module.failure)
            return False
        self.runs.append((stream, dict(self.addresses)))
        return True


class SizedContext(Context):
    def set_device_memory(self, address: int, size: int) -> None:
        self.device_memory, self.device_memory_size = address, size


class FakeTensorRT:
    """The module. `failure`: what the next runs fail with; `loggers`, `builders`, `contexts`: all made."""

    ILogger = Logger
    MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
    ElementWiseOperation = enum.Enum("ElementWiseOperation", "SUM PROD DIV")
    ActivationType = enum.Enum("ActivationType", "CLIP TANH")
    UnaryOperation = enum.Enum("UnaryOperation", "SQRT")
    ReduceOperation = enum.Enum("ReduceOperation", "AVG")
    MatrixOperation = enum.Enum("MatrixOperation", "NONE TRANSPOSE")
    Permutation = tuple

    def __init__(self, version: str = "8.6.0") -> None:
        self.__version__ = version
        self.dialect = "8.6" if version.startswith("8.") else "11.0"
        self.failure = ""
        self.loggers: list[Any] = []
        self.contexts: list[Context] = []
        self.builders: list[Any] = []
        old = self.dialect == "8.6"
        types = ["FLOAT", "HALF", "INT32"] + ([] if old else ["BF16"])
        self.DataType = enum.Enum("DataType", types)
        flags = {"EXPLICIT_BATCH": 0} if old else {"STRONGLY_TYPED": 1}
        self.NetworkDefinitionCreationFlag = enum.IntEnum("Flag", flags)
        self.BuilderFlag = enum.Enum(
            "BuilderFlag", "FP16 OBEY_PRECISION_CONSTRAINTS" if old else "REQUIRE_USER_ALLOCATION"
        )
        if not old:
            self.ExecutionContextAllocationStrategy = enum.Enum("Strategy", "STATIC USER_MANAGED")

    def Weights(self, array: Any) -> Any:  # noqa: N802
        return array

    def Builder(self, logger: Any) -> Any:  # noqa: N802
        builder = SimpleNamespace(network=None, config=None)

        def create_network(flags: int) -> Network:
            builder.network = Network(flags)
            return builder.network

        def create_builder_config() -> Config:
            builder.config = Config()
            return builder.config

        def build_serialized_network(network: Network, config: Config) -> bytes | None:
            if self.failure:
                logger.log(Severity.ERROR, self.failure)
                return None
            if config.timing is not None:
                config.timing.lines.add(b"kernel%d" % len(config.timing.lines))
            return ("PLAN " + " ".join([*network.inputs, *(t.name for t in network.outputs)])).encode()

        builder.create_network = create_network
        builder.create_builder_config = create_builder_config
        builder.create_optimization_profile = Profile
        builder.build_serialized_network = build_serialized_network
        self.builders.append(builder)
        return builder

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        self.loggers.append(logger)

        def deserialize_cuda_engine(plan: bytes) -> Engine | None:
            if not plan.startswith(b"PLAN "):
                logger.log(Severity.ERROR, "Serialization assertion stdVersionRead == kVERSION failed")
                return None
            return Engine(self, plan)

        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine)
