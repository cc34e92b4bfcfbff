"""Pinned host memory of a card: whose it is, and when it is pinned."""

from __future__ import annotations

import mmap
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fake_driver import FakeDriver, Result, installed, opened
from wicore.engine.tensorrt import cuda_memory, pinned
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.engine.tensorrt.pinned import available_memory
from wicore.errors import EngineError

MIB = 1 << 20


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return installed(monkeypatch)


@pytest.fixture
def device(driver: FakeDriver) -> Iterator[CudaDevice]:
    yield from opened(driver)


def test_pinned_memory_is_seen_by_host_and_device(device: CudaDevice, driver: FakeDriver) -> None:
    host, memory, stream = device.allocate_host(64), device.allocate(64, "x"), device.stream()
    host.array[:] = np.arange(64)
    device.copy(memory.address, host.address, 64, stream)
    device.fill(host.address, 7, 32, stream)
    assert list(host.array) == [7] * 32 + list(range(32, 64))
    assert bytes(driver.memory[memory.address]) == bytes(range(64))
    assert driver.called("cuMemHostAlloc") == [(64 + mmap.PAGESIZE, 1 | 2)]
    assert host.array.ctypes.data % mmap.PAGESIZE == 0
    assert device.report() == {"x": 64}  # of the device only
    host.free()
    host.free()
    assert list(driver.memory) == [memory.address]


def test_much_pinned_memory_is_our_own_huge_pages(device: CudaDevice, driver: FakeDriver) -> None:
    host = device.allocate_host(5 * MIB)
    assert driver.called("cuMemHostRegister") == [(host.address, 5 * MIB, 1 | 2)]
    assert host.pinned == len(host.array) == 5 * MIB
    assert host.address == host.array.ctypes.data
    assert host.address % (2 * MIB) == 0
    assert not host.array[:: mmap.PAGESIZE].any()
    host.free()
    host.free()
    assert driver.called("cuMemHostUnregister") == [(host.address,)]


def test_a_device_with_addresses_of_its_own_gets_all_pinned_memory_from_the_driver(
    driver: FakeDriver,
) -> None:
    driver.shares_addresses = False
    device = CudaDevice()
    assert device.allocate_host(5 * MIB, 4096).pinned == 5 * MIB
    assert driver.called("cuMemHostAlloc")
    device.close()


class Registers:
    """The driver's cuMemHostRegister: pieces after the first wait for `turns`, and then may fail."""

    def __init__(self, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pieces: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self.turns, self.result = threading.Semaphore(1), Result.CUDA_SUCCESS
        monkeypatch.setattr(driver, "cuMemHostRegister", self, raising=False)
        monkeypatch.setattr(pinned, "_PIECE_BYTES", 4 * MIB)

    def __call__(self, address: int, size: int, flags: int) -> tuple[Any]:
        self.pieces.put((address, size))
        assert self.turns.acquire(timeout=10)
        return (self.result,)


def test_memory_is_pinned_in_the_background_in_pieces_of_whole_rows(
    device: CudaDevice, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    registers, row = Registers(driver, monkeypatch), 3 * 4096 + 512
    host = device.allocate_host(9 * MIB, row)
    assert registers.pieces.get(timeout=10) == (host.address, host.piece)
    assert (host.piece % row, host.piece % mmap.PAGESIZE) == (0, 0)
    assert registers.pieces.get(timeout=10) == (host.address + host.piece, host.piece)
    assert host.pinned == host.piece
    registers.turns.release(2)
    host.wait()
    assert host.pinned == 9 * MIB
    assert registers.pieces.get(timeout=10) == (host.address + 2 * host.piece, 9 * MIB - 2 * host.piece)
    host.free()
    assert [address for (address,) in driver.called("cuMemHostUnregister")] == [
        host.address + turn * host.piece for turn in range(3)
    ]


def test_what_is_written_to_memory_before_it_is_pinned_stays(
    device: CudaDevice, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    registers = Registers(driver, monkeypatch)
    host = device.allocate_host(13 * MIB, 4096)
    host.array[:] = 7
    registers.turns.release(3)
    host.wait()
    assert host.pinned == 13 * MIB
    assert (host.array == 7).all()


def test_who_needs_some_of_the_memory_does_not_wait_for_the_rest(
    device: CudaDevice, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    registers = Registers(driver, monkeypatch)
    host = device.allocate_host(13 * MIB, 4096)
    host.wait(4 * MIB)
    waiting = threading.Thread(target=host.wait, args=(5 * MIB,))
    waiting.start()
    assert host.pinned == 4 * MIB
    registers.turns.release()
    waiting.join(10)
    assert not waiting.is_alive()
    assert host.pinned < 13 * MIB
    registers.turns.release(2)


def test_memory_that_cannot_all_be_pinned_says_so_once_and_to_who_waits(
    device: CudaDevice, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registers = Registers(driver, monkeypatch)
    host = device.allocate_host(9 * MIB, 4096)
    registers.result = Result.CUDA_ERROR_OUT_OF_MEMORY
    registers.turns.release()
    with pytest.raises(EngineError, match=r"4\.2 MB of host memory cannot be locked"):
        host.wait()
    assert host.pinned == 4 * MIB
    host.wait(4 * MIB)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "0.0 of 0.0 GB of host memory are pinned" in caplog.text


def test_memory_of_which_nothing_can_be_pinned_is_refused(device: CudaDevice, driver: FakeDriver) -> None:
    driver.fails["cuMemHostRegister"] = Result.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(EngineError, match=r"host memory cannot be locked; .*ulimit -l"):
        device.allocate_host(5 * MIB, 4096)


def test_closing_a_device_ends_the_pinning_of_its_memory(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    registers = Registers(driver, monkeypatch)
    device = CudaDevice()
    host = device.allocate_host(64 * MIB, 4096)
    for _ in range(2):  # the second is being pinned
        registers.pieces.get(timeout=10)
    closer = threading.Thread(target=device.close)
    closer.start()
    registers.turns.release(20)
    closer.join(10)
    assert not closer.is_alive()
    assert host.pinned == 0
    # What had been pinned by then, and no more, was given back.
    assert 2 <= len(driver.called("cuMemHostUnregister")) <= 16


def test_more_pinned_memory_than_there_is_is_refused_before_it_is_touched(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_memory, "available_memory", lambda: 8 * MIB)
    device.allocate_host(6 * MIB)
    words = r"expected 9\.4 MB of host memory, found 8\.4 MB free; lower .*hmt\.host_bytes"
    with pytest.raises(EngineError, match=words):
        device.allocate_host(9 * MIB)


def test_memory_that_the_system_does_not_give_is_an_error_with_the_setting(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_memory, "available_memory", lambda: None)
    with pytest.raises(EngineError, match=r"pinned memory: .* cannot be had .*; lower .*hmt\.host_bytes"):
        device.allocate_host(1 << 60)


def limit(group: Path, most: str, used: int, files: int, shared: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 500000\nfile_mapped 7\nfile {files}\nshmem {shared}\n")


def test_available_memory_minds_the_limits_of_control_groups(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    assert available_memory(proc, groups) is None
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  4096 kB\nMemAvailable:  1024 kB\n")
    assert available_memory(proc, groups) == MIB
    limit(groups, "max", 900_000, 400_000, 100_000)
    assert available_memory(proc, groups) == MIB
    limit(groups, "1000000", 900_000, 400_000, 100_000)
    assert available_memory(proc, groups) == 400_000
    (proc / "self" / "cgroup").write_text("0::/system.slice/wicore.service\n")
    assert available_memory(proc, groups) == 400_000  # a container's view: its own group is the top
    limit(groups / "system.slice" / "wicore.service", "max", 1, 0, 0)
    limit(groups / "system.slice", "500000", 300_000, 0, 0)
    assert available_memory(proc, groups) == 200_000
    limit(groups / "system.slice" / "wicore.service", "50000", 60_000, 0, 0)
    assert available_memory(proc, groups) == 0
