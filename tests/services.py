"""Workers in this process and in processes of their own, for tests against the embedded Valkey."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from redis import Redis

from wicore.config import Settings, load_settings
from wicore.engine.base import Engine, VisionEncoder
from wicore.engine.factory import create_engine, create_vision
from wicore.model import Model, load_model
from wicore.queue.connection import connect
from wicore.request import Event
from wicore.stream.relay import Relay
from workers.worker import Worker

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "fixtures" / "tiny"
PATIENCE_S = 60.0


def settings_for(url: str, **overrides: Any) -> Settings:
    """Settings of a service on the tiny checkpoint; overrides as `section__key`."""
    given = {"redis.url": url, "model.path": str(TINY), "hmt.device_tokens": 4096, "queue.lease_s": 2.0}
    given |= {name.replace("__", "."): value for name, value in overrides.items()}
    return load_settings(environ={}, overrides=given)


@contextmanager
def running_worker(
    settings: Settings,
    owner: str = "test-worker",
    engine: Engine | None = None,
    model: Model | None = None,
    encoder: VisionEncoder | None = None,
) -> Iterator[Worker]:
    """A worker on a thread of this process; stopped, and its accounts checked, at the end."""
    model = model or load_model(settings)
    assert settings.redis.url is not None
    client = connect(settings.redis.url)
    engine = engine or create_engine(settings, model)
    encoder = encoder or create_vision(settings, model, engine)
    worker = Worker(settings, model, engine, client, owner, encoder)
    thread = threading.Thread(target=worker.run, name=owner)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        worker.check()
        client.close()


def worker_process(
    settings: Settings, module: str = "workers.gpu", **options: Any
) -> subprocess.Popen[bytes]:
    """`python -m workers.gpu`, or another such module, with these settings; `options` are Popen's."""
    return module_process(settings, module, **options)


def api_process(settings: Settings, **options: Any) -> subprocess.Popen[bytes]:
    """The API as the Procfile starts it, with these settings; `options` are Popen's."""
    return module_process(settings, "gunicorn", "-c", "python:api.gunicorn_conf", "api.wsgi:app", **options)


def start_api(settings: Settings) -> subprocess.Popen[bytes]:
    """A running API process, answering."""
    process = api_process(settings)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{settings.api.port}/health", timeout=5).raise_for_status()
            return process
        except httpx.TransportError:
            assert process.poll() is None, "gunicorn exited"
            assert time.monotonic() < deadline, "gunicorn did not start"
            time.sleep(0.05)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    finally:
        process.kill()
        process.wait()


def tasks_process(settings: Settings, **options: Any) -> subprocess.Popen[bytes]:
    """`python -m workers.tasks` with these settings; `options` are Popen's."""
    return module_process(settings, "workers.tasks", **options)


def module_process(settings: Settings, *module: str, **options: Any) -> subprocess.Popen[bytes]:
    """`python -m MODULE ARGUMENTS` with these settings; `options` are Popen's."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("WICORE_")}
    for section, values in settings.model_dump(exclude_defaults=True).items():
        environ |= {f"WICORE_{section}__{key}".upper(): _text(value) for key, value in values.items()}
    return subprocess.Popen([sys.executable, "-m", *module], cwd=ROOT, env=environ, **options)


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | tuple) else str(value)


def follow(client: Redis, job_id: str, after: int = 0) -> Iterator[Event]:
    """The job's events, one by one, to the terminal one."""
    relay = Relay(client)
    try:
        for batch in relay.follow(job_id, after):
            yield from batch
    finally:
        relay.close()
