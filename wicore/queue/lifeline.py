"""Noticing a dead worker sooner than its leases run out.

Each worker keeps a connection open, its lifeline, and announces it in its heartbeat. The kernel closes it
when the process dies, however it dies; the others see that the server no longer lists it, and let the
worker's leases expire at once (abandon.lua). A worker that hangs keeps its lifeline: its leases decide.
Presuming a live worker dead is safe, as every write is fenced, and costs its jobs an attempt.
"""

from __future__ import annotations

import json
import logging
import select
import socket
import time
from collections.abc import Mapping
from typing import Any

import redis
from redis.exceptions import ResponseError

from wicore.queue.connection import dedicated_connection, is_outage
from wicore.queue.schema import Keys
from wicore.queue.scripts import Scripts

log = logging.getLogger(__name__)

_ANSWER_S = 5.0
_APART_S = 0.9
"""Least time between two looks: a worker whose connection was merely cut announces a new one meanwhile."""


class Lifeline:
    """This worker's lifeline. One thread uses it; `interrupt` is for any."""

    def __init__(self, client: redis.Redis, owner: str) -> None:
        self._client = client
        self._owner = owner
        self._connection: Any = None
        self._permitted = True
        self._wake_out, self._wake_in = socket.socketpair()
        self.announcement: str | None = None
        """`server:connection`, by run id and client id; None without a lifeline."""

    def hold(self) -> None:
        """Connect, or make sure that the connection still answers.

        Raises redis.RedisError or OSError when it does not; where the server forbids CLIENT or INFO there
        is none, and that is logged once.
        """
        if not self._permitted:
            return
        try:
            if self._connection is None:
                self._connect()
            else:
                self._ask("PING")
        except ResponseError as err:
            self._drop()
            if is_outage(err):
                raise
            self._permitted = False
            log.info("%s: without a lifeline, leases alone decide: %s", self._owner, err)
        except (redis.RedisError, OSError):
            self._drop()
            raise

    def wait(self, timeout: float) -> None:
        """Return after `timeout` seconds, when the lifeline breaks, or when interrupted."""
        sockets = [self._wake_out]
        if self._connection is not None:
            sockets.append(self._connection._sock)
        ready, _, _ = select.select(sockets, [], [], timeout)
        if any(sock is not self._wake_out for sock in ready):
            self._drop()  # nothing comes unasked, so this is the end of it

    def interrupt(self) -> None:
        """Make this and every later `wait` return at once."""
        self._wake_in.send(b"!")

    def close(self) -> None:
        self._drop()
        self._wake_out.close()
        self._wake_in.close()

    def _connect(self) -> None:
        self._connection = dedicated_connection(self._client)
        self._ask("CLIENT", "SETNAME", f"wicore-worker:{self._owner}")
        lines = self._ask("INFO", "server").decode().splitlines()
        server = next(line for line in lines if line.startswith("run_id:")).partition(":")[2]
        self.announcement = f"{server}:{self._ask('CLIENT', 'ID')}"

    def _ask(self, *command: str) -> Any:
        self._connection.send_command(*command, check_health=False)
        if not self._connection.can_read(timeout=_ANSWER_S):
            raise redis.TimeoutError(f"no answer to {command[0]} within {_ANSWER_S:g} s")
        return self._connection.read_response(disable_decoding=True)

    def _drop(self) -> None:
        self.announcement = None
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None


class DeathWatch:
    """What each worker looks for among the others. Not thread-safe."""

    def __init__(self, client: redis.Redis, scripts: Scripts, owner: str, keys: Keys) -> None:
        self._client = client
        self._scripts = scripts
        self._owner = owner
        self._key = keys.workers
        self._missing: dict[str, str] = {}
        """Workers whose lifeline was gone at the last look, with their announcement then."""
        self._next = 0.0
        self._permitted = True

    def look(self) -> list[str]:
        """Abandon the leases of every worker whose lifeline was gone at the last look, too; their names.

        Looks about once a second, however often it is called. Lifelines announced to another server (before
        a restart or failover) say nothing, nor does anything as long as our own is not seen, say through a
        proxy. Raises redis.RedisError.
        """
        if not self._permitted or time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + _APART_S
        try:
            missing = self._find_missing()
        except ResponseError as err:
            if is_outage(err):
                raise
            self._permitted = False
            log.info("%s: cannot look for dead workers, leases alone decide: %s", self._owner, err)
            return []
        dead = [worker for worker, said in missing.items() if self._missing.get(worker) == said]
        self._missing = missing
        for worker in dead:
            jobs = self._scripts.call("abandon", worker, missing[worker])
            if jobs is not None:
                log.warning("%s: %s is dead; its %d jobs go to others", self._owner, worker, jobs)
        return dead

    def reset(self) -> None:
        """Forget the last look: we were cut off ourselves."""
        self._missing = {}

    def _find_missing(self) -> dict[str, str]:
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hgetall(self._key)
            pipe.info("server")
            workers, server = pipe.execute()
        announced = _announcements(workers, server["run_id"])
        if self._owner not in announced or len(announced) < 2:
            return {}
        ids = {worker: said.rpartition(":")[2] for worker, said in announced.items()}
        listed = {str(entry["id"]) for entry in self._client.client_list(client_id=list(ids.values()))}
        if ids[self._owner] not in listed:
            return {}
        return {worker: said for worker, said in announced.items() if ids[worker] not in listed}


def _announcements(workers: Mapping[bytes, bytes], server: str) -> dict[str, str]:
    """Of those announced to this server, by worker."""
    said = {worker.decode(): json.loads(entry).get("lifeline") for worker, entry in workers.items()}
    return {worker: line for worker, line in said.items() if line and line.startswith(f"{server}:")}
