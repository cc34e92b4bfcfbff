"""Norms of the residual stream are numpy's, in any company, and no bad value is hidden."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.emulation import EmulatedDevice
from tests.kernels.memory import Memory
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.norms import Norms
from wicore.errors import EngineError

EXAMPLES = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
EPS = 1e-6

WIDTHS = [8, 72, 640, 2560]


@pytest.fixture
def memory(device: Device) -> Iterator[Memory]:
    memory = Memory(device)
    yield memory
    memory.free()


def norms(device: Device, hidden: int) -> Norms:
    config: Any = SimpleNamespace(hidden_size=hidden, rms_norm_eps=EPS)
    return Norms(device, config)


def random(seed: int, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def factors(seed: int, hidden: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(0.25, 4, hidden).astype(np.float32)


def rms(x: NDArray[Any], weight: NDArray[Any], eps: float = EPS) -> NDArray[np.float64]:
    x = x.astype(np.float64)
    scaled: NDArray[np.float64] = (
        x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight.astype(np.float64)
    )
    return scaled


def added(
    memory: Memory, delta: NDArray[Any], residual: NDArray[np.float32], exponent: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """The new residual and normed rows, by the kernel, with the factors of seeds 1 and 2."""
    rows, hidden = delta.shape
    new, normed = memory.room((rows, hidden), np.float32), memory.room((rows, hidden), np.float16)
    memory.device.copy(new.address, residual.ctypes.data, residual.nbytes, memory.stream)
    norms(memory.device, hidden).add(
        memory.stream,
        rows,
        memory.put(delta),
        memory.put(factors(1, hidden)),
        new.address,
        memory.put(factors(2, hidden)),
        normed.address,
        exponent,
        half_delta=delta.dtype == np.float16,
    )
    return new.read(), normed.read()


def check_added(
    found: tuple[NDArray[Any], NDArray[Any]], delta: NDArray[Any], residual: NDArray[Any]
) -> None:
    hidden = delta.shape[1]
    expected = residual + rms(delta, factors(1, hidden))
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], rms(expected, factors(2, hidden)), rtol=1e-3, atol=1e-4)


@given(
    rows=st.integers(1, 5),
    hidden=st.sampled_from(WIDTHS),
    scale=st.sampled_from([1e-4, 1.0, 300.0]),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
@EXAMPLES
def test_a_delta_is_normed_added_and_the_sum_normed(
    memory: Memory, rows: int, hidden: int, scale: float, half: bool, seed: int
) -> None:
    delta: NDArray[Any] = random(seed, rows, hidden, scale=scale)
    if half:
        delta = delta.astype(np.float16)
    residual = random(seed + 1, rows, hidden, scale=5)
    check_added(added(memory, delta, residual), delta, residual)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_a_delta_scaled_by_a_power_of_two_gives_the_same_bits(memory: Memory, scale: float) -> None:
    delta, residual = random(3, 2, 640, scale=scale), random(4, 2, 640)
    plain = added(memory, delta, residual)
    scaled = added(memory, delta * np.float32(2**-6), residual, exponent=-6)
    assert [a.tobytes() for a in plain] == [a.tobytes() for a in scaled]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_rows_bits_are_the_same_alone_and_among_others(memory: Memory, dtype: type) -> None:
    delta, residual = random(5, 7, 640).astype(dtype), random(6, 7, 640)
    new, normed = added(memory, delta, residual)
    for row in range(7):
        alone = added(memory, delta[row : row + 1], residual[row : row + 1])
        assert alone[0].tobytes() == new[row].tobytes()
        assert alone[1].tobytes() == normed[row].tobytes()


@pytest.mark.parametrize("rows", [4, 5, 11])
def test_blocks_that_go_through_several_rows_norm_each_once(rows: int) -> None:
    memory = Memory(EmulatedDevice(sms=1))  # four blocks of this width
    delta, residual = random(12, rows, 2560).astype(np.float16), random(13, rows, 2560)
    check_added(added(memory, delta, residual), delta, residual)
    memory.free()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["delta", "residual"])
def test_a_bad_value_makes_its_row_bad_and_no_other(memory: Memory, bad: float, where: str) -> None:
    delta, residual = random(7, 3, 72), random(8, 3, 72)
    clean = added(memory, delta, residual)
    (delta if where == "delta" else residual)[1, 30] = bad
    new, normed = added(memory, delta, residual)
    assert not np.isfinite(new[1, 30])
    assert np.isnan(normed[1]).any()
    for row in (0, 2):
        assert new[row].tobytes() == clean[0][row].tobytes()
        assert normed[row].tobytes() == clean[1][row].tobytes()


def test_zeros_stay_zeros(memory: Memory) -> None:
    new, normed = added(memory, np.zeros((1, 72), np.float32), np.zeros((1, 72), np.float32))
    assert not new.any()
    assert not normed.any()


@pytest.mark.parametrize("hidden", WIDTHS)
def test_embeddings_are_scaled_and_normed(memory: Memory, hidden: int) -> None:
    table = random(9, 11, hidden, scale=0.05).astype(np.float16)
    ids = np.array([10, 0, 3, 3, -1], np.int32)
    residual, normed = memory.room((5, hidden), np.float32), memory.room((5, hidden), np.float16)
    addresses = [memory.put(ids), memory.put(table), memory.put(factors(10, hidden))]
    norms(memory.device, hidden).embed(memory.stream, 5, *addresses, residual.address, normed.address)
    expected = table[[10, 0, 3, 3, 0]].astype(np.float32) * np.float32(hidden**0.5)
    assert residual.read().tobytes() == expected.tobytes()
    np.testing.assert_allclose(normed.read(), rms(expected, factors(10, hidden)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("hidden", WIDTHS)
def test_rows_that_lie_in_the_residual_stream_are_normed_and_stay(memory: Memory, hidden: int) -> None:
    residual, room = random(14, 3, hidden, scale=20), memory.room((3, hidden), np.float32)
    normed = memory.room((3, hidden), np.float16)
    memory.device.copy(room.address, residual.ctypes.data, residual.nbytes, memory.stream)
    weight = memory.put(factors(15, hidden))
    norms(memory.device, hidden).norm(memory.stream, 3, room.address, weight, normed.address)
    assert room.read().tobytes() == residual.tobytes()
    np.testing.assert_allclose(normed.read(), rms(residual, factors(15, hidden)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("hidden", WIDTHS)
def test_rows_are_gathered_and_absent_ones_are_zero(memory: Memory, hidden: int) -> None:
    source, rows = random(11, 6, hidden).astype(np.float16), np.array([5, -1, 0, 5], np.int32)
    target = memory.room((4, hidden), np.float16)
    norms(memory.device, hidden).gather(
        memory.stream, 4, memory.put(rows), memory.put(source), target.address, 2 * hidden
    )
    expected = source[rows]
    expected[1] = 0
    assert target.read().tobytes() == expected.tobytes()


def test_a_width_that_no_kernel_takes_is_refused(device: Device) -> None:
    with pytest.raises(EngineError, match="hidden size 12"):
        norms(device, 12)
