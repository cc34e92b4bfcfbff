"""Which kernel makes which matrix product: by rule, or as measured on the card."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from wicore.engine.tensorrt.device import Device, Stream
from wicore.engine.tensorrt.hopper import HopperMatmul, Kind, Tiling
from wicore.engine.tensorrt.skinny import MAX_ROWS, Product, Setting, SkinnyMatmul
from wicore.errors import EngineError
from wicore.gemma3.config import Gemma3Config

Way: TypeAlias = "Setting | Tiling"
"""How a product is made: by `SkinnyMatmul` with this setting, or by `HopperMatmul` with this tiling."""

_HOPPER_FROM = 17
"""Rows below which the wide kernel's tiles of 64 are mostly idle: never worth measuring."""
SKINNY_TO = 256
"""Rows above which reading the matrix again for every 64 is never worth measuring, so that on Hopper only the
wide kernel multiplies: it can store deltas as half."""

_SKINNY_CANDIDATES, _HOPPER_CANDIDATES, _LOW_CANDIDATES = 6, 4, 6
"""The kernels' own models of the card put the best nearly always among so many; each must be compiled."""


@dataclass(frozen=True)
class Choice:
    """The fastest way found for a product of up to so many rows."""

    rows: int
    way: Way

    def as_json(self) -> dict[str, Any]:
        kernel = "skinny" if isinstance(self.way, Setting) else "hopper"
        return {"rows": self.rows, "kernel": kernel, **asdict(self.way)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Choice:
        """Raises EngineError for what `as_json` did not write."""
        fields = dict(value)
        try:
            rows, kernel = int(fields.pop("rows")), fields.pop("kernel")
            return cls(rows, {"skinny": Setting, "hopper": Tiling}[kernel](**fields))
        except (KeyError, TypeError, ValueError) as err:
            raise EngineError(f"measured choices: entry {value!r} is damaged: {err}") from err


class Matmuls:
    """`Matmul` by whichever kernel is the fastest known; by rule the skinny one up to 64 rows and Hopper's
    above, where there is one.

    The bits of a result depend on which of the two kernels made it, and on nothing else: with
    `invariant` it is always the skinny one.
    """

    def __init__(self, device: Device, *, invariant: bool = False) -> None:
        self.skinny = SkinnyMatmul(device)
        wide = device.capability[0] == 9 and not invariant
        self.hopper = HopperMatmul(device) if wide else None
        self._choices: dict[Product, list[Choice]] = {}

    def plain(
        self, stream: Stream, rows: int, x: int, w: int, y: int, n: int, k: int, half_out: bool
    ) -> None:
        self.run(stream, rows, x, w, y, Product(n, k, half_out=half_out))

    def glu(self, stream: Stream, rows: int, x: int, gate_up: int, y: int, inner: int, k: int) -> None:
        self.run(stream, rows, x, gate_up, y, Product(inner, k, gated=True, half_out=True))

    def delta(self, stream: Stream, rows: int, x: int, w: int, y: int, n: int, k: int, exponent: int) -> bool:
        half = self.half_deltas(rows)
        self.run(stream, rows, x, w, y, Product(n, k, half_out=half), exponent=exponent if half else None)
        return half

    def half_deltas(self, rows: int) -> bool:
        """Whether `delta` gives half: with many rows the norm behind it is bound by what it reads."""
        return self.hopper is not None and rows > SKINNY_TO

    def layer_products(self, config: Gemma3Config, rows: int) -> tuple[Product, Product, Product, Product]:
        """The products of a layer in a pass of so many rows: qkv, o, gate and up, down."""
        return layer_products(config, half_deltas=self.half_deltas(rows))

    def run(
        self,
        stream: Stream,
        rows: int,
        x: int,
        w: int,
        y: int,
        product: Product,
        way: Way | None = None,
        exponent: int | None = None,
    ) -> None:
        """Any of them, in a given way, else in the one chosen. `exponent` is for `half_deltas` alone."""
        way = way or self._chosen(rows, product)
        if self.hopper is None or isinstance(way, Setting) or (way is None and rows <= MAX_ROWS):
            setting = way if isinstance(way, Setting) else None
            self.skinny.run(stream, rows, x, w, y, product, setting)
        elif product.gated:
            self.hopper.glu(stream, rows, x, w, y, product.n, product.k, way)
        else:
            half = product.half_out
            self.hopper.plain(stream, rows, x, w, y, product.n, product.k, half, way, exponent)

    def candidates(self, rows: int, product: Product) -> list[Way]:
        """Ways worth measuring."""
        found: list[Way] = []
        if rows <= SKINNY_TO:
            found += self.skinny.candidates(min(rows, MAX_ROWS), product)[:_SKINNY_CANDIDATES]
        if self.hopper is not None and rows >= _HOPPER_FROM:
            tilings = self.hopper.candidates(rows, product.n, product.k, _kind(product))
            found += tilings[: _HOPPER_CANDIDATES if rows > MAX_ROWS else _LOW_CANDIDATES]
        return found

    def compile(self, wanted: Iterable[tuple[int, Product, Way]]) -> None:
        """Compile what `run` of these (rows, product, way) needs, on all cores.

        A way that the card cannot run is left for `run` to complain of.
        """

        def prepare(item: tuple[int, Product, Way]) -> None:
            rows, product, way = item
            with contextlib.suppress(EngineError):
                if isinstance(way, Setting):
                    self.skinny.prepare(rows, product, way)
                elif self.hopper is not None:
                    self.hopper.compile(way, _kind(product))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(prepare, wanted))

    def choose(self, product: Product, choices: Iterable[Choice]) -> None:
        """Use what was measured: for a number of rows the choice of the next larger, else of the largest."""
        self._choices[product] = sorted(choices, key=lambda choice: choice.rows)

    def prepare(self, most_rows: int, config: Gemma3Config) -> None:
        """Compile, on all cores, what a layer's products of more than 64 rows need, of up to `most_rows`."""
        wide: set[tuple[Tiling, Kind]] = set()
        skinny: set[tuple[Product, Setting | None]] = set()
        for rows in range(2 * MAX_ROWS, most_rows + MAX_ROWS, MAX_ROWS):
            for product in self.layer_products(config, rows):
                way = self._chosen(rows, product)
                if self.hopper is None or isinstance(way, Setting):
                    skinny.add((product, way if isinstance(way, Setting) else None))
                else:
                    shape = (product.n, product.k, _kind(product))
                    wide.add((way or self.hopper.choose(rows, *shape), _kind(product)))
        for product, setting in skinny:
            self.skinny.prepare(MAX_ROWS, product, setting)
        if self.hopper is not None:
            compile_ = self.hopper.compile
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda pair: compile_(*pair), wide))

    def _chosen(self, rows: int, product: Product) -> Way | None:
        choices: Sequence[Choice] = self._choices.get(product, ())
        chosen = next((c for c in choices if c.rows >= rows), choices[-1] if choices else None)
        if chosen is None:
            return None
        fits = isinstance(chosen.way, Setting) or self.hopper is not None
        return chosen.way if fits else None


def layer_products(
    config: Gemma3Config, *, half_deltas: bool = False
) -> tuple[Product, Product, Product, Product]:
    """The products of a layer: qkv, o, gate and up, down."""
    hidden, inner, wide = config.hidden_size, config.intermediate_size, config.heads * config.head_dim
    return (
        Product(wide + 2 * config.kv_heads * config.head_dim, hidden, half_out=True),
        Product(hidden, wide, half_out=half_deltas),
        Product(inner, hidden, gated=True, half_out=True),
        Product(hidden, inner, half_out=half_deltas),
    )


def _kind(product: Product) -> Kind:
    return "glu" if product.gated else "half" if product.half_out else "float"
