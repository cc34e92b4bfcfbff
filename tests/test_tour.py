"""The tour with the official client that is installed; `make tour` makes those with others."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.official import serving
from tests.seeing import seeing_model
from tests.services import running_worker, settings_for
from tests.tour.__main__ import TOURS

pytestmark = pytest.mark.valkey


def take_the_tour(url: str) -> None:
    command = [sys.executable, TOURS / "openai_python.py", url, "tiny"]
    tour = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert tour.returncode == 0, tour.stdout + tour.stderr
    assert "stops passed" in tour.stdout


def test_the_official_client_is_served_in_every_supported_call(port: int) -> None:
    take_the_tour(f"http://127.0.0.1:{port}/v1")


def test_so_it_is_of_a_model_that_takes_images(redis_client: Any, valkey_url: str) -> None:
    settings = settings_for(valkey_url, hmt__device_tokens=65_536)
    model = seeing_model(settings)
    with (
        running_worker(settings, model=model) as worker,
        serving(settings, model) as url,
    ):
        take_the_tour(url)
        assert sum(worker.status()["images"]["encode_seconds"]["counts"]) == 1
