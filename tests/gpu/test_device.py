"""The card itself: what the emulation cannot show."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from tests.device_arrays import download, upload
from tests.kernels.test_instructions import PROBES
from wicore.engine.tensorrt.device import Device
from wicore.errors import EngineError

FAULT = f"""
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.errors import EngineError
import numpy as np

device = CudaDevice()
stream = device.stream()
sum_rows = device.compile({str(PROBES)!r}, {{}}).function("sum_rows")
sum_rows(stream, 1, 32, (8, 8, np.int32(4)))
for call in (stream.synchronize, device.stream, lambda: device.allocate(8, "x")):
    try:
        call()
    except EngineError as err:
        print(err.message)
device.close()
"""


def test_the_card_describes_itself(device: Device) -> None:
    assert device.sms > 0
    assert device.capability >= (8, 0)
    assert 0 < device.memory_free <= device.memory_total


def test_events_measure_time(device: Device) -> None:
    stream, start, end = device.stream(), device.event(timing=True), device.event(timing=True)
    memory = device.allocate(1 << 28, "cells")
    start.record(stream)
    for _ in range(10):
        device.fill(memory.address, 0, 1 << 28, stream)
    end.record(stream)
    end.wait()
    assert 0.1 < end.elapsed_ms(start) < 1000
    memory.free()


def test_arguments_are_checked_against_the_kernel(device: Device) -> None:
    function = device.compile(str(PROBES), {}).function("sum_rows")
    with pytest.raises(EngineError, match="argument 2 has 4 bytes, given 8"):
        function(device.stream(), 1, 32, (1, 2, 3))


def test_dependent_launches_run_in_order_in_a_graph(device: Device) -> None:
    stream = device.stream()
    rows = np.ones((4, 1024), np.float32)
    x, y = upload(device, rows), device.allocate(16, "y")
    function = device.compile(str(PROBES), {}).function("sum_rows")

    def work() -> None:
        for _ in range(4):
            function(stream, 4, 128, (x.address, y.address, np.int32(1024)))
            function(stream, 1, 32, (y.address, x.address, np.int32(4)))

    graph = device.capture(stream, work)
    for _ in range(20):
        graph.launch(stream)
        for _ in range(4):
            rows[0, 0] = rows.sum()
        found = download(device, x.address, np.float32, rows.shape)
        np.testing.assert_allclose(found, rows, rtol=1e-5)
        rows = found.copy()
    graph.close()


def test_tensor_maps_are_encoded(device: Device) -> None:
    if device.capability < (9, 0):
        pytest.skip("tensor maps need compute capability 9.0")
    x = device.allocate(64 * 128 * 2, "x")
    assert len(device.tensor_map_2d(x.address, 64, 128, 256, 32, 64).bytes) == 128
    with pytest.raises(
        EngineError, match=r"encoding a tensor map of 64 x 128 float16.*CUDA_ERROR_INVALID_VALUE"
    ):
        device.tensor_map_2d(x.address, 64, 128, 256, 32, 128)


def test_too_much_memory_is_refused_in_words(device: Device) -> None:
    with pytest.raises(EngineError, match=r"KV blocks need .* are free"):
        device.allocate(1 << 42, "KV blocks")


def test_a_fault_of_a_kernel_is_told_by_every_later_call() -> None:
    done = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert len(set(lines)) == 1
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in lines[0]
