"""The emulation does what the card would do, and reports what the card must not do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from platform import machine
from typing import Any

import numpy as np
import pytest

from tests.emulation import EmulatedDevice, EmulationError
from wicore.errors import EngineError

SOURCES = Path(__file__).parent / "sources"
RNG = np.random.default_rng(5)


@pytest.fixture
def emulated(emulated: EmulatedDevice) -> Iterator[EmulatedDevice]:
    """One with this folder's kernels; the plugin's skips where there is no compiler."""
    device = EmulatedDevice(kernels=SOURCES)
    yield device
    device.close()


def run(device: EmulatedDevice, kernel: str, grid: Any, block: Any, *args: Any, shared: int = 0) -> None:
    function = device.compile("probes.cu", {}).function(kernel, shared)
    function(device.stream(), grid, block, args, dynamic_shared=shared, dependent=False)


def test_the_order_of_threads_does_not_show_where_there_is_a_barrier(emulated: EmulatedDevice) -> None:
    y = emulated.allocate(4 * 64 * 4, "y")
    run(emulated, "turn_with_barrier", 4, 64, y.address)
    np.testing.assert_array_equal(y.array.view(np.int32).reshape(4, 64), [(np.arange(64) + 63) % 64] * 4)


def test_a_missing_barrier_shows_in_every_other_block(emulated: EmulatedDevice) -> None:
    y = emulated.allocate(4 * 64 * 4, "y")
    run(emulated, "turn_without", 4, 64, y.address)
    blocks = y.array.view(np.int32).reshape(4, 64)
    assert sorted((blocks == -1).sum(1)) == [1, 1, 63, 63]


def test_shared_memory_begins_as_nan(emulated: EmulatedDevice) -> None:
    y = emulated.upload(np.zeros(64, np.float32))
    run(emulated, "read_unwritten", 1, 32, y.address, shared=128)
    assert np.isnan(y.array.view(np.float32)).all()


def test_what_copy_async_brings_is_nan_until_it_is_waited_for(emulated: EmulatedDevice) -> None:
    x = emulated.upload(np.arange(16, dtype=np.float32))
    y = emulated.allocate(64, "y")
    run(emulated, "read_early", 1, 1, x.address, y.address, shared=64)
    found = y.array.view(np.float32).reshape(4, 4)
    np.testing.assert_array_equal(found[:2], [[0, 1, 2, 3], [0, 0, 0, 0]])
    assert np.isnan(found[2:]).all()


@pytest.mark.parametrize(
    ("kernel", "threads", "words"),
    [
        ("leave_barrier", 64, "stuck, 24 of 64 threads have ended; 40 of 64 wait at barrier 0"),
        ("leave_warp", 32, "have ended"),
        ("wrong_mask", 1, "lane 0 calls it and is not in its mask 00000002"),
    ],
)
def test_threads_that_wait_for_nobody_are_reported(
    emulated: EmulatedDevice, kernel: str, threads: int, words: str
) -> None:
    with pytest.raises(EmulationError, match=words):
        run(emulated, kernel, 1, threads)


def test_a_warp_that_lost_a_lane_later_is_stuck() -> None:
    emulated = EmulatedDevice(kernels=SOURCES, order="descending")  # the others wait before lane 3 leaves
    with pytest.raises(EmulationError, match=r"lanes fffffff0 of ffffffff wait at __syncwarp|have ended"):
        run(emulated, "leave_warp", 1, 32)


def test_a_dependent_launch_must_wait_for_the_one_before(emulated: EmulatedDevice) -> None:
    module, stream = emulated.compile("probes.cu", {}), emulated.stream()
    x, y = emulated.upload(np.zeros(32, np.float32)), emulated.allocate(4, "y")
    module.function("sum_rows")(stream, 1, 32, (x.address, y.address, np.int32(32)))
    with pytest.raises(EmulationError, match="launched as dependent, and no thread calls pdl_wait"):
        module.function("write_global")(stream, 1, 4, (y.address,))


def test_a_spin_that_nobody_ends_is_reported(emulated: EmulatedDevice) -> None:
    flag = emulated.upload(np.zeros(1, np.int32))
    with pytest.raises(EmulationError, match="waits for memory that no other thread changes"):
        run(emulated, "spin", 1, 2, flag.address)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_spinning_threads_take_turns(order: Any) -> None:
    emulated = EmulatedDevice(kernels=SOURCES, order=order)
    flag, y = emulated.upload(np.zeros(1, np.int32)), emulated.allocate(400, "y")
    run(emulated, "hand_over", 1, 100, flag.address, y.address)
    np.testing.assert_array_equal(y.array.view(np.int32), 7)


@pytest.mark.parametrize(
    ("kernel", "arg", "words"),
    [
        ("write_shared", np.int32(128), "wrote to offset 128, past the block's 128 bytes"),
        ("write_shared", np.int32(1 << 19), "illegal address"),
        ("write_static", np.int32(8), "past the end of a static array"),
    ],
)
def test_overruns_of_shared_memory_are_reported(
    emulated: EmulatedDevice, kernel: str, arg: np.int32, words: str
) -> None:
    with pytest.raises(EmulationError, match=words):
        run(emulated, kernel, 1, 1, arg, shared=128)
    run(emulated, kernel, 1, 1, np.int32(0), shared=128)  # the next launch is sound


def test_global_memory_cannot_be_overrun_or_used_after_it_is_freed(emulated: EmulatedDevice) -> None:
    buffer = emulated.allocate(1024, "cells")
    run(emulated, "write_global", 1, 1024, buffer.address)
    with pytest.raises(EmulationError, match=r"block \(0, 0, 0\), thread \(\d+, 0, 0\): illegal address"):
        run(emulated, "write_global", 1, 512, buffer.address + 1000)
    buffer.free()
    with pytest.raises(EmulationError, match="illegal address"):
        run(emulated, "write_global", 1, 1, buffer.address)


def test_a_write_just_behind_a_buffer_is_reported_when_it_is_freed(emulated: EmulatedDevice) -> None:
    buffer = emulated.allocate(100, "cells")
    run(emulated, "write_global", 1, 101, buffer.address)
    with pytest.raises(EmulationError, match="cells: was written to past its 100 bytes"):
        buffer.free()


def test_a_misaligned_access_is_reported(emulated: EmulatedDevice) -> None:
    x, y = emulated.allocate(64, "x"), emulated.allocate(16, "y")
    run(emulated, "read_wide", 1, 1, x.address + 16, y.address)
    with pytest.raises(EmulationError, match="misaligned"):
        run(emulated, "read_wide", 1, 1, x.address + 8, y.address)


def test_halves_are_rounded_to_nearest_even_without_the_processors_help(
    emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tests.emulation.build._machine_flags", lambda: ("-mno-f16c",) if machine() == "x86_64" else ()
    )
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)].astype(np.float32)
    x = np.concatenate([finite, (finite[:-1] + finite[1:]) / 2, np.array([np.inf, np.nan, 1e9], np.float32)])
    values, y, back = (emulated.allocate(x.nbytes, what) for what in ("values", "y", "back"))
    values.array.view(np.float32)[:] = x
    run(emulated, "convert", 1, 32, values.address, y.address, back.address, np.int32(x.size))
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    np.testing.assert_array_equal(y.array[: 2 * x.size].view(np.float16), expected)
    np.testing.assert_array_equal(back.array.view(np.float32), expected.astype(np.float32))


def test_a_tensor_map_is_passed_by_value(emulated: EmulatedDevice) -> None:
    x, y = emulated.allocate(64 * 128 * 2, "x"), emulated.allocate(32, "y")
    tensor_map = emulated.tensor_map_2d(x.address, 64, 128, 256, 32, 64)
    run(emulated, "take_map", 1, 1, tensor_map, y.address, np.int8(-5), np.float32(3))
    np.testing.assert_array_equal(y.array.view(np.int64), [128, 32, -5, 3])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((1, 2), "takes 3 arguments, given 2"),
        ((1, 2, 3), "argument 2 has 4 bytes, given 8"),
        ((1, np.int32(2), np.int32(3)), "argument 1 has 8 bytes, given 4"),
        ((1, 2, 3.0), "expected int or a numpy scalar"),
    ],
)
def test_arguments_of_another_size_are_refused(
    emulated: EmulatedDevice, args: tuple[Any], words: str
) -> None:
    with pytest.raises(EmulationError, match=words):
        run(emulated, "sum_rows", 1, 32, *args)


@pytest.mark.parametrize(
    ("grid", "block", "shared"), [(0, 32, 0), (1, 1056, 0), ((1, 1 << 16), 1, 0), (1, 1, 1 << 17)]
)
def test_launches_that_the_card_refuses_are_refused(
    emulated: EmulatedDevice, grid: Any, block: Any, shared: int
) -> None:
    function = emulated.compile("probes.cu", {}).function("leave_warp")
    with pytest.raises(EmulationError):
        function(emulated.stream(), grid, block, (), dynamic_shared=shared)


def test_an_unknown_kernel_and_a_source_that_does_not_compile_are_named(
    emulated: EmulatedDevice, tmp_path: Path
) -> None:
    with pytest.raises(EmulationError, match=r"probes.cu: has no kernel nothing"):
        emulated.compile("probes.cu", {}).function("nothing")
    (tmp_path / "broken.cu").write_text("int x = nonsense;")
    with pytest.raises(EngineError, match=r"broken.cu: does not compile(.|\n)*nonsense"):
        EmulatedDevice(kernels=tmp_path).compile("broken.cu", {})


def test_a_graph_replays_the_arguments_of_its_capture(emulated: EmulatedDevice) -> None:
    stream = emulated.stream()
    x, y = emulated.upload(np.ones((2, 4), np.float32)), emulated.allocate(8, "y")
    function = emulated.compile("probes.cu", {}).function("sum_rows")
    scalar = np.full((), 2, np.int32)

    def work() -> None:
        emulated.fill(y.address, 0, 8, stream)
        function(stream, 2, 32, (x.address, y.address, np.int32(scalar)))

    graph = emulated.capture(stream, work)
    assert np.isnan(y.array.view(np.float32)).all()  # nothing ran
    scalar[...] = 4
    graph.launch(stream)
    np.testing.assert_array_equal(y.array.view(np.float32), [2, 2])
    x.array.view(np.float32)[:] = 3  # memory is read again, as it is by then
    graph.launch(stream)
    np.testing.assert_array_equal(y.array.view(np.float32), [6, 6])
    graph.close()
    with pytest.raises(EmulationError, match="closed"):
        graph.launch(stream)


def test_a_capture_forbids_what_cuda_forbids(emulated: EmulatedDevice) -> None:
    stream = emulated.stream()
    for work in (
        stream.synchronize,
        lambda: emulated.allocate(4, "x"),
        lambda: emulated.compile("probes.cu", {}),
    ):
        with pytest.raises(EmulationError):
            emulated.capture(stream, work)  # type: ignore[arg-type]
    stream.synchronize()


def test_memory_is_counted_and_bounded() -> None:
    emulated = EmulatedDevice(memory_bytes=1000)
    weights = emulated.allocate(700, "weights")
    emulated.allocate_host(5000)
    assert emulated.report() == {"weights": 700}
    assert emulated.memory_free == 300
    with pytest.raises(EmulationError, match="pool need 301 bytes, 300 are free"):
        emulated.allocate(301, "pool")
    weights.free()
    weights.free()
    assert emulated.memory_free == 1000


def test_copies_stay_inside_their_buffers(emulated: EmulatedDevice) -> None:
    stream = emulated.stream()
    source, target = np.arange(16, dtype=np.uint8), emulated.allocate(16, "target")
    emulated.copy(target.address, source.ctypes.data, 16, stream)
    np.testing.assert_array_equal(target.array, source)
    with pytest.raises(EmulationError, match="17 bytes at offset 0 of target: has 16"):
        emulated.fill(target.address, 0, 17, stream)
    start, end = emulated.event(timing=True), emulated.event(timing=True)
    start.record(stream)
    end.record(stream)
    assert end.elapsed_ms(start) >= 0
