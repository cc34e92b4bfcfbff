"""Building an ONNX graph in code: operators by name, weights outside of the protobuf, then a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from wicore.engine.cpu.weights import Linear, QuantizedLinear

MS = "com.microsoft"
"""Domain of ONNX Runtime's contributed operators."""
_OPSET = 20
_SMALL_BYTES = 1024


@dataclass
class Graph:
    """An ONNX graph under construction; large weights stay outside the protobuf as `external`."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    external: dict[str, NDArray[Any]] = field(default_factory=dict)
    _count: int = 0
    _ints: dict[tuple[int, ...], str] = field(default_factory=dict)

    def name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def weight(self, array: NDArray[Any], stem: str = "w") -> str:
        name = self.name(stem)
        array = np.ascontiguousarray(array)
        if array.nbytes <= _SMALL_BYTES:
            self.initializers.append(numpy_helper.from_array(array, name))
            return name
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        entry = tensor.external_data.add()
        # The location is never opened: the session is given the array itself under this name.
        entry.key, entry.value = "location", "in-memory"
        self.initializers.append(tensor)
        self.external[name] = array
        return name

    def ints(self, *values: int) -> str:
        if values not in self._ints:
            self._ints[values] = self.weight(np.array(values, np.int64), "ints")
        return self._ints[values]

    def op(
        self, kind: str, inputs: Sequence[str], *, domain: str = "", out: str | None = None, **attrs: Any
    ) -> str:
        name = out or self.name(kind.lower())
        self.nodes.append(helper.make_node(kind, list(inputs), [name], domain=domain, **attrs))
        return name

    def choose(
        self, condition: str, then: Callable[[], str], otherwise: Callable[[], str], dtype: int
    ) -> str:
        """What one of two branches gives, a tensor of `dtype`; only the nodes of that one run."""
        branches = {"then_branch": self._branch(then, dtype), "else_branch": self._branch(otherwise, dtype)}
        return self.op("If", [condition], **branches)

    def _branch(self, build: Callable[[], str], dtype: int) -> onnx.GraphProto:
        outside, self.nodes = self.nodes, []
        result = helper.make_tensor_value_info(build(), dtype, None)
        branch = helper.make_graph(self.nodes, self.name("branch"), [], [result])
        self.nodes = outside
        return branch

    def split(self, x: str, sizes: Sequence[int], *, axis: int = -1) -> list[str]:
        names = [self.name("part") for _ in sizes]
        self.nodes.append(helper.make_node("Split", [x, self.ints(*sizes)], names, axis=axis))
        return names

    def norm(self, x: str, weight: NDArray[np.float32], eps: float) -> str:
        return self.op("SimplifiedLayerNormalization", [x, self.weight(weight, "norm")], axis=-1, epsilon=eps)

    def add_and_norm(self, x: str, delta: str, weight: NDArray[np.float32], eps: float) -> tuple[str, str]:
        """(x + delta, its norm) in one pass over memory."""
        total, normed = self.name("residual"), self.name("norm")
        node = helper.make_node(
            "SkipSimplifiedLayerNormalization",
            [x, delta, self.weight(weight, "norm")],
            [normed, "", "", total],
            domain=MS,
            epsilon=eps,
        )
        self.nodes.append(node)
        return total, normed

    def linear(self, x: str, w: Linear, *, refined: bool = False) -> str:
        """x @ w for x [1, N, in]. `refined` feeds a quantised matrix more than 8 bits of x."""
        if not isinstance(w, QuantizedLinear):
            return self.op("MatMul", [x, self.weight(w.matrix, "matrix")])
        rows = self._with_remainder(x, w) if refined else x
        # accuracy_level 4 quantises the input rows to 8 bits too, row by row, and is the mode whose
        # rows are bitwise independent of how many there are.
        y = self.op(
            "MatMulNBits",
            [rows, self.weight(w.codes, "codes"), self.weight(w.scales, "scales")],
            domain=MS,
            K=w.in_features,
            N=w.out_features,
            bits=8,
            block_size=w.group,
            accuracy_level=4,
        )
        if not refined:
            return y
        halves = self.op("Reshape", [y, self.ints(2, -1, w.out_features)])
        return self.op("ReduceSum", [halves, self.ints(0)], keepdims=1)

    def _with_remainder(self, x: str, w: QuantizedLinear) -> str:
        """[1, N, in] -> [1, 2 N, in]: the rows, then what rounding each group to 8 bits takes off them.

        The kernel rounds the first half exactly so, and the second half is small: the sum of both
        products has about 16 bits of x in it. On one or few rows it is nearly free, as reading the
        weights takes the time.
        """
        groups = self.op("Reshape", [x, self.ints(-1, w.in_features // w.group, w.group)])
        largest = self.op("ReduceMax", [self.op("Abs", [groups]), self.ints(-1)], keepdims=1)
        scale = self.op("Mul", [largest, self.weight(np.array(1 / 127, np.float32))])
        scale = self.op("Max", [scale, self.weight(np.array(1e-20, np.float32))])  # a group of zeros has none
        rounded = self.op("Mul", [self.op("Round", [self.op("Div", [groups, scale])]), scale])
        both = self.op("Concat", [groups, self.op("Sub", [groups, rounded])], axis=0)
        return self.op("Reshape", [both, self.ints(1, -1, w.in_features)])

    def session(self, name: str, threads: int) -> ort.InferenceSession:
        """The graph, compiled for this CPU."""
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initializers)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid(MS, 1)],
            ir_version=9,
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Shapes change from step to step, so a remembered allocation pattern would only hold memory.
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.use_env_allocators", "1")
        _register_arena()
        # Between runs the cores belong to the queue threads and to the other processes of the host.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in self.external.values()]
        options.add_external_initializers(list(self.external), values)
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@cache
def _register_arena() -> None:
    """One allocator for every session of the process: what the stack has freed serves the head, too."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    by_powers_of_two = 0
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, by_powers_of_two, -1, -1))
