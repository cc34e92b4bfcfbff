"""Connecting to Redis, and saying so when it cannot be reached.

Replies stay bytes (`decode_responses` off): a message from another client may hold any bytes, and events
pass through unread. Whoever reads a text decodes it where it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.retry import Retry

from wicore.errors import ConfigError, Unavailable
from wicore.queue import sentinel


def connect(url: str, *, timeout: float = 5.0, max_connections: int = 100) -> redis.Redis:
    """A client for `redis://`, `rediss://`, `unix://` or, following the master that Sentinel names,
    `sentinel://` (its form is in sentinel.py); user and password in the URL; not yet connected.

    Commands that fail for want of a connection are tried twice more within a second, then raise; one
    that is not answered in time raises at once. That can run a command twice: everything here that writes
    is safe to repeat. Connecting and answering may take `timeout` seconds each; idle connections are
    checked every 15 s before use. Who finds all `max_connections` in use waits for one, up to `timeout`.
    Raises ConfigError for a URL that cannot be read.
    """
    options: dict[str, Any] = {
        "timeout": timeout,
        "protocol": 2,  # what the dedicated connections of consumer and relay speak, too
        "decode_responses": False,
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "health_check_interval": 15,
        "retry": Retry(ExponentialBackoff(cap=0.5, base=0.05), 2, supported_errors=(redis.ConnectionError,)),
        "max_connections": max_connections,
    }
    if not url.startswith("unix:"):  # which needs no keepalive, and redis-py refuses to be asked
        options["socket_keepalive"] = True
    try:
        if url.startswith(sentinel.SCHEME):
            options |= sentinel.connection_arguments(sentinel.parse(url))
            pool = redis.BlockingConnectionPool(**options)  # type: ignore[no-untyped-call]
            return redis.Redis.from_pool(pool)
        return redis.Redis.from_pool(redis.BlockingConnectionPool.from_url(url, **options))
    except ValueError as err:
        raise ConfigError(
            f"redis.url: {err} (allowed: redis://host:port/db, rediss://..., unix:///path?db=0, "
            f"{sentinel.FORM})",
            param="redis.url",
        ) from None


def address(client: redis.Redis) -> str:
    """Where a client points, without user or password."""
    kwargs = client.connection_pool.connection_kwargs
    if master := sentinel.master_of(client):
        return str(master.url)
    if "path" in kwargs:
        return f"unix://{kwargs['path']}"
    return f"{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}"


@contextmanager
def unavailable_on_failure(client: redis.Redis) -> Iterator[None]:
    """Turn a failed connection, a refused login or a server that takes no writes into Unavailable."""
    try:
        yield
    except (AuthenticationError, redis.ConnectionError, redis.TimeoutError) as err:
        raise Unavailable(f"Redis at {address(client)} cannot be reached: {_reason(err)}") from err
    except ResponseError as err:
        if is_outage(err):
            raise Unavailable(f"Redis at {address(client)} takes no writes: {_reason(err)}") from err
        raise


_OUTAGES = (
    *("OOM", "READONLY", "LOADING", "MISCONF", "NOREPLICAS", "MASTERDOWN", "BUSY", "TRYAGAIN", "NOAUTH"),
    "UNBLOCKED",  # of a blocking read, when its server stops being the master
)


def is_outage(err: Exception) -> bool:
    """Whether the failure is of the server's state, and may pass, rather than of the command."""
    if isinstance(err, redis.ConnectionError | redis.TimeoutError):
        return True
    # redis-py strips the code of the errors that have a class of their own, such as OOM and READONLY.
    named = type(err).__name__ in {"OutOfMemoryError", "ReadOnlyError", "MasterDownError", "TryAgainError"}
    return named or (isinstance(err, RedisError) and any(word in str(err).split()[:1] for word in _OUTAGES))


def _reason(err: Exception) -> str:
    if type(err).__name__ == "OutOfMemoryError":
        return "its memory is full (maxmemory)"
    return str(err).strip().rstrip(".") or type(err).__name__


def dedicated_connection(client: redis.Redis) -> Any:
    """A connection of its own, not of the pool, connected: for who waits with `select` or `can_read`.

    redis-py has no public way to wait on several connections at once; `make_connection` would count
    against the pool's bound.
    """
    pool = client.connection_pool
    # The read timeout stays: a server that freezes amid the handshake must not hold anyone for ever.
    kwargs = {**pool.connection_kwargs, "health_check_interval": 0}
    connection = pool.connection_class(**kwargs)
    connection.connect()
    return connection
