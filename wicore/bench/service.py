"""`wicore bench service`: what the service adds around an engine.

The null engine computes nothing and takes a fixed time a step, so the best any service could do is known:
`slots / (tokens * step)` jobs a second when saturated, and one step until the first token when not.
Queue, worker and API are the real processes; the load comes from this one, on the same cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import httpx

from wicore.bench.hardware import describe
from wicore.errors import EngineError
from wicore.queue.connection import connect
from wicore.queue.embedded import EmbeddedValkey
from wicore.queue.producer import Producer
from wicore.request import Priority, parse_job
from wicore.stream.relay import Relay

Line = dict[str, object]
_START_S = 60.0
_GUNICORN = ("-c", "python:api.gunicorn_conf", "--log-level", "warning", "api.wsgi:app")


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


def saturated(setting: Setting, jobs: int) -> Line:
    """Jobs a second with the queue never empty, from the middle 80 % of the jobs' ends."""
    with _redis() as url:
        client = connect(url)
        producer = Producer(client)
        body = _body(setting)
        ids = [producer.submit(parse_job(body), Priority.NORMAL).id for _ in range(jobs)]
        with _process(setting, url, "workers.gpu") as worker:
            relay = Relay(connect(url))
            for job in ids:
                for _ in relay.follow(job, idle_s=1.0):
                    if worker.poll() is not None:
                        raise EngineError(f"bench: the worker ended with exit code {worker.returncode}")
            relay.close()
        ends = sorted(record.finished_ms or 0 for record in map(producer.record, ids))
    middle = ends[jobs // 10 : -jobs // 10]
    rate = (len(middle) - 1) * 1000 / (middle[-1] - middle[0])
    return {
        "measurement": "saturated",
        "jobs": jobs,
        "jobs_s": round(rate, 1),
        "ideal_jobs_s": round(setting.ideal_jobs_s, 1),
        "share_of_ideal": round(rate / setting.ideal_jobs_s, 3),
        **setting.describe(),
    }


def latency(setting: Setting, rate: float, seconds: float) -> Line:
    """Time to the first token through HTTP, less the engine's step, at Poisson arrivals."""
    with _redis() as url, ExitStack() as stack:
        stack.enter_context(_process(setting, url, "workers.gpu"))
        stack.enter_context(_process(setting, url, "gunicorn", *_GUNICORN))
        _wait_ready(setting)
        load = _Load(setting)
        asyncio.run(load.run(rate, 2.0))
        load.waits.clear()
        asyncio.run(load.run(rate, seconds))
    added = sorted(wait * 1000 - setting.step_ms for wait in load.waits)
    return {
        "measurement": "latency",
        "requests_s": rate,
        "requests": len(added),
        "added_ms_p50": round(statistics.median(added), 1),
        "added_ms_p99": round(added[int(len(added) * 0.99)], 1),
        "added_ms_max": round(added[-1], 1),
        **setting.describe(),
    }


def _body(setting: Setting) -> Line:
    return {
        "kind": "completion",
        "prompt": "Once upon a time",
        "max_tokens": setting.tokens,
        "ignore_eos": True,
    }


class _Load:
    """An open-loop client: requests start when they are due, whether or not earlier ones are done."""

    def __init__(self, setting: Setting) -> None:
        self._port = setting.port
        body = _body(setting) | {"stream": True}
        del body["kind"]
        payload = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n"
        )
        self._request = head.encode() + payload
        self.waits: list[float] = []
        """Seconds from sending each request to its first token."""

    async def run(self, rate: float, seconds: float) -> None:
        due, chance = 0.0, random.Random(0)
        start = time.perf_counter()
        tasks = []
        while due < seconds:
            due += chance.expovariate(rate)
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            tasks.append(asyncio.create_task(self._one()))
        await asyncio.gather(*tasks)

    async def _one(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        sent = time.perf_counter()
        writer.write(self._request)
        status = await reader.readline()
        if b" 200 " not in status:
            raise EngineError(f"bench: the service answered {status.decode(errors='replace').strip()}")
        first = False
        async for line in reader:
            if not first and line.startswith(b"data: {"):
                self.waits.append(time.perf_counter() - sent)
                first = True
            if line.startswith(b"data: [DONE]"):
                break
        writer.close()


@contextmanager
def _redis() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="wicore-") as folder, EmbeddedValkey(folder) as valkey:
        yield valkey.url


@contextmanager
def _process(setting: Setting, url: str, module: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("WICORE_")}
    environ |= {
        "WICORE_REDIS__URL": url,
        "WICORE_MODEL__PATH": setting.model,
        "WICORE_API__PORT": str(setting.port),
        "WICORE_ENGINE__KIND": "null",
        "WICORE_ENGINE__NULL_STEP_MS": str(setting.step_ms),
        "WICORE_SCHEDULER__MAX_BATCH": str(setting.slots),
        "WICORE_TELEMETRY__LOG_LEVEL": "warning",
    }
    command: Sequence[str] = (sys.executable, "-m", module, *arguments)
    process = subprocess.Popen(command, env=environ)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _wait_ready(setting: Setting) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        try:
            if httpx.get(f"http://127.0.0.1:{setting.port}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise EngineError(f"bench: the service was not ready within {_START_S:.0f} s")
