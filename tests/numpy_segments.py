"""`Segments` on the emulated device: the networks' definitions, evaluated by numpy on device memory."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.numpy_ops import evaluate
from wicore.engine.tensorrt.networks import KINDS, Binding
from wicore.engine.tensorrt.plan_kinds import AnyKind, AnyShape, bindings, rows_of
from wicore.errors import EngineError

_TYPES = {"half": np.float16, "float32": np.float32, "int32": np.int32}


class NumpySegments:
    """Has the face of `wicore.engine.tensorrt.segments.Segments`; needs no plan and no library."""

    memory_bytes = 0

    def __init__(self, shape: AnyShape, buckets: Sequence[int], kinds: Sequence[AnyKind] = KINDS) -> None:
        self._shape = shape
        self._rows = {kind: rows_of(kind, shape, buckets) for kind in kinds}
        self.runs: list[tuple[AnyKind, int]] = []
        """(kind, rows) of every run."""

    def max_rows(self, kind: AnyKind) -> int:
        return self._rows[kind][-1]

    def bucket(self, kind: AnyKind, rows: int) -> int:
        for most in self._rows.get(kind, ()):
            if 1 <= rows <= most:
                return most
        raise EngineError(f"no {kind} segment for {rows} rows is loaded")

    def run(self, stream: Any, kind: AnyKind, rows: int, addresses: Mapping[str, int]) -> None:
        self.bucket(kind, rows)
        wanted = {binding.name: addresses[binding.name] for binding in bindings(kind, self._shape)}
        stream.submit(lambda: self._evaluate(kind, rows, wanted))

    def close(self) -> None: ...

    def _evaluate(self, kind: AnyKind, rows: int, addresses: Mapping[str, int]) -> None:
        views = {b.name: _view(addresses[b.name], b, rows) for b in bindings(kind, self._shape)}
        for name, values in evaluate(kind, self._shape, views).items():
            views[name][:] = values
        self.runs.append((kind, rows))


def _view(address: int, binding: Binding, rows: int) -> NDArray[Any]:
    """Device memory, which is host memory here, as the binding's array."""
    size = binding.sized(rows)
    memory = (ctypes.c_uint8 * binding.nbytes(rows)).from_address(address)
    return np.frombuffer(memory, _TYPES[binding.dtype], math.prod(size)).reshape(size)
