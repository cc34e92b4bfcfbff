"""KV blocks between an emulated device and host memory."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.emulation import EmulatedDevice
from wicore.engine.base import KVLayout, Pool
from wicore.engine.tensorrt.copies import Health, KVCopies, PoolBlocks
from wicore.errors import EngineError

LAYOUT = KVLayout(16, 2, 3, 2, 16, 32, "float16")
SIZE = LAYOUT.block_bytes("global")
BLOCKS = 12
POOLS: tuple[Pool, Pool] = ("global", "window")


class CountingDevice(EmulatedDevice):
    """Counts copies; they wait for `gate`, and fail while `broken`."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False

    def allocate_host(self, size, step=0):
        self.host = super().allocate_host(size, step)
        return self.host

    def copy(self, dst, src, size, stream) -> None:
        assert self.gate.wait(10)
        if self.broken:
            raise EngineError("an illegal address was met")
        self.sizes.append(size)
        super().copy(dst, src, size, stream)


@pytest.fixture
def device() -> CountingDevice:
    return CountingDevice()


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def copies(device: CountingDevice, health: Health) -> KVCopies:
    pools = {
        pool: PoolBlocks(device.allocate(BLOCKS * LAYOUT.block_bytes(pool), "KV").address, BLOCKS)
        for pool in POOLS
    }
    return KVCopies(device, LAYOUT, pools, health)


def random_rows(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, SIZE)).astype(np.uint8)


def test_neighbours_in_pinned_memory_are_copied_in_one_go(copies, device) -> None:
    memory = copies.host_memory("global", 10)
    memory[:] = random_rows(10)
    copies.start("global", [7, 4, 5, 6, 1], [memory[5], *memory[2:5], memory[9]], inwards=True).wait()
    assert device.sizes == [SIZE, 4 * SIZE]
    device.sizes.clear()
    copies.start("global", [4, 5, 6, 7], memory[6:10], inwards=False).wait()
    assert device.sizes == [4 * SIZE]
    assert np.array_equal(memory[6:10], memory[2:6])


def test_rows_that_are_not_pinned_yet_arrive_by_a_detour(copies, device) -> None:
    memory = copies.host_memory("global", 10)
    rows = memory[:] = random_rows(10)
    device.host.pinned = 4 * SIZE
    copies.start("global", range(6), memory[:6], inwards=True).wait()
    assert device.sizes == [4 * SIZE, SIZE, SIZE]
    memory[:] = 0
    copies.start("global", range(6), memory[2:8], inwards=False).wait()
    assert np.array_equal(memory[2:8], rows[:6])


def test_no_copy_is_of_two_pieces_that_were_pinned_apart(copies, device) -> None:
    memory = copies.host_memory("global", 10)
    memory[:] = random_rows(10)
    device.host.piece = 4 * SIZE
    copies.start("global", range(10), memory, inwards=True).wait()
    assert device.sizes == [4 * SIZE, 4 * SIZE, 2 * SIZE]


def test_rows_of_any_memory_arrive(copies) -> None:
    rows, back = random_rows(5), np.zeros((10, SIZE), np.uint8)
    copies.start("global", range(5), rows, inwards=True).wait()
    copies.start("global", range(5), back[::2], inwards=False).wait()
    assert np.array_equal(back[::2], rows)


def test_a_copy_comes_after_the_one_of_the_same_block_before_it(copies, device) -> None:
    memory = copies.host_memory("global", 2)
    [row] = random_rows(1)
    device.gate.clear()
    first = copies.start("global", [3], [row], inwards=True)
    second = copies.start("global", [3], [memory[1]], inwards=False)
    assert not first.done()
    assert not second.done()
    device.gate.set()
    second.wait()
    assert first.done()
    assert np.array_equal(memory[1], row)


@pytest.mark.parametrize("block", [-1, BLOCKS])
def test_a_block_that_is_not_there_fails_the_copy(copies, block) -> None:
    ticket = copies.start("global", [block], random_rows(1), inwards=True)
    assert ticket.done()
    with pytest.raises(EngineError, match=rf"copy of KV blocks failed: block {block} is not in 0\.\.11"):
        ticket.wait()


def test_a_copy_that_the_device_refuses_fails_alone(copies, device) -> None:
    device.broken = True
    ticket = copies.start("global", [0], random_rows(1), inwards=True)
    with pytest.raises(EngineError, match="copy of KV blocks failed: an illegal address was met"):
        ticket.wait()
    device.broken = False
    copies.start("global", [0], random_rows(1), inwards=True).wait()


def test_after_a_device_error_nothing_is_copied_and_nothing_under_way_is_trusted(copies, health) -> None:
    memory = copies.host_memory("global", 4)
    copies.start("global", [0, 1], memory[:2], inwards=True).wait()
    waited, pending = (copies.start("global", [i], [memory[2 + i]], inwards=False) for i in range(2))
    waited.wait()
    health.failed(EngineError("an illegal address was met"))
    waited.wait()
    for ticket in (pending, copies.start("global", [2], [memory[0]], inwards=False)):
        assert ticket.done()
        with pytest.raises(EngineError, match="the device failed: an illegal address was met"):
            ticket.wait()
    copies.close()


# --- layer by layer ---------------------------------------------------------------------------------


@pytest.fixture
def layered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wicore.engine.tensorrt.copies._LAYERED_BYTES", 2 * SIZE)


@pytest.mark.usefixtures("layered")
def test_a_large_copy_in_is_made_in_the_order_of_the_layers(copies, device, monkeypatch) -> None:
    memory = copies.host_memory("global", 10)
    memory[:] = random_rows(10)
    made, copy_many = [], device.copy_many

    def noted(targets, sources, size, stream) -> None:
        made.append((len(targets), size))
        copy_many(targets, sources, size, stream)

    monkeypatch.setattr(device, "copy_many", noted)
    ticket = copies.start("global", [7, 4, 5, 1], [memory[5], *memory[2:4], memory[9]], inwards=True)
    assert made == [(4, SIZE // 2)] * LAYOUT.global_layers
    assert len(ticket.layers) == LAYOUT.global_layers
    back = np.zeros((4, SIZE), np.uint8)
    copies.start("global", [7, 4, 5, 1], back, inwards=False).wait()
    assert np.array_equal(back, memory[[5, 2, 3, 9]])


@pytest.mark.usefixtures("layered")
def test_small_copies_and_copies_out_are_made_at_once(copies) -> None:
    memory = copies.host_memory("global", 10)
    assert copies.start("global", [3], memory[:1], inwards=True).layers == []
    assert copies.start("global", range(8), memory[:8], inwards=False).layers == []


@pytest.mark.usefixtures("layered")
def test_a_copy_in_that_fails_takes_the_device_with_it(copies, device, health) -> None:
    """A step may have followed it, and read what is not there."""
    memory = copies.host_memory("global", 10)
    device.broken = True
    ticket = copies.start("global", range(4), memory[:4], inwards=True)
    with pytest.raises(EngineError, match="an illegal address was met"):
        ticket.wait()
    assert health.error == "an illegal address was met"
