"""The `device` fixture of kernel tests: the emulation, or the card with --gpu.

Where only numpy, pytest, hypothesis and cuda-bindings are installed:
`python -m pytest -p tests.emulation.plugin --confcutdir tests/kernels tests/kernels tests/gpu --gpu`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.emulation import EmulatedDevice
from tests.emulation.build import NoCompiler, compiler
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.engine.tensorrt.device import Device
from wicore.errors import EngineError


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run kernel tests on the GPU, not on its emulation")
    parser.addoption("--thorough", action="store_true", help="also what takes the emulation long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--thorough") or config.getoption("--gpu"):
        return
    for item in items:
        if item.get_closest_marker("thorough"):
            item.add_marker(pytest.mark.skip("takes the emulation long: --thorough"))


@pytest.fixture(scope="session")
def card(request: pytest.FixtureRequest) -> Iterator[Device]:
    """The GPU; skips where there is none, fails where --gpu asked for one."""
    try:
        found = CudaDevice()
    except EngineError as err:
        if request.config.getoption("--gpu"):
            raise
        pytest.skip(f"no GPU: {err.message}")
    yield found
    found.close()


@pytest.fixture
def emulated() -> Iterator[EmulatedDevice]:
    """A new emulated device; closing it finds writes behind the end of allocations."""
    try:
        compiler()
    except NoCompiler as err:
        if os.environ.get("CI"):
            raise
        pytest.skip(err.message)
    device = EmulatedDevice()
    yield device
    device.close()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Device:
    """What kernels run on."""
    found: Device = request.getfixturevalue("card" if request.config.getoption("--gpu") else "emulated")
    return found
