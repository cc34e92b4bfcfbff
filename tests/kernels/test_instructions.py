"""What kernels are made of does the same on the card and in the emulation: what numpy does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.device_arrays import download, upload
from tests.emulation import EmulatedDevice, EmulationError
from wicore.engine.tensorrt.device import Device

PROBES = Path(__file__).parent.parent / "emulation" / "sources" / "probes.cu"
HOPPER_PROBES = PROBES.with_name("hopper_probes.cu")
HOPPER_SHARED = 1024 + 1024 + 2 * 16 * 128
RNG = np.random.default_rng(5)

Run = Callable[..., None]


@pytest.fixture
def run(device: Device) -> Run:
    module, stream = device.compile(str(PROBES), {}), device.stream()

    def launch(kernel: str, grid: Any, block: Any, *args: Any, shared: int = 0) -> None:
        module.function(kernel)(stream, grid, block, args, dynamic_shared=shared, dependent=False)

    return launch


@pytest.mark.parametrize("kernel", ["multiply", "multiply_from_shared"])
def test_mma_multiplies_as_numpy_does(device: Device, run: Run, kernel: str) -> None:
    a, b = RNG.standard_normal((16, 16)).astype(np.float16), RNG.standard_normal((16, 8)).astype(np.float16)
    x, w, y = upload(device, a), upload(device, b), device.allocate(16 * 8 * 4, "y")
    run(kernel, 1, 32, x.address, w.address, y.address, shared=2048)
    expected = 1 + a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(
        download(device, y.address, np.float32, (16, 8)), expected, rtol=1e-5, atol=1e-5
    )


def multiply_registers(device: Device, *, hasty: bool) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """What comes out, and what must."""
    a, b = (RNG.standard_normal(shape).astype(np.float16) for shape in ((64, 16), (16, 128)))
    x, w, y = upload(device, a), upload(device, b), device.allocate(64 * 128 * 4, "y")
    function = device.compile(str(HOPPER_PROBES), {}).function("multiply_registers")
    w_map = device.tensor_map_2d(w.address, 16, 128, 256, 16, 64)
    args = (x.address, w_map, y.address, np.int32(hasty))
    function(device.stream(), 1, 128, args, dynamic_shared=HOPPER_SHARED, dependent=False)
    return download(device, y.address, np.float32, (64, 128)), 1 + a.astype(np.float64) @ b.astype(np.float64)


def test_a_warpgroup_multiplies_registers_as_numpy_does(device: Device) -> None:
    found, expected = multiply_registers(device, hasty=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_registers_that_are_written_under_a_product_are_reported(emulated: EmulatedDevice) -> None:
    with pytest.raises(EmulationError, match="registers of a product under way"):
        multiply_registers(emulated, hasty=True)


def test_a_warp_can_come_by_a_barrier_without_waiting(device: Device) -> None:
    y = device.allocate(32 * 4, "y")
    function = device.compile(str(HOPPER_PROBES), {}).function("swap_numbers")
    function(device.stream(), 1, 128, (y.address,), dynamic_shared=HOPPER_SHARED, dependent=False)
    np.testing.assert_array_equal(download(device, y.address, np.int32, 32), np.arange(32, 64))


def test_shuffles_and_votes_follow_their_definition(device: Device, run: Run) -> None:
    x = RNG.integers(0, 100, 64).astype(np.int32)
    lane, warp = np.arange(64) % 32, np.arange(64) // 32 * 32
    buffer, y = upload(device, x), device.allocate(9 * 64 * 4, "y")
    run("shuffles", 1, 64, buffer.address, y.address)
    found = download(device, y.address, np.int32, (9, 64))
    np.testing.assert_array_equal(found[0], x[warp + (lane ^ 5)])
    np.testing.assert_array_equal(found[1], x[warp + lane // 8 * 8 + (lane + 3) % 8])
    np.testing.assert_array_equal(found[2], x[warp + np.where(lane + 7 < 32, lane + 7, lane)])
    np.testing.assert_array_equal(found[3], x[warp + np.where(lane % 16 >= 7, lane - 7, lane)])
    ballot = [int(((x[w : w + 32] > 50) << np.arange(32, dtype=np.uint64)).sum()) for w in (0, 32)]
    np.testing.assert_array_equal(found[4].view(np.uint32), np.repeat(ballot, 32))
    np.testing.assert_array_equal(
        found[5], np.repeat([int((x[w : w + 32] > 98).any()) + 2 for w in (0, 32)], 32)
    )
    np.testing.assert_array_equal(found[6], np.repeat(x.reshape(2, 32).max(1), 32))
    np.testing.assert_array_equal(found[7], np.repeat(x.reshape(4, 16).sum(1), 16))
    np.testing.assert_array_equal(found[8], (x > 50).sum() + (x > 70).sum())


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_a_block_sums_a_row(device: Device, run: Run, threads: int) -> None:
    x = RNG.standard_normal((5, 777)).astype(np.float32)
    rows, y = upload(device, x), device.allocate(5 * 4, "y")
    run("sum_rows", 5, threads, rows.address, y.address, np.int32(777))
    np.testing.assert_allclose(
        download(device, y.address, np.float32, 5), x.astype(np.float64).sum(1), rtol=1e-4, atol=1e-4
    )


def test_halves_are_rounded_to_nearest_even(device: Device, run: Run) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)].astype(np.float32)
    middles = (finite[:-1] + finite[1:]) / 2
    some = np.ldexp(RNG.standard_normal(20000), RNG.integers(-30, 20, 20000)).astype(np.float32)
    x = np.concatenate(
        [finite, middles, some, np.array([np.inf, -np.inf, np.nan, 65520, 65519.9], np.float32)]
    )
    buffer, y, back = (
        upload(device, x),
        device.allocate(x.size * 2, "y"),
        device.allocate(x.size * 4, "back"),
    )
    run("convert", 1, 128, buffer.address, y.address, back.address, np.int32(x.size))
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    np.testing.assert_array_equal(download(device, y.address, np.float16, x.size), expected)
    np.testing.assert_array_equal(
        download(device, back.address, np.float32, x.size), expected.astype(np.float32)
    )


def test_atomics_count_over_blocks(device: Device, run: Run) -> None:
    counter, turn = upload(device, np.zeros(1, np.uint64)), upload(device, np.zeros(8, np.int32))
    run("count", 7, 64, counter.address, turn.address)
    assert download(device, counter.address, np.uint64, 1)[0] == 2 * 7 * 64
    np.testing.assert_array_equal(np.sort(download(device, turn.address, np.int32, 8)), [*range(7), 7])


def test_grids_and_blocks_have_three_dimensions(device: Device, run: Run) -> None:
    y = device.allocate(24 * 60 * 4, "y")
    run("indices", (2, 3, 4), (5, 4, 3), y.address)
    expected = 1000 * np.arange(24)[:, None] + np.arange(60)
    np.testing.assert_array_equal(download(device, y.address, np.int32, (24, 60)), expected)


def test_a_graph_replays_launches_fills_and_copies(device: Device) -> None:
    stream, twin = device.stream(), device.stream()
    x, y = upload(device, np.ones((2, 4), np.float32)), device.allocate(16, "y")
    function = device.compile(str(PROBES), {}).function("sum_rows")
    event = device.event()

    def work() -> None:
        device.fill(y.address, 0, 16, stream)
        function(stream, 2, 32, (x.address, y.address, np.int32(4)), dependent=False)
        device.copy(y.address + 8, y.address, 8, stream)

    graph = device.capture(stream, work)
    graph.launch(stream)
    event.record(stream)
    twin.wait(event)
    device.copy(x.address, y.address, 16, twin)
    twin.synchronize()
    assert event.done()
    np.testing.assert_array_equal(download(device, y.address, np.float32, 4), [4, 4, 4, 4])
    graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(download(device, y.address, np.float32, 4), [16, 4, 16, 4])
    graph.close()


def test_a_kernel_reads_pinned_memory_in_place(device: Device, run: Run) -> None:
    host, y = device.allocate_host(5 * 64 * 4), device.allocate(5 * 4, "y")
    rows = host.array.view(np.float32).reshape(5, 64)
    rows[:] = np.arange(5)[:, None]
    run("sum_rows", 5, 32, host.address, y.address, np.int32(64))
    np.testing.assert_array_equal(download(device, y.address, np.float32, 5), 64 * np.arange(5))
    del rows
    host.free()
