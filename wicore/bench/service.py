"""`wicore bench service`: what the service adds around an engine.

The null engine computes nothing and takes a fixed time a step, so the best any service could do is known:
`slots / (tokens * step)` jobs a second when saturated, and one step until the first token when not.
Queue, worker and API are the real processes; the load comes from this one, on the same cores.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from contextlib import ExitStack

from wicore.bench.processes import GUNICORN, Line, Setting, embedded_redis, service_process, wait_ready
from wicore.errors import EngineError
from wicore.queue.connection import connect
from wicore.queue.producer import JobRecord, Producer
from wicore.queue.registry import alive_workers
from wicore.request import Priority, parse_job
from wicore.stream.relay import Relay


def saturated(setting: Setting, jobs: int, module: str = "workers.gpu") -> Line:
    """Jobs a second with the queue never empty, from the middle 80 % of the jobs' ends.

    `module` is the worker's.
    """
    with embedded_redis() as url:
        client = connect(url)
        producer = Producer(client)
        body = _body(setting)
        ids = [producer.submit(parse_job(body), Priority.NORMAL).id for _ in range(jobs)]
        with service_process(setting, url, module) as worker:
            relay = Relay(connect(url))
            for job in ids:
                for _ in relay.follow(job, idle_s=1.0):
                    if worker.poll() is not None:
                        raise EngineError(f"bench: the worker ended with exit code {worker.returncode}")
            relay.close()
            [figures] = alive_workers(client)
        ends = sorted(record.finished_ms or 0 for record in map(producer.record, ids))
    middle = ends[jobs // 10 : -jobs // 10]
    rate = (len(middle) - 1) * 1000 / (middle[-1] - middle[0])
    return {
        "measurement": "saturated",
        "jobs": jobs,
        "jobs_s": round(rate, 1),
        "ideal_jobs_s": round(setting.ideal_jobs_s, 1),
        "share_of_ideal": round(rate / setting.ideal_jobs_s, 3),
        "between_steps_ms": figures.get("between_ms"),
        **setting.describe(),
    }


def latency(setting: Setting, rate: float, seconds: float) -> Line:
    """Time to the first token through HTTP, less the engine's step, at Poisson arrivals."""
    with embedded_redis() as url, ExitStack() as stack:
        stack.enter_context(service_process(setting, url, "workers.gpu"))
        stack.enter_context(service_process(setting, url, "gunicorn", *GUNICORN))
        wait_ready(setting)
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


def estimates(setting: Setting, jobs: int) -> Line:
    """How far the wait told at acceptance is from the wait that came, under half as much load again as fits.

    Three clients send jobs of 5 to 155 tokens, one of them half of all; some say how much they may take,
    the others let the service guess. Only waits over a second count.
    """
    chance = random.Random(0)
    ideal_tokens_s = setting.slots * 1000 / setting.step_ms
    with embedded_redis() as url, service_process(setting, url, "workers.gpu"):
        client = connect(url)
        producer = Producer(client)
        while not alive_workers(client):
            time.sleep(0.05)
        start, due = time.monotonic(), 0.0
        ids = []
        for _ in range(jobs):
            tokens = chance.randint(5, 155)
            body = parse_job(_body(setting) | {"max_tokens": tokens})
            due += tokens / (1.5 * ideal_tokens_s)
            time.sleep(max(0.0, start + due - time.monotonic()))
            name = chance.choice(("a", "a", "b", "c"))
            prompt = 5 if chance.random() < 0.5 else None
            ids.append(producer.submit(body, Priority.NORMAL, client=name, prompt_tokens=prompt).id)
        relay = Relay(connect(url))
        for job in ids:
            for _ in relay.follow(job):
                pass
        relay.close()
        records = [producer.record(job) for job in ids]
    waits = [(record.estimated_wait_s, _waited_s(record)) for record in records]
    known = [(told, came) for told, came in waits if told is not None and came > 1.0]
    errors = sorted(abs(told - came) / came for told, came in known)
    return {
        "measurement": "estimated wait",
        "jobs": jobs,
        "jobs_that_waited_over_1_s": len(known),
        "longest_wait_s": round(max(came for _, came in known), 1),
        "median_of_told_over_came": round(statistics.median(told / came for told, came in known), 2),
        "error_median": round(statistics.median(errors), 2),
        "error_p90": round(errors[int(len(errors) * 0.9)], 2),
        **setting.describe(),
    }


def _waited_s(record: JobRecord) -> float:
    assert record.started_ms is not None
    return (record.started_ms - record.created_ms) / 1000


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
