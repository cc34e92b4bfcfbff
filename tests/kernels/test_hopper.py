"""Products of many rows on Hopper: right at every shape, alike at every tiling."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.device_arrays import download, upload
from tests.emulation import EmulatedDevice
from tests.reference import gelu_tanh
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.hopper import HopperMatmul, Kind, Tiling
from wicore.errors import EngineError

BIG = Tiling(256)
"""The tile that the card is fastest at."""

SMALL = Tiling(32, consumers=1, stages=3)


class Product:
    """Operands on a device, and what numpy makes of them."""

    def __init__(self, device: Device, kind: Kind, rows: int, n: int, k: int, scale: float = 1.0) -> None:
        self.device, self.kind, self.rows, self.n, self.k = device, kind, rows, n, k
        self.stream = device.stream()
        rng = np.random.default_rng(rows * 7919 + n * 31 + k)
        self.x = rng.standard_normal((rows, k)).astype(np.float16)
        width = 2 * n if kind == "glu" else n
        self.w = (rng.standard_normal((width, k)) * scale / np.sqrt(k)).astype(np.float16)
        self.bias = rng.standard_normal(n).astype(np.float32)

    def upload(self, array: NDArray[Any]) -> int:
        return upload(self.device, array).address

    def output(self, rows: int) -> NDArray[Any]:
        """NaN, of y's type."""
        return np.full((rows, self.n), np.nan, np.float32 if self.kind == "float" else np.float16)

    def run(
        self,
        matmul: HopperMatmul,
        tiling: Tiling | None = None,
        rows: int | None = None,
        exponent: int | None = None,
    ) -> NDArray[Any]:
        """y of the first `rows` rows, all of it written over NaN."""
        rows = rows or self.rows
        x, w, y = self.upload(self.x[:rows]), self.upload(self.w), self.upload(self.output(rows))
        if self.kind == "glu":
            matmul.glu(self.stream, rows, x, w, y, self.n, self.k, tiling)
        elif self.kind in ("bias", "gelu"):
            gelu, shift = self.kind == "gelu", exponent or 0
            bias = self.upload(self.bias)
            sizes = self.n, self.k
            matmul.biased(self.stream, rows, x, w, bias, y, *sizes, gelu=gelu, exponent=shift, tiling=tiling)
        else:
            half = self.kind == "half"
            matmul.plain(self.stream, rows, x, w, y, self.n, self.k, half, tiling, exponent)
        return download(self.device, y, self.output(0).dtype, (rows, self.n))

    @property
    def expected(self) -> NDArray[np.float64]:
        y = self.x.astype(np.float64) @ self.w.astype(np.float64).T
        if self.kind == "glu":
            gate, up = y[:, : self.n], y[:, self.n :]
            return np.clip(gelu_tanh(gate) * up / 64, -65504, 65504)
        if self.kind == "bias":
            return y + self.bias
        return gelu_tanh(y + self.bias) if self.kind == "gelu" else y

    def check(self, y: NDArray[Any]) -> None:
        expected = self.expected[: len(y)]
        worst = np.abs(y - expected).max() / np.abs(expected).max()
        assert worst < (5e-6 if self.kind == "float" else 6e-4)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_tile_of_the_card_is_right(device: Device, kind: Kind) -> None:
    product = Product(device, kind, rows=130, n=264, k=200)
    product.check(product.run(HopperMatmul(device), BIG))


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [(1, 8, 8), (65, 40, 72), (64, 16, 64), (200, 24, 392), (129, 104, 136), (330, 72, 64)],
)
def test_any_shape_is_right(device: Device, kind: Kind, rows: int, n: int, k: int) -> None:
    product = Product(device, kind, rows, n, k)
    product.check(product.run(HopperMatmul(device), SMALL))


@pytest.mark.parametrize(
    ("kind", "tiling"),
    [
        ("float", Tiling(16, consumers=1, cluster_rows=2, stages=2)),
        ("glu", Tiling(32, consumers=1, cluster_rows=2, stages=2)),
        ("half", Tiling(88, consumers=1, cluster_rows=2, stages=3)),
        ("half", Tiling(48, consumers=1, cluster_columns=2, stages=4)),
        ("half", Tiling(32, consumers=1, cluster_rows=2, cluster_columns=2, stages=2)),
        ("glu", Tiling(16, consumers=1, cluster_columns=4, stages=2)),
        ("float", Tiling(48, consumers=2, cluster_rows=2, stages=3, stagger=2)),
        ("glu", Tiling(48, consumers=2, cluster_rows=2, stages=3, stagger=2)),
        ("gelu", Tiling(88, consumers=1, cluster_rows=2, stages=3)),
        ("bias", Tiling(48, consumers=2, cluster_columns=2, stages=4)),
    ],
    ids=str,
)
def test_blocks_that_share_tiles_are_right(device: Device, kind: Kind, tiling: Tiling) -> None:
    product = Product(device, kind, rows=300, n=104, k=200)
    product.check(product.run(HopperMatmul(device), tiling))


@pytest.mark.parametrize(
    ("kind", "tiling"),
    [("half", Tiling(168, stages=2)), ("float", Tiling(88, consumers=3, stages=2, stagger=1))],
    ids=str,
)
def test_widths_that_are_no_multiple_of_a_store_are_right(device: Device, kind: Kind, tiling: Tiling) -> None:
    product = Product(device, kind, rows=100, n=176, k=136)
    product.check(product.run(HopperMatmul(device), tiling))


@pytest.mark.parametrize("group", [1, 2, 3, 100])
def test_every_order_of_tiles_makes_each_tile_once(device: Device, group: int) -> None:
    product = Product(device, "float", rows=64 * 7, n=8 * 5, k=8)
    product.check(product.run(HopperMatmul(device), Tiling(8, consumers=1, stages=2, group=group)))


@pytest.mark.parametrize("kind", ["float", "glu"])
def test_a_rows_result_depends_on_nothing_but_the_row(device: Device, kind: Kind) -> None:
    matmul = HopperMatmul(device)
    product = Product(device, kind, rows=130, n=72, k=328)
    tilings = [SMALL, Tiling(64), Tiling(32, consumers=1, cluster_rows=2, stages=2)]
    results = [product.run(matmul, tiling, rows) for tiling in tilings for rows in (1, 66, 130)]
    for result in results:
        np.testing.assert_array_equal(result, results[2][: len(result)])


def test_a_gated_value_too_large_for_half_is_saturated_and_nan_is_kept(device: Device) -> None:
    product = Product(device, "glu", rows=64, n=16, k=64, scale=8000)
    product.x[5, 0] = np.nan
    y = product.run(HopperMatmul(device), SMALL)
    assert np.isnan(y[5]).all()
    rest = np.delete(np.arange(64), 5)
    assert (np.abs(y[rest].astype(np.float64)) == 65504).any()
    np.testing.assert_allclose(y[rest], product.expected[rest], rtol=1e-3, atol=1e-2)


def test_a_scaled_sum_too_large_for_half_is_saturated_and_nan_is_kept(device: Device) -> None:
    product = Product(device, "half", rows=64, n=16, k=64)
    product.w = np.full_like(product.w, 30000)
    product.x[5, 0] = np.nan
    plain, scaled = (product.run(HopperMatmul(device), SMALL, exponent=exponent) for exponent in (None, -6))
    rest = np.delete(np.arange(64), 5)
    assert np.isinf(plain[rest]).any()
    assert np.isnan(scaled[5]).all()
    expected = np.clip(product.expected[rest] / 64, -65504, 65504)
    assert (np.abs(expected) < 65504).any()
    np.testing.assert_allclose(scaled[rest], expected, rtol=1e-3)


@pytest.mark.parametrize(("n", "k"), [(12, 64), (64, 12), (0, 64), (64, 0)])
def test_sizes_that_the_copy_engine_cannot_take_are_refused(emulated: EmulatedDevice, n: int, k: int) -> None:
    with pytest.raises(EngineError, match="multiples of 8"):
        HopperMatmul(emulated).plain(emulated.stream(), 64, 0, 0, 0, n, k, half_out=True)


def test_another_card_is_refused() -> None:
    with pytest.raises(EngineError, match=r"8\.9"):
        HopperMatmul(EmulatedDevice(capability=(8, 9)))


SHAPES: list[tuple[Kind, int, int]] = [
    ("half", 8192, 5376),
    ("float", 5376, 4096),
    ("glu", 21504, 5376),
    ("float", 5376, 21504),
]


@pytest.mark.parametrize("kind_n_k", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [65, 128, 512, 1024, 8192, 16384])
def test_candidates_fit_the_card_and_come_by_their_cost(rows: int, kind_n_k: tuple[Kind, int, int]) -> None:
    kind, n, k = kind_n_k
    device = EmulatedDevice(sms=132)
    device.name = "a card"
    matmul = HopperMatmul(device)
    found = matmul.candidates(rows, n, k, kind)
    assert len(found) > 20
    for tiling in found:
        assert tiling.ring >= 3
        assert 1024 + tiling.shared_bytes <= 227 << 10
        assert tiling.columns % tiling.box(kind) == 0
        assert tiling.box(kind) % 8 == 0
        assert tiling.box(kind) >= 16
    costs = [tiling.cost(rows, n, k, kind, 132) for tiling in found]
    assert all(a <= b for a, b in pairwise(costs))
    assert matmul.choose(rows, n, k, kind) == matmul.choose(-(-rows // 64) * 64, n, k, kind)


@pytest.mark.parametrize("kind_n_k", SHAPES, ids=str)
def test_for_one_row_of_tiles_the_candidates_that_keep_most_of_the_card_busy_come_first(
    kind_n_k: tuple[Kind, int, int],
) -> None:
    kind, n, k = kind_n_k
    device = EmulatedDevice(sms=132)
    device.name = "a card"
    found = HopperMatmul(device).candidates(64, n, k, kind)
    assert {tiling.rows for tiling in found} == {64}
    idle = [tiling.idle(n, kind, 132) for tiling in found]
    assert idle == sorted(idle)
    assert idle[0] < 0.16


def test_after_preparation_a_product_can_be_captured(device: Device) -> None:
    matmul = HopperMatmul(device)
    product = Product(device, "float", rows=70, n=40, k=64)
    x, w, y = (product.upload(array) for array in (product.x, product.w, product.output(70)))
    matmul.compile(matmul.choose(70, 40, 64, "float"), "float")
    graph = device.capture(
        product.stream, lambda: matmul.plain(product.stream, 70, x, w, y, 40, 64, half_out=False)
    )
    graph.launch(product.stream)
    product.check(download(device, y, np.float32, (70, 40)))
