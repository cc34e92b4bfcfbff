"""What a thousand websockets cost: `python -m benchmarks.sockets`, one JSON line a measurement.

One API process; every socket follows a job of its own, to which this process, in a worker's place, publishes
tokens through the real scripts. A token's text is the time at which it was handed over, so that a listener,
in a process of its own, knows how long it took. First with the streams alone, then with clients beside them
that connect and leave; last, what a client sees while others send requests that never end. Everything, the
load too, shares two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import httpx
import psutil
import redis

from wicore.bench.processes import GUNICORN, Line, Setting, embedded_redis, service_process
from wicore.config import QueueSettings
from wicore.queue.connection import connect
from wicore.queue.consumer import Delivery, LeaseConsumer
from wicore.queue.producer import Producer
from wicore.request import Priority, parse_job, started_event, terminal_event, token_event
from wicore.stream.publisher import Publisher

SETTINGS = QueueSettings(lease_s=3600)
TICK_S = 0.01
CONNECTING = 50
"""Handshakes under way at once while the streams are opened."""
HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
CLOSE = b"\x88\x80\x00\x00\x00\x00"


# --- the listener's process -----------------------------------------------------------------------


@dataclass
class Heard:
    """What the listeners found; times in ms."""

    connects_s: float = 0.0
    """Streams a second that were opened, up to their first event."""
    first: list[float] = field(default_factory=list)
    """How long the first token of each stream took."""
    later: list[float] = field(default_factory=list)
    whole: int = 0
    """Streams that had every number once and ended well."""
    visits: list[float] = field(default_factory=list)
    """How long each client that came and went took to be let in."""
    refused: int = 0
    """Of these, who was not."""


async def _open(port: int, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HANDSHAKE.format(path=path).encode())
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 101"):
        raise ConnectionError(head)
    return reader, writer


async def _frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    first, length = await reader.readexactly(2)
    if length == 126:
        length = int.from_bytes(await reader.readexactly(2), "big")
    return first & 15, await reader.readexactly(length)


async def _follow(reader: asyncio.StreamReader, heard: Heard) -> None:
    tokens, seq, kind = 0, 1, ""
    while True:
        opcode, payload = await _frame(reader)
        if opcode == 8:
            break
        if opcode != 1:
            continue
        event = json.loads(payload)
        gap, seq, kind = event["seq"] != seq + 1, event["seq"], event["type"]
        if gap:
            return
        if kind == "token":
            took = (time.monotonic_ns() - int(event["text"])) / 1e6
            (heard.later if tokens else heard.first).append(took)
            tokens += 1
    heard.whole += kind == "done"


async def _visit(port: int, heard: Heard) -> None:
    began = time.monotonic()
    try:
        _, writer = await asyncio.wait_for(_open(port, "/v1/stream"), 10)
        heard.visits.append((time.monotonic() - began) * 1000)
        writer.write(CLOSE)
        writer.close()
    except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
        heard.refused += 1


async def _listen(port: int, jobs: Sequence[str], visits_s: float, pipe: Connection) -> Heard:
    heard, gate = Heard(), asyncio.Semaphore(CONNECTING)

    async def opened(job: str) -> asyncio.StreamReader:
        async with gate:
            reader, writer = await _open(port, f"/v1/jobs/{job}/stream")
            writers.append(writer)
            await _frame(reader)  # `started`: from here on it is followed live
            return reader

    writers: list[asyncio.StreamWriter] = []
    began = time.monotonic()
    readers = await asyncio.gather(*map(opened, jobs))
    heard.connects_s = len(jobs) / (time.monotonic() - began)
    streams = asyncio.gather(*(_follow(reader, heard) for reader in readers))
    pipe.send("listening")
    visitors: list[asyncio.Task[None]] = []
    began = time.monotonic()
    while visits_s and not streams.done():
        while len(visitors) < (time.monotonic() - began) * visits_s:
            visitors.append(asyncio.create_task(_visit(port, heard)))
        await asyncio.sleep(TICK_S)
    await asyncio.gather(streams, *visitors)
    return heard


async def _drip(port: int, count: int, seconds: float) -> int:
    """Keep so many requests begun, a byte a second, and end none; how many the server closed."""
    until, closed = time.monotonic() + seconds, 0

    async def one() -> None:
        nonlocal closed
        while time.monotonic() < until:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /health HTTP/1.1\r\nX: ")
                ended = asyncio.ensure_future(reader.read(1))
                while not ended.done() and time.monotonic() < until:
                    writer.write(b"a")
                    await asyncio.wait({ended}, timeout=1)
                ended.cancel()
                writer.close()
            except OSError:
                await asyncio.sleep(0.1)
            closed += time.monotonic() < until

    await asyncio.gather(*(one() for _ in range(count)))
    return closed


def dripper(port: int, count: int, seconds: float, pipe: Connection) -> None:
    pipe.send(asyncio.run(_drip(port, count, seconds)))


def listener(port: int, jobs: Sequence[str], visits_s: float, pipe: Connection) -> None:
    pipe.send(asyncio.run(_listen(port, jobs, visits_s, pipe)))


# --- the worker's place ---------------------------------------------------------------------------


def lease_jobs(client: redis.Redis, count: int) -> list[Delivery]:
    """So many jobs, submitted and leased here."""
    producer = Producer(client, settings=SETTINGS)
    body = parse_job({"kind": "completion", "prompt": "Once"})
    for _ in range(count):
        producer.submit(body, Priority.INTERACTIVE)
    consumer = LeaseConsumer(client, "bench", settings=SETTINGS)
    deliveries = consumer.pop(count)
    consumer.close()
    return deliveries


def talk(publisher: Publisher, deliveries: Sequence[Delivery], tokens_s: float, seconds: float) -> int:
    """Publish steadily, the jobs in turn, then end them all; how many tokens."""
    said = 0
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < seconds:
        while said < elapsed * tokens_s:
            turn, index = divmod(said, len(deliveries))
            job = deliveries[index].job_id
            publisher.publish(
                deliveries[index], [token_event(job, 2 + turn, 0, str(time.monotonic_ns()), [7])]
            )
            said += 1
        time.sleep(TICK_S)
    for index, delivery in enumerate(deliveries):
        turns = said // len(deliveries) + (index < said % len(deliveries))
        publisher.finish(
            delivery, terminal_event(delivery.job_id, 2 + turns, "done", finish_reason="stop"), {}
        )
    return said


# --- the measurement ------------------------------------------------------------------------------


def measure(setting: Setting, sockets: int, tokens_s: float, seconds: float, visits_s: float) -> Line:
    """`visits_s`: clients that connect and leave, a second."""
    with ExitStack() as stack:
        url = stack.enter_context(embedded_redis())
        api = stack.enter_context(service_process(setting, url, "gunicorn", *GUNICORN, api__max_sockets=4000))
        served_by = _serving(setting, api)
        client = stack.enter_context(connect(url))
        deliveries = lease_jobs(client, sockets)
        publisher = Publisher(
            client, settings=SETTINGS, on_lost=lambda delivery: None, on_cancel=lambda delivery: None
        )
        publisher.start()
        for delivery in deliveries:
            publisher.publish(delivery, [started_event(delivery.job_id, 1, 1)])
        before = served_by.memory_info().rss
        fresh = multiprocessing.get_context("spawn")  # a fork would have the publisher's locks
        ours, theirs = fresh.Pipe()
        jobs = [delivery.job_id for delivery in deliveries]
        crowd = fresh.Process(target=listener, args=(setting.port, jobs, visits_s, theirs))
        crowd.start()
        assert ours.recv() == "listening"
        opened, used = served_by.memory_info().rss, served_by.cpu_times()
        said = talk(publisher, deliveries, tokens_s, seconds)
        heard: Heard = ours.recv()
        after, used_then = served_by.memory_info().rss, served_by.cpu_times()
        crowd.join()
        publisher.stop()
    cpu_s = used_then.user + used_then.system - used.user - used.system
    return {
        "measurement": "websockets" + (", others coming and going" if visits_s else ""),
        "sockets": sockets,
        "tokens_s": round(said / seconds),
        "whole_streams": heard.whole,
        "first_ms": _spread(heard.first),
        "token_ms": _spread(heard.later),
        "api_cpu_us_a_token": round(cpu_s * 1e6 / said, 1),
        "api_mib": {"idle": _mib(before), "sockets_open": _mib(opened), "after": _mib(after)},
        "handshakes_s": round(heard.connects_s),
        **(
            {
                "connects_a_minute": round(60 * len(heard.visits) / seconds),
                "connect_ms": _spread(heard.visits),
                "connects_refused": heard.refused,
            }
            if visits_s
            else {}
        ),
        **setting.describe(),
    }


def besieged(setting: Setting, count: int, seconds: float) -> Line:
    """What a client in earnest sees while so many send requests that never end."""
    with ExitStack() as stack:
        url = stack.enter_context(embedded_redis())
        api = stack.enter_context(service_process(setting, url, "gunicorn", *GUNICORN))
        served_by = _serving(setting, api)
        before = served_by.memory_info().rss
        fresh = multiprocessing.get_context("spawn")
        ours, theirs = fresh.Pipe()
        crowd = fresh.Process(target=dripper, args=(setting.port, count, seconds, theirs))
        crowd.start()
        took, unanswered, most = [], 0, before
        while not ours.poll(0.1):
            began = time.monotonic()
            try:
                httpx.get(f"http://127.0.0.1:{setting.port}/health", timeout=5).raise_for_status()
                took.append((time.monotonic() - began) * 1000)
            except httpx.HTTPError:
                unanswered += 1
            most = max(most, served_by.memory_info().rss)
        closed = ours.recv()
        crowd.join()
    return {
        "measurement": "requests that never end",
        "connections": count,
        "closed": closed,
        "health_ms": _spread(took),
        "health_unanswered": unanswered,
        "api_mib": {"idle": _mib(before), "most": _mib(most)},
        **setting.describe(),
    }


def _serving(setting: Setting, api: subprocess.Popen[bytes]) -> psutil.Process:
    """Gunicorn's one worker, once it answers."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            httpx.get(f"http://127.0.0.1:{setting.port}/health").raise_for_status()
            (worker,) = psutil.Process(api.pid).children()
            return worker
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the API did not start")


def _spread(times: Sequence[float]) -> dict[str, float]:
    if len(times) < 2:
        return {}
    hundredths = statistics.quantiles(times, n=100, method="inclusive")
    return {"median": round(hundredths[49], 1), "p99": round(hundredths[98], 1), "max": round(max(times), 1)}


def _mib(size: int) -> int:
    return round(size / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tests/fixtures/tiny", help="model.path; its tokenizer is loaded")
    parser.add_argument("--port", type=int, default=8099)
    parser.add_argument("--sockets", type=int, default=1000)
    parser.add_argument("--tokens-s", type=float, default=4000, help="of all streams together")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--connects-a-minute", type=float, default=10_000, help="0: the streams alone")
    parser.add_argument("--slow-requests", type=int, default=3000, help="begun at once, never ended; 0: none")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    setting = Setting(args.model, port=args.port)
    for visits_s in sorted({0.0, args.connects_a_minute / 60}):
        print(json.dumps(measure(setting, args.sockets, args.tokens_s, args.seconds, visits_s)), flush=True)
    if args.slow_requests:
        print(json.dumps(besieged(setting, args.slow_requests, args.seconds)), flush=True)


if __name__ == "__main__":
    main()
