"""The tour with the official client that is installed; `make tour` makes those with others."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.tour.__main__ import TOURS

pytestmark = pytest.mark.valkey


def test_the_official_client_is_served_in_every_supported_call(port: int) -> None:
    command = [sys.executable, TOURS / "openai_python.py", f"http://127.0.0.1:{port}/v1", "tiny"]
    tour = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert tour.returncode == 0, tour.stdout + tour.stderr
    assert "stops passed" in tour.stdout
