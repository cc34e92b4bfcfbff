"""One POST to a stranger's server: bounded in time, to a public address only, following nothing.

httpcore itself, not httpx: it reads no proxy from the environment, follows no redirect, and lets the address
that is connected to be the one that was checked, so that a name cannot mean another one a moment later.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from ssl import SSLContext
from typing import Any

import httpcore

from wicore.webhooks.message import is_public

_LONGEST_RETRY_AFTER_S = 86_400.0


class PostError(Exception):
    """There was no answer. `final`: there never will be one, so it need not be tried again."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    retry_after_s: float | None
    """What the server asked for, at most a day."""


def post(
    url: str, headers: Mapping[str, str], body: bytes, *, allow_private: bool, timeout_s: float = 10.0
) -> Answer:
    """Send `body` as JSON; all of it, from the first connection to the answer's head, within `timeout_s`.

    What the server says beyond its head is not read. The look-up of the name is not bounded.
    Raises PostError.
    """
    fields = [("content-type", "application/json"), ("user-agent", "wicore"), *headers.items()]
    backend = _Backend(time.monotonic() + timeout_s, allow_private)
    timeouts = dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)
    try:
        with (
            httpcore.ConnectionPool(network_backend=backend) as pool,
            pool.stream(
                "POST", url, headers=fields, content=body, extensions={"timeout": timeouts}
            ) as response,
        ):
            return Answer(response.status, _retry_after_s(response.headers))
    except httpcore.TimeoutException:
        raise PostError(f"no answer within {timeout_s:g} s") from None
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol) as err:
        raise PostError(f"no answer: {err or type(err).__name__}") from None


class _Backend(httpcore.NetworkBackend):
    """Connects to addresses that it has looked up and checked itself, until a deadline."""

    def __init__(self, deadline: float, allow_private: bool) -> None:
        self._deadline = deadline
        self._allow_private = allow_private
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in self._addresses(host, port):
            try:
                stream = self._sockets.connect_tcp(
                    address, port, _left(self._deadline, timeout), local_address, socket_options
                )
                return _Stream(stream, self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as err:
                failure = err
        raise failure

    def _addresses(self, host: str, port: int) -> list[str]:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as err:
            raise httpcore.ConnectError(f"{host}: {err}") from None
        addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        allowed = [address for address in addresses if self._allow_private or is_public(address)]
        if addresses and not allowed:
            raise PostError(
                f"{host} is {', '.join(addresses)}, not a public address; webhooks.allow_private allows it",
                final=True,
            )
        return allowed


class _Stream(httpcore.NetworkStream):
    """A stream whose reads and writes all end at one deadline: a byte now and then does not keep it open."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline, timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline, timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        secure = self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline, timeout))
        return _Stream(secure, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(deadline: float, timeout: float | None) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout
    return left if timeout is None else min(left, timeout)


def _retry_after_s(headers: Iterable[tuple[bytes, bytes]]) -> float | None:
    """Seconds, from a number of them or a date; None when it says nothing readable."""
    text = next((value.decode("latin-1") for name, value in headers if name.lower() == b"retry-after"), "")
    if text.isascii() and text.isdigit():
        seconds = float(text[:9])
    else:
        try:
            at = parsedate_to_datetime(text)
        except (ValueError, TypeError):
            return None
        at = at if at.tzinfo else at.replace(tzinfo=timezone.utc)
        seconds = (at - datetime.now(timezone.utc)).total_seconds()
    return min(max(0.0, seconds), _LONGEST_RETRY_AFTER_S)
