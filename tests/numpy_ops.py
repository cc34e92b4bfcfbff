"""`networks.Ops` in numpy: a network's definition, evaluated with the roundings that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wicore.engine.tensorrt.networks import Binding
from wicore.engine.tensorrt.plan_kinds import AnyKind, AnyShape, define

Array = NDArray[Any]


class NumpyOps:
    """Evaluates each operation as it is described.

    wide, narrow: the types that stand for float32 and 16 bits; both float64 leave only the mathematics.
    """

    def __init__(self, given: Mapping[str, Array], wide: Any, narrow: Any) -> None:
        self._given = given
        self._wide, self._narrow = wide, narrow
        self.outputs: dict[str, Array] = {}

    def input(self, binding: Binding) -> Array:
        array = self._given[binding.name]
        assert array.shape == binding.sized(array.shape[0]), binding.name
        if binding.dtype == "int32":
            return array
        return array.astype(self._narrow if binding.dtype == "half" else self._wide)

    def output(self, binding: Binding, value: Array) -> None:
        assert binding.output
        assert value.dtype == (self._narrow if binding.dtype == "half" else self._wide), binding.name
        assert value.shape == binding.sized(value.shape[0]), binding.name
        self.outputs[binding.name] = value

    def constant(self, value: float) -> Array:
        return np.array([[value]], self._wide)

    def widen(self, x: Array) -> Array:
        assert x.dtype == self._narrow
        return x.astype(self._wide)

    def narrow(self, x: Array) -> Array:
        return self._checked(x).astype(self._narrow)

    def add(self, a: Array, b: Array) -> Array:
        return self._checked(a) + self._checked(b)

    def multiply(self, a: Array, b: Array) -> Array:
        return self._checked(a) * self._checked(b)

    def divide(self, a: Array, b: Array) -> Array:
        return self._checked(a) / self._checked(b)

    def clip(self, x: Array, limit: float) -> Array:
        return np.clip(self._checked(x), self._wide(-limit), self._wide(limit))

    def root(self, x: Array) -> Array:
        return np.sqrt(self._checked(x))

    def tanh(self, x: Array) -> Array:
        return np.tanh(self._checked(x))

    def mean(self, x: Array) -> Array:
        return np.mean(self._checked(x), axis=1, keepdims=True)

    def product(self, x: Array, weight: Array, *, transposed: bool = True) -> Array:
        assert x.dtype == weight.dtype == self._narrow
        turned = np.swapaxes(weight, -1, -2) if transposed else weight
        with np.errstate(over="ignore"):  # to infinity, as the hardware does
            return (x.astype(self._wide) @ turned.astype(self._wide)).astype(self._narrow)

    def gather(self, table: Array, ids: Array) -> Array:
        assert table.dtype == self._narrow
        return table[ids]

    def columns(self, x: Array, first: int, count: int) -> Array:
        assert x.dtype == self._narrow
        assert first + count <= x.shape[1]
        return x[:, first : first + count]

    def heads(self, x: Array, count: int) -> Array:
        assert x.dtype == self._narrow
        return x.reshape(len(x), count, -1).swapaxes(0, 1)

    def joined(self, x: Array) -> Array:
        assert x.dtype == self._narrow
        return x.swapaxes(0, 1).reshape(x.shape[1], -1)

    def softmax(self, x: Array) -> Array:
        powers = np.exp(self._checked(x) - x.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    def pool(self, x: Array, side: int, window: int) -> Array:
        cells = self._checked(x).reshape(side, window, side, window, -1)
        return cells.mean((1, 3)).reshape(side * side, -1)

    def _checked(self, x: Array) -> Array:
        assert x.dtype == self._wide
        return x


def evaluate(
    kind: AnyKind,
    shape: AnyShape,
    given: Mapping[str, Array],
    *,
    wide: Any = np.float32,
    narrow: Any = np.float16,
) -> dict[str, Array]:
    """The outputs of a network by name."""
    ops = NumpyOps(given, wide, narrow)
    define(kind, shape, ops)
    return ops.outputs
