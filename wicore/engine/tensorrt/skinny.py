"""Products of few rows (decode steps) and a weight matrix: bound by reading the matrix once.

The kernel is kernels/skinny.cu. Its settings change the speed alone: a row's result has the same bits for
any setting, any number of rows and any neighbours, because the order of its sum depends on the matrix's shape
and the card only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from wicore.engine.tensorrt.device import Device, Function
from wicore.errors import EngineError

MAX_ROWS = 64
"""Rows of one launch; more are done 64 at a time, reading the matrix again for each."""

BUCKETS = (8, 16, 32, 64)
"""Rows that a compiled kernel makes room for; a setting is chosen for each."""

_LINE = 64
"""Values of a row of the matrix that are read together: 128 bytes."""

_SHARED_A_BLOCK = {(8, 0): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
"""KiB of shared memory that a block may have, by compute capability; 99 otherwise."""

_HALF_OF_SHARED = 113 << 10
"""Two blocks of this much shared memory fit on a multiprocessor of capability 9.0. Blocks of the next kernel
that fit beside those of this one read their first weights while this one ends."""

_REGISTERS = 65536
"""Of a multiprocessor."""


@dataclass(frozen=True)
class Product:
    """y [rows][n] = x [rows][k] times the transpose of w [n][k].

    gated: w is [2 n][k], gate rows before up rows, and y = half(gelu_tanh(gate) * up / 64), saturated.
    half_out: y is half, not float32; always so with `gated`.
    """

    n: int
    k: int
    gated: bool = False
    half_out: bool = False

    def __post_init__(self) -> None:
        if self.n <= 0 or self.k <= 0 or self.n % 8 or self.k % 8:
            raise EngineError(f"matrix {self.n} x {self.k}: sizes must be positive multiples of 8")

    @property
    def matrix_bytes(self) -> int:
        return self.n * self.k * (4 if self.gated else 2)


@dataclass(frozen=True)
class Setting:
    """How a block goes about a product; the macros of skinny.cu have the same names.

    mt, wm: the block's tile has 16 * mt * wm rows of the matrix, by wm times as many warps.
    lines: 128-byte lines of each part of k in a stage.
    stages: of the ring.
    ahead: stages asked into L2 beyond the ring while the kernel before still runs.
    cluster: the parts of k are the blocks of a cluster.
    blocks: how many must fit on a multiprocessor by their registers.
    fetch: bytes of a row that L2 fetches at once, 128 or 256.
    persistent: at most this many blocks, each of which does several tiles; 0: a block a tile.
    """

    mt: int
    wm: int
    lines: int = 1
    stages: int = 4
    ahead: int = 0
    cluster: bool = False
    blocks: int = 2
    fetch: int = 256
    persistent: int = 0

    @property
    def tile(self) -> int:
        return 16 * self.mt * self.wm


def bucket(rows: int) -> int:
    """The least of BUCKETS that holds `rows` rows."""
    return next(size for size in BUCKETS if rows <= size)


def parts(product: Product, sms: int) -> int:
    """Into how many interleaved parts k is split. This and nothing else decides the order of a sum.

    A tall matrix has rows enough for every multiprocessor's warps; a low one makes up for them by parts of k.
    """
    return 1 if _height(product) >= 128 * sms else 4


class SkinnyMatmul:
    """Enqueues products of few rows. Addresses must be multiples of 16.

    chains: into how many sums a part of k is split, 1 or 2; it decides the order of all sums.
    """

    def __init__(self, device: Device, chains: int = 1) -> None:
        self._device, self._chains = device, chains
        kib = _SHARED_A_BLOCK.get(device.capability, 99)
        self._most_shared = kib << 10
        self._functions: dict[tuple[Product, Setting, int], _Launch] = {}

    def plain(
        self, stream: Any, rows: int, x: int, w: int, y: int, n: int, k: int, half_out: bool = False
    ) -> None:
        """y [rows][n], half or float32, = x half [rows][k] times w half [n][k] transposed."""
        self.run(stream, rows, x, w, y, Product(n, k, half_out=half_out))

    def glu(self, stream: Any, rows: int, x: int, gate_up: int, y: int, inner: int, k: int) -> None:
        """y half [rows][inner] = gelu_tanh(gate) * up / 64, saturated; gate_up half [2 * inner][k]."""
        self.run(stream, rows, x, gate_up, y, Product(inner, k, gated=True, half_out=True))

    def run(
        self,
        stream: Any,
        rows: int,
        x: int,
        w: int,
        y: int,
        product: Product,
        setting: Setting | None = None,
        dependent: bool = True,
    ) -> None:
        """Either of the two, with a given setting where there is one."""
        if rows < 1:
            raise EngineError(f"product of {rows} rows: expected at least 1")
        size = 2 if product.half_out or product.gated else 4
        for start in range(0, rows, MAX_ROWS):
            count = min(rows - start, MAX_ROWS)
            launch = self._prepared(count, product, setting)
            launch.function(
                stream,
                launch.grid,
                launch.threads,
                (
                    x + start * product.k * 2,
                    w,
                    y + start * product.n * size,
                    np.int32(count),
                    np.int32(product.n),
                    np.int32(product.k),
                ),
                launch.shared,
                dependent,
            )

    def prepare(self, rows: int, product: Product, setting: Setting | None = None) -> None:
        """Compile what `run` of this needs, which a capture does not allow."""
        for count in {min(rows, MAX_ROWS), rows % MAX_ROWS or MAX_ROWS}:
            self._prepared(count, product, setting)

    def setting(self, rows: int, product: Product) -> Setting:
        """The one by rule."""
        return next(iter(self._by_rule(rows, product)))

    def candidates(self, rows: int, product: Product) -> list[Setting]:
        """Settings worth measuring, the one by rule first; all give the same bits."""
        found: dict[Setting, None] = {}
        ruled = list(self._by_rule(rows, product))
        for setting in ruled:
            found[setting] = None
        for setting in ruled[:2]:
            for changed in (
                replace(setting, ahead=0),
                replace(setting, fetch=128),
                replace(setting, blocks=2 if setting.blocks == 1 else 1),
            ):
                found[changed] = None
        return list(found)

    def _by_rule(self, rows: int, product: Product) -> Iterator[Setting]:
        """Settings that the card can run, best first by reckoning."""
        if parts(product, self._device.sms) == 1:
            yield from self._tall(rows, product)
        else:
            yield from self._low(rows, product)

    def _tall(self, rows: int, product: Product) -> Iterator[Setting]:
        """Few persistent blocks with large tiles, so that few read x from L2."""
        sms = self._device.sms
        for mt in (3, 2, 4, 1):
            tiles = -(-_height(product) // (64 * mt))
            setting = Setting(mt, 4, persistent=_even(tiles, sms))
            yield from self._fitted(rows, product, setting)
            if mt == 3:
                tiles = -(-_height(product) // (32 * mt))
                halved = replace(setting, wm=2, lines=2, persistent=_even(tiles, 2 * sms))
                yield from self._fitted(rows, product, halved)

    def _low(self, rows: int, product: Product) -> Iterator[Setting]:
        """A block a tile, as many as multiprocessors where that can be, so that all end together."""
        needed = -(-_height(product) // 16)
        best = next((mt for mt in (1, 2, 3, 4) if -(-needed // mt) <= self._device.sms), 4)
        order = sorted((1, 2, 3, 4), key=lambda mt: (abs(mt - best), -mt))
        plain = [Setting(mt, 1) for mt in order]
        # A block of a cluster has four times the rows, which is a quarter of the reads of x.
        has_clusters = self._device.capability[0] == 9
        clustered = [Setting(mt, 4, cluster=True) for mt in order] if has_clusters else []
        first, second = (clustered, plain) if rows > 8 else (plain, clustered)
        for setting in (*first[:1], *second[:1], *first[1:], *second[1:]):
            yield from self._fitted(rows, product, setting)

    def _fitted(self, rows: int, product: Product, setting: Setting) -> Iterator[Setting]:
        """The setting with as many stages as fit into half of a multiprocessor's shared memory, into all of
        it, and into what a block may have."""
        threads = self._threads(product, setting)
        beside = min(4, -(-self._blocks(product, setting) // self._device.sms))
        # By what the compiler needs: the sums, and 64 more.
        registers = 4 * setting.mt * (bucket(rows) // 8) + 64
        blocks = max(1, min(_REGISTERS // (threads * registers), 2 * beside))
        most = self._most_shared // self._joined(product, setting)
        sizes = [most // beside, most]
        if blocks > beside:
            sizes.insert(0, min(_HALF_OF_SHARED, most) // beside)
        seen: set[int] = set()
        for size in sizes:
            for stages in (8, 6, 5, 4, 3, 2):
                fit = replace(setting, stages=stages, blocks=blocks, ahead=4)
                if self._shared_bytes(rows, product, fit) <= size:
                    if stages not in seen:
                        yield fit
                    seen.add(stages)
                    break

    def _threads(self, product: Product, setting: Setting) -> int:
        own = 1 if setting.cluster else parts(product, self._device.sms)
        return 32 * self._chains * setting.wm * own

    def _blocks(self, product: Product, setting: Setting) -> int:
        tiles = -(-_height(product) // setting.tile)
        if setting.persistent:
            return min(tiles, setting.persistent)
        return tiles * (parts(product, self._device.sms) if setting.cluster else 1)

    def _joined(self, product: Product, setting: Setting) -> int:
        """Blocks that are launched as one: the emulation runs a cluster as a single block (cluster.cuh)."""
        together = setting.cluster and self._device.name == "emulation"
        return parts(product, self._device.sms) if together else 1

    def _shared_bytes(self, rows: int, product: Product, setting: Setting) -> int:
        """Dynamic shared memory of a block."""
        split = parts(product, self._device.sms)
        own = 1 if setting.cluster else split
        tokens = bucket(rows)
        ring = setting.stages * setting.lines * own * (setting.tile + tokens) * _LINE * 2
        pitch = (setting.tile + 4) * 4
        at_once = tokens if setting.cluster else min(tokens, 8 if setting.persistent else 16)
        sums = self._chains * own * at_once * pitch
        return ring + sums if setting.persistent else max(ring, sums)

    def _prepared(self, rows: int, product: Product, setting: Setting | None) -> _Launch:
        setting = setting or self.setting(rows, product)
        key = (product, setting, bucket(rows))
        launch = self._functions.get(key)
        if launch is None:
            launch = self._functions[key] = self._make(rows, product, setting)
        return launch

    def _make(self, rows: int, product: Product, setting: Setting) -> _Launch:
        shared = self._shared_bytes(rows, product, setting)
        if shared > self._most_shared:
            raise EngineError(
                f"{setting} needs {shared} bytes of shared memory a block, the card has {self._most_shared}"
            )
        module = self._device.compile("skinny.cu", self.defines(rows, product, setting))
        joined = self._joined(product, setting)
        return _Launch(
            module.function("skinny", shared * joined),
            self._blocks(product, setting) // joined,
            self._threads(product, setting) * joined,
            shared * joined,
        )

    def defines(self, rows: int, product: Product, setting: Setting) -> dict[str, int]:
        """The macros of skinny.cu."""
        split = parts(product, self._device.sms)
        columns = setting.tile // 2 if product.gated else setting.tile
        exact = product.n % columns == 0 and product.k % (_LINE * setting.lines * split) == 0
        return {
            "NT": bucket(rows) // 8,
            "MT": setting.mt,
            "WM": setting.wm,
            "PARTS": split,
            "CHAINS": self._chains,
            "LINES": setting.lines,
            "STAGES": setting.stages,
            "AHEAD": setting.ahead,
            "EXACT": int(exact),
            "SINGLE": int(not setting.persistent),
            "CLUSTER": int(setting.cluster),
            "GLU": int(product.gated),
            "HALF_OUT": int(product.half_out or product.gated),
            "BLOCKS": setting.blocks,
            "FETCH": setting.fetch,
            "SHARED": self._shared_bytes(rows, product, setting),
        }


@dataclass(frozen=True)
class _Launch:
    function: Function
    grid: int
    threads: int
    shared: int


def _height(product: Product) -> int:
    """Rows of the matrix."""
    return product.n * (2 if product.gated else 1)


def _even(tiles: int, most: int) -> int:
    """As many blocks, at most `most`, as share `tiles` with the fewest turns and the least idling."""
    turns = -(-tiles // most)
    return -(-tiles // turns)
