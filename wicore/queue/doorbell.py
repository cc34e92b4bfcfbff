"""Waiting for messages without polling."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterable
from typing import Any

import redis

from wicore.queue.connection import dedicated_connection


class Doorbell:
    """Tells when one of several lists has something in it, without polling and without taking it.

    `BLMOVE list list RIGHT RIGHT` blocks until the list has an element and then moves its last element to
    where it was: one atomic command that changes nothing, so that no crash can lose a message. One
    connection a list stays blocked in it; `select` waits for all. Not thread-safe but for `interrupt`.
    """

    _BLOCK_S = 10.0
    """How long the server blocks before it answers "nothing" and is asked anew: finds dead connections."""

    def __init__(self, client: redis.Redis, lists: Iterable[str]) -> None:
        self._client = client
        self._lists = list(lists)
        self._pending: dict[str, tuple[Any, float]] = {}
        """By list: the connection blocked in BLMOVE, and when it should have answered at the latest."""
        self._idle: dict[str, Any] = {}
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)

    def wait(self, timeout: float, ignored: Iterable[str] = ()) -> bool:
        """True when a list that is not ignored may have something. Raises redis.ConnectionError."""
        lists = [name for name in self._lists if name not in set(ignored)]
        end = time.monotonic() + timeout
        try:
            while True:
                for name in lists:
                    self._ask(name)
                now = time.monotonic()
                waiting = {self._pending[name][0]._sock: name for name in lists}
                soonest = min(self._pending[name][1] for name in lists)
                left = max(0.0, min(end, soonest) - now)
                ready, _, _ = select.select([self._wake_out, *waiting], [], [], left)
                # An answer may have lain here since the last `wait`: late is only what has not come.
                if not ready and soonest <= time.monotonic():
                    raise redis.ConnectionError("no answer to a blocking read")
                if self._wake_out in ready:
                    self._drain()
                    return False
                answers = [
                    self._answer(waiting[sock]) for sock in ready
                ]  # all of them: no reply stays unread
                if any(answers):
                    return True
                if not ready and time.monotonic() >= end:
                    return False
        except BaseException:
            self._disconnect()
            raise

    def interrupt(self) -> None:
        try:
            self._wake_in.send(b"!")
        except BlockingIOError:  # full of wake-ups already
            pass

    def close(self) -> None:
        self._disconnect()
        self._wake_out.close()
        self._wake_in.close()

    def _ask(self, name: str) -> None:
        if name in self._pending:
            return
        connection = self._idle.pop(name, None) or dedicated_connection(self._client)
        connection.send_command("BLMOVE", name, name, "RIGHT", "RIGHT", self._BLOCK_S, check_health=False)
        self._pending[name] = (connection, time.monotonic() + 2 * self._BLOCK_S)

    def _answer(self, name: str) -> bool:
        connection, _ = self._pending.pop(name)
        self._idle[name] = connection
        return connection.read_response(disable_decoding=True) is not None

    def _drain(self) -> None:
        try:
            while self._wake_out.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _disconnect(self) -> None:
        for connection in [*self._idle.values(), *(connection for connection, _ in self._pending.values())]:
            connection.disconnect()
        self._idle.clear()
        self._pending.clear()
