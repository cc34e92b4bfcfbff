"""Products of few rows are numpy's, and a row's bits depend on nothing but the row and the matrix."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.kernels.memory import Memory
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.skinny import (
    Product,
    Setting,
    SkinnyMatmul,
    bucket,
    parts,
)
from wicore.errors import EngineError

EXAMPLES = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""Few: each new form is compiled first."""

PLAIN = Setting(mt=1, wm=1, stages=3)
CLUSTER = Setting(mt=1, wm=4, stages=2, cluster=True)
TALL = Setting(mt=1, wm=4, stages=3, ahead=2, persistent=3)
TALL_LONG = Setting(mt=1, wm=2, lines=2, stages=2, persistent=2)

EIGHTS = st.integers(1, 12).map(lambda n: 8 * n)

MODEL_27B = [
    Product(8192, 5376, half_out=True),
    Product(5376, 4096),
    Product(21504, 5376, gated=True, half_out=True),
    Product(5376, 21504),
    Product(262208, 5376),
]


@pytest.fixture
def memory(device: Device) -> Iterator[Memory]:
    memory = Memory(device)
    yield memory
    memory.free()


def tall_rows(device: Device) -> int:
    """The fewest rows of a matrix that is not split along k."""
    return 128 * device.sms


def numbers(seed: int, *shape: int, scale: float = 1.0) -> NDArray[np.float16]:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float16)


def reference(x: NDArray[Any], w: NDArray[Any], gated: bool = False) -> NDArray[np.float64]:
    y = x.astype(np.float64) @ w.astype(np.float64).T
    if not gated:
        return y
    gate, up = np.split(y, 2, axis=1)
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return np.clip(gelu * up / 64, -65504, 65504)


def product_of(
    memory: Memory,
    x: NDArray[Any],
    w: NDArray[Any],
    setting: Setting | None = None,
    chains: int = 1,
    **form: bool,
) -> NDArray[Any]:
    """x times w transposed, as the kernel does it; fails where it writes beside the result."""
    product = Product(len(w) // (2 if form.get("gated") else 1), w.shape[1], **form)
    half = product.half_out or product.gated
    y = memory.room((len(x), product.n), np.float16 if half else np.float32)
    matmul = SkinnyMatmul(memory.device, chains=chains)
    matmul.run(memory.stream, len(x), memory.put(x), memory.put(w), y.address, product, setting)
    return y.read()


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    "setting", [PLAIN, pytest.param(CLUSTER, marks=pytest.mark.thorough)], ids=["plain", "cluster"]
)
@given(rows=st.integers(1, 70), n=EIGHTS, k=EIGHTS, seed=st.integers(0, 99))
@EXAMPLES
def test_a_low_matrix_multiplies_as_numpy_does(
    memory: Memory, setting: Setting, rows: int, n: int, k: int, seed: int
) -> None:
    x, w = numbers(seed, rows, k), numbers(seed + 1, n, k)
    np.testing.assert_allclose(product_of(memory, x, w, setting), reference(x, w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", [TALL, TALL_LONG], ids=["short", "long"])
@given(
    rows=st.integers(1, 8) | st.integers(33, 70),
    more=EIGHTS,
    k=EIGHTS,
    gated=st.booleans(),
    seed=st.integers(0, 99),
)
@EXAMPLES
def test_a_tall_matrix_multiplies_as_numpy_does(
    memory: Memory, setting: Setting, rows: int, more: int, k: int, gated: bool, seed: int
) -> None:
    n = tall_rows(memory.device) // (2 if gated else 1) + more
    x, w = numbers(seed, rows, k), numbers(seed + 1, n * (2 if gated else 1), k)
    found = product_of(memory, x, w, setting, gated=gated)
    tolerance = 2e-3 if gated else 1e-4
    np.testing.assert_allclose(found, reference(x, w, gated), rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("form", [{}, {"half_out": True}, {"gated": True}], ids=["float", "half", "gated"])
def test_sizes_that_fill_every_stage_and_tile_multiply_as_numpy_does(
    memory: Memory, rows: int, form: dict[str, bool]
) -> None:
    x, w = numbers(1, rows, 1024), numbers(2, 128, 1024)
    found = product_of(memory, x, w, **form)
    tolerance = 2e-3 if form else 1e-4
    expected = reference(x, w, form.get("gated", False))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=2e-3)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tall", [False, True], ids=["low", "tall"])
def test_a_rows_bits_are_the_same_alone_and_among_others(memory: Memory, gated: bool, tall: bool) -> None:
    n, setting = (tall_rows(memory.device), TALL) if tall else (80, PLAIN)
    x, w = numbers(3, 64, 328), numbers(4, n, 328)
    every = product_of(memory, x, w, setting, gated=gated)
    for rows in ([0], [63], [5, 4], [*range(10, 19)], [*range(40)]):
        assert same_bits(product_of(memory, x[rows], w, setting, gated=gated), every[rows]), f"rows {rows}"


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("tall", [False, True], ids=["low", "tall"])
@pytest.mark.parametrize("chains", [1, 2])
def test_every_setting_gives_the_same_bits(memory: Memory, rows: int, tall: bool, chains: int) -> None:
    n = tall_rows(memory.device) + 8 if tall else 72
    choices = (TALL, TALL_LONG) if tall else (PLAIN, CLUSTER, Setting(2, 1, stages=2))
    x, w = numbers(5, rows, 520), numbers(6, n, 520)
    first, *others = (product_of(memory, x, w, setting, chains) for setting in choices)
    np.testing.assert_allclose(first, reference(x, w), rtol=1e-4, atol=1e-4)
    for other in others:
        assert same_bits(first, other)


def test_a_gate_saturates_at_the_range_of_half_and_keeps_nan(memory: Memory) -> None:
    x = np.full((3, 16), 200, np.float16)
    x[1] *= -1
    x[2, 3] = np.nan
    w = np.full((48, 16), 100, np.float16)
    w[24:32] *= -1
    found = product_of(memory, x, w, PLAIN, gated=True)
    assert (found[0, :8] == -65504).all()
    assert (found[0, 8:] == 65504).all()
    assert (found[1] == 0).all(), "a large negative gate shuts"
    assert np.isnan(found[2]).all()


def test_nan_and_infinity_reach_the_result_and_no_other_row(memory: Memory) -> None:
    x, w = numbers(7, 12, 96), numbers(8, 40, 96)
    clean = product_of(memory, x, w, PLAIN)
    x[3, 50], x[9, 0] = np.nan, np.inf
    found = product_of(memory, x, w, PLAIN)
    assert np.isnan(found[3]).all()
    assert not np.isfinite(found[9]).any()
    rest = [i for i in range(12) if i not in (3, 9)]
    assert same_bits(found[rest], clean[rest])


def test_more_rows_than_a_launch_takes_are_done_in_turns(memory: Memory) -> None:
    x, w = numbers(9, 131, 64), numbers(10, 24, 64)
    found = product_of(memory, x, w, PLAIN)
    np.testing.assert_allclose(found, reference(x, w), rtol=1e-4, atol=1e-4)
    assert same_bits(product_of(memory, x[128:], w, PLAIN), found[128:])


def test_a_prepared_product_can_be_captured(memory: Memory) -> None:
    x, w = numbers(11, 65, 72), numbers(12, 16, 72)
    y = memory.room((65, 16), np.float32)
    matmul, product = SkinnyMatmul(memory.device), Product(16, 72)
    matmul.prepare(65, product)
    a, b = memory.put(x), memory.put(w)
    graph = memory.device.capture(
        memory.stream, lambda: matmul.plain(memory.stream, 65, a, b, y.address, 16, 72)
    )
    graph.launch(memory.stream)
    np.testing.assert_allclose(y.read(), reference(x, w), rtol=1e-4, atol=1e-4)
    graph.close()


def card(sms: int, capability: tuple[int, int]) -> Any:
    return SimpleNamespace(name="card", sms=sms, capability=capability)


@pytest.mark.parametrize(
    ("device", "shared"),
    [(card(132, (9, 0)), 227), (card(108, (8, 0)), 163), (card(128, (8, 9)), 99), (card(170, (12, 0)), 99)],
    ids=["9.0", "8.0", "8.9", "12.0"],
)
@pytest.mark.parametrize("rows", [1, 16, 32, 64])
def test_every_card_has_settings_that_fit_it(device: Any, shared: int, rows: int) -> None:
    matmul = SkinnyMatmul(device)
    for product in [*MODEL_27B, Product(1024, 640), Product(640, 2048), Product(8, 8)]:
        found = matmul.candidates(rows, product)
        assert found[0] == matmul.setting(rows, product)
        for setting in found:
            assert matmul._shared_bytes(rows, product, setting) <= shared << 10
            assert not setting.cluster or device.capability == (9, 0)


def test_the_large_models_matrices_are_spread_evenly_over_a_hopper() -> None:
    device = card(132, (9, 0))
    matmul = SkinnyMatmul(device)
    for product in MODEL_27B:
        setting = matmul.setting(1, product)
        tiles = -(-product.n * (2 if product.gated else 1) // setting.tile)
        blocks = min(tiles, setting.persistent) if setting.persistent else tiles
        assert 108 <= blocks <= 132
        assert tiles / (blocks * -(-tiles // blocks)) > 0.99


def test_sizes_that_no_kernel_takes_are_refused(device: Device) -> None:
    with pytest.raises(EngineError, match="multiples of 8"):
        Product(12, 8)
    with pytest.raises(EngineError, match="0 rows"):
        SkinnyMatmul(device).plain(device.stream(), 0, 0, 0, 0, 8, 8)


def test_buckets_hold_their_rows() -> None:
    assert [bucket(rows) for rows in (1, 8, 9, 16, 17, 33, 64)] == [8, 8, 16, 16, 32, 64, 64]


def test_only_the_shape_and_the_card_decide_how_k_is_split() -> None:
    assert [parts(product, 132) for product in MODEL_27B] == [4, 4, 1, 4, 1]
