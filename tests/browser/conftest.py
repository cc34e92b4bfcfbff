"""A browser, and a service for the page to speak to. Without Chromium and Playwright the tests are skipped.

`make browser` gets what they need. WICORE_CHROMIUM names a Chromium, WICORE_AXE a folder that holds axe-core.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.seeing import SEEING
from tests.services import settings_for, start_api, stop, worker_process
from tests.waiting import free_port, until
from wicore.config import Settings
from wicore.queue.connection import connect
from wicore.queue.consumer import LeaseConsumer
from wicore.queue.producer import Producer
from wicore.queue.schema import Keys
from wicore.queue.scripts import Scripts
from wicore.request import Priority, parse_job

ROOT = Path(__file__).parent.parent.parent
KEY = "an-operators-key-for-the-browser"
DEAD = ("Once", "Twice")
"""Prompts of the jobs that were given up before the service began."""


class Service:
    """API and worker, each a process, of a model that takes images, on an engine that computes nothing, 100
    tokens a second."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.url = f"http://127.0.0.1:{settings.api.port}/"
        self.http = httpx.Client(base_url=self.url, timeout=20)
        self._worker: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._worker = worker_process(self.settings)
        self.start_api()
        until(lambda: self.http.get("/ready").status_code == 200, "the service was ready")

    def start_api(self) -> None:
        self._api = start_api(self.settings)

    def kill_api(self) -> None:
        """All its processes at once, as a lost machine would: no close frame, nothing is drained."""
        family = psutil.Process(self._api.pid)
        for process in (family, *family.children(recursive=True)):
            process.kill()
        self._api.wait()

    def close(self) -> None:
        self.http.close()
        stop(self._api)
        if self._worker is not None:
            stop(self._worker)

    def record(self, job: str) -> Any:
        return self.http.get(f"/v1/jobs/{job}").json()

    def submit(self, **fields: Any) -> str:
        body = {"kind": "completion", "prompt": "Once", "ignore_eos": True, **fields}
        return str(self.http.post("/v1/jobs", json=body).raise_for_status().json()["id"])


def give_up(settings: Settings, *prompts: str) -> None:
    """Jobs whose workers died in every attempt. No worker may run yet."""
    assert settings.redis.url is not None
    client, prefix = connect(settings.redis.url), settings.redis.prefix
    producer = Producer(client, prefix, settings.queue)
    scripts = Scripts(client, Keys(prefix), settings.queue)
    for prompt in prompts:
        producer.submit(parse_job({"kind": "completion", "prompt": prompt, "max_tokens": 4}), Priority.BATCH)
        for attempt in range(settings.queue.max_attempts):
            consumer = LeaseConsumer(client, f"lost{attempt}", prefix, settings.queue)
            (delivery,) = consumer.pop(1)
            consumer.close()
            client.zadd(Keys(prefix).leases, {delivery.tag: 1})
            scripts.call("reap")
    client.close()


@pytest.fixture(scope="package")
def service(chromium: Any, valkey_url: str) -> Iterator[Service]:
    # The browser first: without one nothing is started.
    settings = settings_for(
        valkey_url,
        redis__prefix="browser",
        api__port=free_port(),
        model__path=str(SEEING),
        engine__kind="null",
        engine__null_step_ms=10.0,
        hmt__device_tokens=65_536,
        queue__drain_s=0.0,
    )
    give_up(settings, *DEAD)
    service = Service(settings)
    try:
        service.start()
        yield service
    finally:
        service.close()


@pytest.fixture(scope="package")
def locked(service: Service) -> Iterator[str]:
    """Address of an API of the same service that asks for keys; KEY is one."""
    keys = [{"name": "page", "key": KEY, "admin": True}]
    settings = settings_for(
        service.settings.redis.url or "",
        redis__prefix="browser",
        api__port=free_port(),
        api__keys=keys,
    )
    api = start_api(settings)
    yield f"http://127.0.0.1:{settings.api.port}/"
    stop(api)


@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make browser")
    names = (os.environ.get("WICORE_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium found; install one, or name it in WICORE_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page in a window of its own; at the end it must have had no error and broken no policy."""
    windows, complaints = [], []

    def open_(url: str, **window: Any) -> Any:
        windows.append(chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **window}))
        page = windows[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if "Policy" in said.text else None)
        page.goto(url)
        return page

    yield open_
    for window in windows:
        window.close()
    assert complaints == []


@pytest.fixture(scope="session")
def axe() -> str:
    """axe-core's source."""
    for folder in filter(None, (os.environ.get("WICORE_AXE"), ROOT / ".venv" / "browser" / "node_modules")):
        for path in (Path(folder) / "axe.min.js", Path(folder) / "axe-core" / "axe.min.js"):
            if path.is_file():
                return path.read_text()
    pytest.skip("axe-core is not there: make browser")
