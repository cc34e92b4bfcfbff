"""What a card can do at best."""

from __future__ import annotations

import numpy as np
import pytest

from tests.device_arrays import download, upload
from wicore.engine.tensorrt.ceilings import ceilings
from wicore.engine.tensorrt.device import Device


@pytest.mark.parametrize("words", [1, 63, 5000])
def test_the_measured_copy_copies(device: Device, words: int) -> None:
    given = np.random.default_rng(words).integers(0, 256, 16 * words, np.uint8)
    source, target = upload(device, given), upload(device, np.zeros(16 * words + 16, np.uint8))
    stream = device.stream()
    copy = device.compile("copy.cu", {}).function("copy_words")
    copy(stream, 3, 64, (source.address, target.address, np.int64(words)))
    stream.synchronize()
    got = download(device, target.address, np.uint8, (16 * words + 16,))
    assert np.array_equal(got[:-16], given)
    assert not got[-16:].any()


def test_ceilings_are_rates_and_leave_no_memory_behind(emulated: Device, monkeypatch) -> None:
    monkeypatch.setattr("wicore.engine.tensorrt.ceilings._BYTES", 1 << 16)
    monkeypatch.setattr("wicore.engine.tensorrt.timing.statistics.median", lambda times: 500.0)
    before = dict(emulated.report())
    found = ceilings(emulated)
    assert found["copy_bytes_s"] == 4 * (1 << 16)
    assert found["matmul_flop_s"] == 4096 * emulated.sms * emulated.clock_hz
    assert dict(emulated.report()) == before
