"""The real processes of a service around the null engine, for measuring what they add."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from wicore.bench.hardware import describe
from wicore.errors import EngineError
from wicore.queue.embedded import EmbeddedValkey

Line = dict[str, object]
_START_S = 60.0
GUNICORN = ("-c", "python:api.gunicorn_conf", "--log-level", "warning", "api.wsgi:app")


@dataclass(frozen=True, slots=True)
class Setting:
    """The null engine and the jobs."""

    model: str
    """What model.path is to be; the tokenizer is real."""
    slots: int = 16
    step_ms: float = 5.0
    tokens: int = 10
    """Output tokens a job."""
    port: int = 8099

    @property
    def ideal_jobs_s(self) -> float:
        return self.slots * 1000 / (self.tokens * self.step_ms)

    def describe(self) -> Line:
        return {
            "engine": "null",
            "slots": self.slots,
            "step_ms": self.step_ms,
            "tokens_a_job": self.tokens,
            **describe(),
        }


@contextmanager
def embedded_redis() -> Iterator[str]:
    """A Valkey of its own, with the append-only file that durability needs; its URL."""
    with tempfile.TemporaryDirectory(prefix="wicore-") as folder, EmbeddedValkey(folder) as valkey:
        yield valkey.url


@contextmanager
def service_process(
    setting: Setting, url: str, module: str, *arguments: str, **settings: object
) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m module` of the service with the null engine; terminated at the end.

    More settings come as `section__key`.
    """
    environ = {key: value for key, value in os.environ.items() if not key.startswith("WICORE_")}
    environ |= {
        "WICORE_REDIS__URL": url,
        "WICORE_MODEL__PATH": setting.model,
        "WICORE_API__PORT": str(setting.port),
        "WICORE_ENGINE__KIND": "null",
        "WICORE_ENGINE__NULL_STEP_MS": str(setting.step_ms),
        "WICORE_SCHEDULER__MAX_BATCH": str(setting.slots),
        "WICORE_TELEMETRY__LOG_LEVEL": "warning",
        "WICORE_TELEMETRY__ACCESS_LOG": "false",  # standard output is for the measurements
        **{f"WICORE_{name}".upper(): str(value) for name, value in settings.items()},
    }
    command: Sequence[str] = (sys.executable, "-m", module, *arguments)
    process = subprocess.Popen(command, env=environ)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_ready(setting: Setting) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        try:
            if httpx.get(f"http://127.0.0.1:{setting.port}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise EngineError(f"bench: the service was not ready within {_START_S:.0f} s")
