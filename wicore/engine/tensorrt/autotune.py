"""Measures, on the card and with the model's own weights, what is fastest for how many rows.

Every candidate is captured in a graph with several layers' weights in turn, so that none is found in the
cache, and the graph is timed by events. What was found is kept with the plans (`plans.Tuning`) under a key of
all that could change it.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from wicore.engine.tensorrt.bodies import Body, SegmentBody
from wicore.engine.tensorrt.device import KERNELS, Device
from wicore.engine.tensorrt.limits import Limits
from wicore.engine.tensorrt.matmuls import Choice, Matmuls, Way
from wicore.engine.tensorrt.skinny import MAX_ROWS, Product
from wicore.engine.tensorrt.timing import median_ms
from wicore.engine.tensorrt.weights import DeviceWeights
from wicore.engine.tensorrt.workspace import Workspace
from wicore.errors import EngineError
from wicore.gemma3.config import Gemma3Config

log = logging.getLogger("wicore.engine")

REVISION = 3
"""To be raised when candidates change, or how they are measured."""
_ROWS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_LAYERS = 4
"""Layers whose weights a measured graph uses in turn."""
_REPLAYS = 3
_PATTERN_BYTES = 1 << 20


@dataclass
class Choices:
    """What was measured."""

    products: dict[Product, list[Choice]] = field(default_factory=dict)
    segments: dict[int, bool] = field(default_factory=dict)
    """By rows: whether TensorRT's segments beat our kernels."""

    def as_json(self) -> dict[str, Any]:
        return {
            "products": [
                {
                    "n": product.n,
                    "k": product.k,
                    "gated": product.gated,
                    "half_out": product.half_out,
                    "choices": [choice.as_json() for choice in choices],
                }
                for product, choices in self.products.items()
            ],
            "segments": {str(rows): better for rows, better in self.segments.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Choices:
        """Raises EngineError for what `as_json` did not write."""
        try:
            products = {
                Product(entry["n"], entry["k"], entry["gated"], entry["half_out"]): [
                    Choice.from_json(choice) for choice in entry["choices"]
                ]
                for entry in value["products"]
            }
            return cls(products, {int(rows): bool(better) for rows, better in value["segments"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise EngineError(f"measured choices are damaged: {err}") from err

    def use(self, matmuls: Matmuls) -> None:
        for product, choices in self.products.items():
            matmuls.choose(product, choices)

    def segments_for(self, rows: int) -> bool:
        """Whether segments are faster for so many rows: as measured at the next larger number of rows."""
        measured = sorted(self.segments)
        at = next((m for m in measured if m >= rows), measured[-1] if measured else None)
        return at is not None and self.segments[at]


@dataclass(frozen=True)
class _Measured:
    """A product of the model and where its operands are; `weights` by layer."""

    product: Product
    x: int
    weights: Sequence[int]
    y: int


class Autotuner:
    """Measures in an engine's workspace, whose contents are lost."""

    def __init__(
        self, device: Device, config: Gemma3Config, weights: DeviceWeights, workspace: Workspace
    ) -> None:
        self._device, self._stream, self._config, self._weights = device, device.stream(), config, weights
        self._buffers, self._matmuls = workspace.buffers, workspace.matmuls
        self._rows, self._samples = workspace.limits.rows, workspace.limits.samples

    def run(self, kernels: Body, segments: SegmentBody | None) -> Choices:
        """Measure every product at every number of rows, use what is found, then try segments against it."""
        started = time.monotonic()
        self._fill()
        found = Choices()
        sizes = rows_to_measure(self._rows)
        products = [(rows, measured) for rows in sizes for measured in self._layer(rows)]
        products += [(rows, self._head()) for rows in rows_to_measure(self._samples)]
        self._matmuls.compile(
            (rows, measured.product, way)
            for rows, measured in products
            for way in self._matmuls.candidates(rows, measured.product)
        )
        for rows, measured in products:
            choice = self._best(measured, rows)
            if choice is not None:
                found.products.setdefault(measured.product, []).append(choice)
        found.use(self._matmuls)
        if segments is not None:
            for rows in sizes:
                if rows <= segments.max_rows:
                    ours, theirs = (self._body_ms(body, rows) for body in (kernels, segments))
                    found.segments[rows] = theirs < ours
                    log.info("%d rows, a layer: kernels %.3f ms, TensorRT %.3f ms", rows, ours, theirs)
        log.info("measured what is fastest on this card in %.1f s", time.monotonic() - started)
        return found

    def _layer(self, rows: int) -> Iterable[_Measured]:
        b, layers = self._buffers, self._weights.layers[:_LAYERS]
        qkv, out, gated, down = self._matmuls.layer_products(self._config, rows)
        yield _Measured(qkv, b.normed, [w.qkv for w in layers], b.qkv)
        yield _Measured(out, b.attended, [w.out for w in layers], b.delta)
        yield _Measured(gated, b.normed, [w.gate_up for w in layers], b.act)
        yield _Measured(down, b.act, [w.down for w in layers], b.delta)

    def _head(self) -> _Measured:
        product = Product(self._config.vocab_size, self._config.hidden_size)
        return _Measured(product, self._buffers.normed, [self._weights.embedding], self._buffers.logits)

    def _best(self, measured: _Measured, rows: int) -> Choice | None:
        times: list[tuple[float, int, Way]] = []
        stream, product, matmuls = self._stream, measured.product, self._matmuls
        for way in matmuls.candidates(rows, product):

            def work(way: Way = way) -> None:
                for weight in measured.weights:
                    matmuls.run(stream, rows, measured.x, weight, measured.y, product, way)

            try:
                times.append((self._ms(work, overlapping=rows > MAX_ROWS), len(times), way))
            except EngineError as err:
                # A candidate that the card cannot run; a device that was lost fails whatever comes next.
                log.debug("%s, %d rows, %s: %s", product, rows, way, err)
        if not times:
            return None
        best, _, way = min(times)
        log.debug("%s, %d rows: %.4f ms by %s", measured.product, rows, best / len(measured.weights), way)
        return Choice(rows, way)

    def _body_ms(self, body: Body, rows: int) -> float:
        layers = range(min(_LAYERS, len(self._weights.layers) - 1))

        def work() -> None:
            for layer in layers:
                body.after(self._stream, rows, layer)

        return self._ms(work) / max(1, len(layers))

    def _ms(self, work: Callable[[], None], *, overlapping: bool = True) -> float:
        """Milliseconds of a replay of what `work` enqueues."""
        work()
        graph = self._device.capture(self._stream, work, overlapping)
        try:
            return median_ms(self._device, self._stream, partial(graph.launch, self._stream), _REPLAYS)
        finally:
            graph.close()

    def _fill(self) -> None:
        """Activations of usual size: products of zeros take less power, and so less time, than real ones."""
        c, b, rows = self._config, self._buffers, self._rows
        pattern = np.random.default_rng(0).standard_normal(_PATTERN_BYTES // 2).astype(np.float16)
        wide = c.heads * c.head_dim
        for address, width in (
            (b.normed, c.hidden_size),
            (b.act, c.intermediate_size),
            (b.attended, wide),
        ):
            size = 2 * rows * width
            for at in range(0, size, _PATTERN_BYTES):
                part = min(_PATTERN_BYTES, size - at)
                self._device.copy(address + at, pattern.ctypes.data, part, self._stream)
        self._device.fill(b.residual, 0, 4 * rows * c.hidden_size, self._stream)
        self._stream.synchronize()


def rows_to_measure(most: int) -> tuple[int, ...]:
    """Numbers of rows up to the next larger one than `most`, which is itself measured in its place."""
    return (*(rows for rows in _ROWS if rows < most), most)


def tuning_key(device: Device, config: Gemma3Config, limits: Limits, backend: str) -> dict[str, str | int]:
    """All that could change what is fastest."""
    sources = hashlib.sha256()
    for path in sorted(KERNELS.iterdir()):
        sources.update(path.read_bytes())
    return {
        "revision": REVISION,
        "kernels": sources.hexdigest()[:16],
        "card": device.name,
        "sms": device.sms,
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab": config.vocab_size,
        "rows": limits.rows,
        "samples": limits.samples,
        "tensorrt": backend,
    }
