"""Who works: each worker's heartbeat in one hash.

A worker is alive while its last heartbeat, by Redis TIME, is less than three of its periods old. A
stopping worker takes its entry away; what a crash leaves is swept after an hour by whoever reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import cast

import redis

from wicore.queue.connection import unavailable_on_failure
from wicore.queue.schema import Keys

ALIVE_PERIODS = 3
_FORGET_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a worker says of itself."""

    worker: str
    """Its owner name."""
    host: str
    pid: int
    engine: str
    device: str
    model: str
    slots: int
    """Sequences it can run together."""
    running: int
    kv_blocks: int
    kv_used: int
    tokens_per_s: float
    """Generated, over the last period."""
    jobs_done: int
    """Since it started."""
    started_ms: int
    period_s: float = 5.0


def beat(client: redis.Redis, heartbeat: Heartbeat, prefix: str = "wicore") -> None:
    """Write a heartbeat. Raises Unavailable."""
    with unavailable_on_failure(client):
        entry = {**asdict(heartbeat), "at_ms": _now_ms(client)}
        client.hset(Keys(prefix).workers, heartbeat.worker, json.dumps(entry))


def leave(client: redis.Redis, worker: str, prefix: str = "wicore") -> None:
    """Take a stopping worker's entry away. Raises Unavailable."""
    with unavailable_on_failure(client):
        client.hdel(Keys(prefix).workers, worker)


def alive_workers(client: redis.Redis, prefix: str = "wicore") -> list[Heartbeat]:
    """The workers alive now, by name. Raises Unavailable."""
    key = Keys(prefix).workers
    names = {field.name for field in fields(Heartbeat)}
    alive = []
    with unavailable_on_failure(client):
        now = _now_ms(client)
        for worker, text in sorted(cast("dict[bytes, bytes]", client.hgetall(key)).items()):
            entry = json.loads(text)
            age = now - entry["at_ms"]
            if age < ALIVE_PERIODS * entry["period_s"] * 1000:
                alive.append(Heartbeat(**{name: entry[name] for name in names}))
            elif age > _FORGET_MS:
                client.hdel(key, worker)
    return alive


def _now_ms(client: redis.Redis) -> int:
    seconds, micros = cast("tuple[int, int]", cast(Callable[[], object], client.time)())
    return seconds * 1000 + micros // 1000
