"""Gunicorn's gevent worker, made to bear clients that are slow on purpose.

A connection costs little, but there is a bound to them, and who holds many open without ever finishing a
request (slowloris, slow bodies) would keep others out. So a request's head must come within `keepalive` s
and its body at a least rate; and of the connections that wait for a head only so many are kept: the one that
has waited longest is closed for a new one, and a client in earnest hardly ever is that one.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from gevent import Timeout, getcurrent
from gunicorn.workers.ggevent import GeventWorker
from werkzeug.exceptions import RequestTimeout

HEADS = 1000
"""Connections that may wait for a request's head: those that are idle are among them."""
BODY_GRACE_S = 10.0
BODY_BYTES_A_SECOND = 8192
"""A body may take so long, and a second more for every so many bytes that have come."""


class Worker(GeventWorker):  # type: ignore[misc]
    """As gunicorn's, with the bounds above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sockets: dict[Any, Any] = {}
        """By the greenlet that serves it."""
        self._waiting: dict[Any, None] = {}
        """Greenlets that wait for a head, the one that has waited longest first."""

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        greenlet = getcurrent()
        self._sockets[greenlet] = client
        try:
            super().handle(listener, client, addr)
        finally:
            del self._sockets[greenlet]

    @contextmanager
    def timeout_ctx(self) -> Iterator[None]:
        """What gunicorn reads each head in."""
        if len(self._waiting) >= HEADS:
            self._dismiss(next(iter(self._waiting)))
        greenlet = getcurrent()
        self._waiting[greenlet] = None
        try:
            with Timeout(self.cfg.keepalive, False):
                yield
        finally:
            self._waiting.pop(greenlet, None)

    def _dismiss(self, greenlet: Any) -> None:
        """End a connection as if its client had. Not by gevent's own `shutdown`: that would raise in who
        reads, which gunicorn logs with its stack, once for every connection of an attack."""
        del self._waiting[greenlet]
        with suppress(OSError):  # gone already
            self._sockets[greenlet]._sock.shutdown(socket.SHUT_RDWR)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        reader = getattr(req, "unreader", None)
        if reader is None:
            return super().handle_request(listener_name, req, sock, addr)
        reader.sock = PacedSocket(sock)
        try:
            return super().handle_request(listener_name, req, sock, addr)
        finally:
            reader.sock = sock


class PacedSocket:
    """A connection from which a body is read: raises RequestTimeout when that comes too slowly."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._deadline: float | None = None

    def recv(self, size: int) -> bytes:
        # From the first read: until then it is not the client that is slow.
        self._deadline = self._deadline or time.monotonic() + BODY_GRACE_S
        left = self._deadline - time.monotonic()
        too_slow = RequestTimeout(
            f"body: came too slowly, under {BODY_BYTES_A_SECOND} bytes a second after {BODY_GRACE_S:g} s"
        )
        if left <= 0:  # though some may be there by now
            raise too_slow
        with Timeout(left, too_slow):
            data: bytes = self._sock.recv(size)
        self._deadline += len(data) / BODY_BYTES_A_SECOND
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)
