"""Who works: each worker's heartbeat in one hash.

A worker is alive while its last heartbeat, by Redis TIME, is less than three of its periods old; it writes
one more often than that, so that who watches sees it move. A
stopping worker takes its entry away; what a crash leaves is taken by who sees the worker's lifeline gone
(lifeline.py), or swept after an hour by whoever reads.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

import redis

from wicore.queue.connection import unavailable_on_failure
from wicore.queue.lifeline import Lifeline
from wicore.queue.schema import ALIVE_PERIODS, Keys

log = logging.getLogger(__name__)

_FORGET_MS = 3_600_000
_RETRY_S = 0.5
_WRITE_S = 1.0
"""Longest time between two heartbeats; a period is what a reader may rely on."""


class Heartbeat:
    """Thread that holds this worker's lifeline and writes what `status()` says of it, through any outage.

    It writes every second, or every `period_s` if that is shorter, and at once when the lifeline had to be
    made anew.
    """

    def __init__(
        self,
        client: redis.Redis,
        worker: str,
        status: Callable[[], Mapping[str, Any]],
        prefix: str = "wicore",
        period_s: float = 5.0,
    ) -> None:
        """`worker` is its owner name. `status` gives JSON values and is called from the thread."""
        self._client = client
        self._key = Keys(prefix).workers
        self._worker = worker
        self._status = status
        self._period_s = period_s
        self._started_ms = 0
        self._lifeline = Lifeline(client, worker)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and take the entry away; when Redis is away that is left to the sweep."""
        self._stop.set()
        self._lifeline.interrupt()
        if self._thread.ident is not None:
            self._thread.join()
        try:
            self._client.hdel(self._key, self._worker)
        except redis.RedisError as err:
            log.warning("%s: could not sign off: %s", self._worker, err)
        self._lifeline.close()

    def _run(self) -> None:
        failing = False
        while not self._stop.is_set():
            try:
                self._lifeline.hold()
                self._beat()
                failing = False
            except (redis.RedisError, OSError) as err:
                if not failing:
                    log.warning("%s: no heartbeat: %s", self._worker, err)
                failing = True
            self._lifeline.wait(min(_RETRY_S if failing else _WRITE_S, self._period_s))

    def _beat(self) -> None:
        now = _now_ms(self._client)
        self._started_ms = self._started_ms or now
        entry = {
            **self._status(),
            "worker": self._worker,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_ms": self._started_ms,
            "at_ms": now,
            "period_s": self._period_s,
            "lifeline": self._lifeline.announcement,
        }
        self._client.hset(self._key, self._worker, json.dumps(entry))


def alive_workers(client: redis.Redis, prefix: str = "wicore") -> list[dict[str, Any]]:
    """The heartbeats of the workers alive now, by name. Raises Unavailable.

    Besides what the worker's `status` gave: worker, host, pid, started_ms, at_ms, period_s, lifeline;
    and `age_s`, how long ago it was written.
    """
    key = Keys(prefix).workers
    alive = []
    with unavailable_on_failure(client):
        now = _now_ms(client)
        for worker, text in sorted(client.hgetall(key).items()):
            entry = json.loads(text)
            age = now - entry["at_ms"]
            if age < ALIVE_PERIODS * entry["period_s"] * 1000:
                alive.append({**entry, "age_s": age / 1000})
            elif age > _FORGET_MS:
                client.hdel(key, worker)
    return alive


def _now_ms(client: redis.Redis) -> int:
    seconds, micros = client.time()
    return seconds * 1000 + micros // 1000
