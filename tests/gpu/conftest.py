"""Here `device` is the card; without one, every test of the folder is skipped."""

from __future__ import annotations

import pytest

from wicore.engine.tensorrt.device import Device


@pytest.fixture
def device(card: Device) -> Device:
    return card


@pytest.fixture(autouse=True)
def _needs_a_gpu(card: Device) -> None: ...
