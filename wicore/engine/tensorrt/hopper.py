"""Matrix products of many rows on Hopper (kernels/hopper.cu): y = x w^T, half operands, float32 sums.

How a product is cut into tiles is chosen by a model of the card's limits, or given. The cut does not touch
the numbers: every sum runs over k in ascending order, so a row's result is the same whatever the tile and the
number of rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from wicore.engine.tensorrt.device import Device, Function, TensorMap
from wicore.errors import EngineError

Kind = Literal["half", "float", "glu", "bias", "gelu"]
"""What is stored: half, float32, half of the gated activation, half with a bias, or half of that's gelu."""

_SHARED_BYTES = 227 << 10
_ALIGNMENT = 1024
_HEADER = 1024
_STEP = 64
_MAX_STAGES = 16
_WIDTHS = (48, 64, 88, 96, 112, 128, 144, 160, 168, 176, 192, 208, 224, 240, 256)

# Of the model that orders the candidates: multiples of a multiprocessor's clock, and bytes a clock.
_STEP_OVERHEAD = 40
_TILE_OVERHEAD = 1500
_SHARED_RATE = 128.0
_CACHE_RATE = 44.0
_MEMORY_RATE = 16.0
_MAPS = 4096
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Tiling:
    """How a product is cut. A tile has 64 * consumers rows and `columns` rows of w."""

    columns: int
    """8 to 256, a multiple of 8; for glu a multiple of 16: half of them are gate and half are up columns."""
    consumers: int = 2
    """Warpgroups that multiply, 1 to 3."""
    cluster_rows: int = 1
    """Blocks of a cluster below each other, which share the tile of w."""
    cluster_columns: int = 1
    """Blocks of a cluster side by side, which share the tile of x."""
    stages: int = 0
    """Tiles in the ring; 0: as many as fit."""
    stagger: int = 0
    """Steps of k by which the second consumer starts later."""
    group: int = 0
    """Rows of clusters gone through together; 0: such that what runs at one time is about square."""

    @property
    def rows(self) -> int:
        return 64 * self.consumers

    @property
    def cluster(self) -> int:
        return self.cluster_rows * self.cluster_columns

    @property
    def threads(self) -> int:
        return 128 * (1 + self.consumers)

    @property
    def stage_bytes(self) -> int:
        return (self.rows + self.columns) * _STEP * 2

    @property
    def ring(self) -> int:
        """Tiles in the ring."""
        fit = (_SHARED_BYTES - _ALIGNMENT - _HEADER) // self.stage_bytes
        return self.stages or min(fit, _MAX_STAGES)

    @property
    def shared_bytes(self) -> int:
        return _HEADER + self.ring * self.stage_bytes

    def out_columns(self, kind: Kind) -> int:
        """Columns of y in a tile."""
        return self.columns // 2 if kind == "glu" else self.columns

    def box(self, kind: Kind) -> int:
        """Rows of w in one copy: each block of a cluster makes one where up to four copies allow it."""
        least = 2 if kind == "glu" else 1
        for pieces in range(max(self.cluster_rows, least), 5):
            if self.columns % (8 * pieces) == 0 and pieces % least == 0:
                return self.columns // pieces
        if self.columns % (8 * least):
            raise EngineError(f"{self}: columns must be a multiple of {8 * least}")
        return self.columns // least

    def defines(self, kind: Kind) -> dict[str, int | str]:
        """The kernel's macros."""
        return {
            "TILE_N": self.columns,
            "CONSUMERS": self.consumers,
            "CLUSTER_M": self.cluster_rows,
            "CLUSTER_N": self.cluster_columns,
            "B_BOX": self.box(kind),
            "STAGES": self.ring,
            "STAGGER": self.stagger,
            "GLU": int(kind == "glu"),
            "HALF_OUT": int(kind != "float"),
            "BIAS": int(kind in ("bias", "gelu")),
            "GELU": int(kind == "gelu"),
        }

    def clusters(self, rows: int, n: int, kind: Kind) -> tuple[int, int]:
        """Clusters of tiles below each other and side by side."""
        down = -(-rows // (self.rows * self.cluster_rows))
        return down, -(-n // (self.out_columns(kind) * self.cluster_columns))

    def slots(self, sms: int) -> int:
        """Clusters that run at one time; those of more than two blocks do not fill every part of the chip."""
        return max(1, sms // self.cluster - (1 if self.cluster > 2 and sms > 16 else 0))

    def height(self, sms: int) -> int:
        """`group`, or the height at which the rows and columns that run at one time are the fewest."""
        if self.group:
            return self.group
        slots, rows, columns = (
            self.slots(sms),
            self.rows * self.cluster_rows,
            self.columns * self.cluster_columns,
        )
        return min(range(1, slots + 1), key=lambda g: g * rows + -(-slots // g) * columns)

    def idle(self, n: int, kind: Kind, sms: int) -> float:
        """Share of the multiprocessors' time in which they have no tile, of a product of one row of tiles."""
        tiles = self.clusters(1, n, kind)[1] * self.cluster
        return 1 - tiles / (-(-tiles // sms) * sms)

    def cost(self, rows: int, n: int, k: int, kind: Kind, sms: int) -> float:
        """Clocks that the product takes by the model: the slowest of tensor cores, shared memory, cache and
        device memory."""
        down, across = self.clusters(rows, n, kind)
        slots = self.slots(sms)
        waves, rest = divmod(down * across, slots)
        steps = -(-k // _STEP)
        products = self.consumers * 4 * max(self.columns / 2, 32 if self.consumers > 1 else 64)
        shared = self.consumers * 4 * (2048 + self.columns * 32) + self.stage_bytes
        cached = self.rows * 128 / self.cluster_columns + self.columns * 128 / self.cluster_rows
        step = max(products, shared / _SHARED_RATE, cached / _CACHE_RATE) + _STEP_OVERHEAD
        # Tiles below each other read the same part of w from memory once.
        read = self.columns * self.cluster_columns * 128 / min(down, self.height(sms)) / (_MEMORY_RATE * sms)
        tile = _TILE_OVERHEAD * self.columns * self.consumers / 512
        busy = waves * (steps * max(step, slots * read) + tile)
        if rest:
            busy += steps * max(step, rest * read) + tile
        width = 2 * n if kind == "glu" else n
        moved = 2 * width * k + 2 * rows * k + (4 if kind == "float" else 2) * rows * n
        return max(busy, moved / (_MEMORY_RATE * sms)) + steps * 8


class HopperMatmul:
    """Products of `rows` rows on a device of compute capability 9.0. Methods only enqueue on the stream.

    x is [rows][k] and w [n][k], both half; n and k multiples of 8; addresses aligned to 16 bytes.
    """

    def __init__(self, device: Device) -> None:
        if device.capability[0] != 9:
            major, minor = device.capability
            raise EngineError(f"{device.name}: compute capability {major}.{minor}; these products need 9.0")
        self._device = device
        # The emulation runs a cluster as one block (hopper.cuh).
        self._joined = device.name == "emulation"
        self._functions: dict[tuple[Tiling, Kind], Function] = {}
        self._chosen: dict[tuple[Kind, int, int, int], Tiling] = {}
        self._maps: dict[tuple[int, int, int, int], TensorMap] = {}

    def plain(
        self,
        stream: Any,
        rows: int,
        x: int,
        w: int,
        y: int,
        n: int,
        k: int,
        half_out: bool,
        tiling: Tiling | None = None,
        exponent: int | None = None,
    ) -> None:
        """y[rows][n] = x w^T, half or float32.

        exponent, of half: times 2 ** exponent, and saturated; None: infinite where half cannot hold it.
        """
        self._run(stream, "half" if half_out else "float", rows, x, w, y, n, k, tiling, exponent)

    def glu(
        self,
        stream: Any,
        rows: int,
        x: int,
        gate_up: int,
        y: int,
        inner: int,
        k: int,
        tiling: Tiling | None = None,
    ) -> None:
        """y[rows][inner] = half(gelu_tanh(x gate^T) * (x up^T) / 64), saturated; gate_up is [2 * inner][k],
        gate rows first."""
        self._run(stream, "glu", rows, x, gate_up, y, inner, k, tiling)

    def biased(
        self,
        stream: Any,
        rows: int,
        x: int,
        w: int,
        bias: int,
        y: int,
        n: int,
        k: int,
        *,
        gelu: bool = False,
        exponent: int = 0,
        tiling: Tiling | None = None,
    ) -> None:
        """y[rows][n] = half((x w^T + bias) * 2 ** exponent), saturated, of a bias float32 [n] aligned to 8
        bytes; with `gelu` half(gelu_tanh(x w^T + bias) * 2 ** exponent)."""
        kind: Kind = "gelu" if gelu else "bias"
        self._run(stream, kind, rows, x, w, y, n, k, tiling, exponent, bias)

    def candidates(self, rows: int, n: int, k: int, kind: Kind) -> list[Tiling]:
        """Tilings worth measuring for a product, the one with the lowest modelled cost first."""
        sms = self._device.sms
        largest = 1 if self._joined else sms  # one block has not the shared memory of several
        if rows <= 64:
            low = [tiling for tiling in _low_tilings(kind) if tiling.cluster <= largest]
            return sorted(low, key=lambda t: (t.idle(n, kind, sms), t.cost(rows, n, k, kind, sms)))
        found = [tiling for tiling in _tilings(kind) if tiling.cluster <= largest]
        # Several blocks below each other are idle work where there is one row of tiles.
        useful = [t for t in found if t.cluster_rows == 1 or rows > t.rows * (t.cluster_rows - 1)]
        # Of equals the one that shares more, whose tiles come out of L2 less often.
        return sorted(useful, key=lambda t: (t.cost(rows, n, k, kind, sms), -t.columns, -t.cluster))

    def choose(self, rows: int, n: int, k: int, kind: Kind) -> Tiling:
        """The first candidate. All numbers of rows that need as many 64-row tiles get the same."""
        key = (kind, n, k, -(-rows // 64))
        if key not in self._chosen:
            self._chosen[key] = self.candidates(key[3] * 64, n, k, kind)[0]
        return self._chosen[key]

    def compile(self, tiling: Tiling, kind: Kind) -> None:
        """Compile what products of this kind in this tiling need, which a capture does not allow; it takes a
        second or two where it is not in the cache."""
        self._function(tiling, kind)

    def _run(
        self,
        stream: Any,
        kind: Kind,
        rows: int,
        x: int,
        w: int,
        y: int,
        n: int,
        k: int,
        tiling: Tiling | None,
        exponent: int | None = None,
        bias: int = 0,
    ) -> None:
        if rows < 1 or n < 8 or k < 8 or n % 8 or k % 8:
            raise EngineError(f"product of {rows} rows, n {n}, k {k}: n and k must be multiples of 8")
        tiling = tiling or self.choose(rows, n, k, kind)
        function = self._function(tiling, kind)
        x_map = self._map(x, rows, k, tiling.rows // tiling.cluster_columns)
        w_map = self._map(w, 2 * n if kind == "glu" else n, k, tiling.box(kind))
        down, across = tiling.clusters(rows, n, kind)
        sms = self._device.sms
        clusters = min(down * across, tiling.slots(sms))
        joined = tiling.cluster if self._joined else 1
        scale, limit = (1.0, np.inf) if exponent is None else (2.0**exponent, _LARGEST_HALF)
        sizes = (np.int32(rows), np.int32(n), np.int32(k), np.int32(tiling.height(sms)))
        function(
            stream,
            clusters * tiling.cluster // joined,
            tiling.threads * joined,
            (x_map, w_map, y, *sizes, np.float32(scale), np.float32(limit), bias),
            dynamic_shared=_ALIGNMENT + tiling.shared_bytes * joined,
        )

    def _function(self, tiling: Tiling, kind: Kind) -> Function:
        # The order of tiles is an argument, not a part of the kernel.
        key = (replace(tiling, group=0), kind)
        if key not in self._functions:
            shared = _ALIGNMENT + tiling.shared_bytes * (tiling.cluster if self._joined else 1)
            module = self._device.compile("hopper.cu", tiling.defines(kind))
            self._functions[key] = module.function("hopper_matmul", shared)
        return self._functions[key]

    def _map(self, address: int, rows: int, k: int, box: int) -> TensorMap:
        # Made with the true number of rows: the copy engine reads zeros beyond it.
        key = (address, rows, k, box)
        if key not in self._maps:
            if len(self._maps) >= _MAPS:
                self._maps.clear()
            self._maps[key] = self._device.tensor_map_2d(address, rows, k, 2 * k, box, _STEP)
        return self._maps[key]


def _low_tilings(kind: Kind) -> Iterable[Tiling]:
    """For one tile of 64 rows, where reading w is all that takes time: what counts is that no multiprocessor
    ever stops reading."""
    for columns in _WIDTHS:
        if columns <= 128 and not (kind == "glu" and columns % 16):
            yield Tiling(columns, consumers=1)
            yield Tiling(columns, consumers=1, cluster_columns=4)


def _tilings(kind: Kind) -> Iterable[Tiling]:
    for columns in _WIDTHS:
        if kind == "glu" and columns % 16:
            continue
        yield Tiling(columns)
        yield Tiling(columns, cluster_rows=2)
        if columns <= 176:
            yield Tiling(columns, cluster_columns=2)
        if columns <= 128:
            yield Tiling(columns, cluster_columns=4)
        if columns <= 192:
            yield Tiling(columns, consumers=3)
            yield Tiling(columns, consumers=3, cluster_rows=2)
