"""Redis behind Sentinel: reading its URL, and following the master that the sentinels name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import redis
from redis.sentinel import Sentinel, SentinelManagedConnection, SentinelManagedSSLConnection

SCHEME = "sentinel://"
FORM = (
    "sentinel://[user:password@]host:26379,host:26379/master-name"
    "[?db=0&ssl=true&sentinel_username=...&sentinel_password=...]"
)
_OPTIONS = {"db", "ssl", "sentinel_username", "sentinel_password"}
_TIMEOUT_S = 1.0
"""A sentinel that takes longer is passed over for the next one."""


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """What a `sentinel://` URL says; user, password, db and ssl are for the master."""

    sentinels: tuple[tuple[str, int], ...]
    master: str
    db: int = 0
    ssl: bool = False
    """For master and sentinels alike."""
    username: str | None = None
    password: str | None = None
    sentinel_username: str | None = None
    sentinel_password: str | None = None

    def __str__(self) -> str:
        """Without users and passwords."""
        hosts = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.sentinels)
        return f"{SCHEME}{','.join(hosts)}/{self.master}"


def parse(url: str) -> SentinelUrl:
    """Read a URL of the form FORM; the port of a sentinel may be left out. Raises ValueError."""
    parts = urlsplit(url)
    login, _, hosts = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := options.keys() - _OPTIONS:
        raise ValueError(f"unknown option {min(unknown)!r}")
    master = unquote(parts.path.strip("/"))
    if not master or "/" in master:
        raise ValueError("names no master")
    if not options.get("db", "0").isdigit():
        raise ValueError(f"db must be a number (got {options['db']!r})")
    if options.get("ssl", "false") not in ("true", "false"):
        raise ValueError(f"ssl must be true or false (got {options['ssl']!r})")
    return SentinelUrl(
        sentinels=tuple(_host_and_port(text) for text in hosts.split(",")),
        master=master,
        db=int(options.get("db", "0")),
        ssl=options.get("ssl") == "true",
        username=unquote(user) or None,
        password=unquote(password) or None,
        sentinel_username=options.get("sentinel_username"),
        sentinel_password=options.get("sentinel_password"),
    )


def _host_and_port(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@]+)(?::([0-9]{1,5}))?", text)
    if found is None:
        raise ValueError(f"{text!r} is not host:port")
    return found[1].strip("[]"), int(found[2] or 26379)


class Master:
    """Where the master is now: what redis-py's sentinel connections ask whenever they connect.

    A connection to a server that is no master any more ends with its first write (READONLY), at the latest
    when Sentinel demotes that server, and finds the new master as it reconnects.
    """

    is_master = True
    check_connection = False

    def __init__(self, url: SentinelUrl) -> None:
        self.url = url
        self.service_name = url.master
        login = {"username": url.sentinel_username, "password": url.sentinel_password}
        self._sentinel = Sentinel(  # type: ignore[no-untyped-call]
            url.sentinels,
            sentinel_kwargs={
                **{name: value for name, value in login.items() if value is not None},
                "ssl": url.ssl,
                "socket_timeout": _TIMEOUT_S,
                "socket_connect_timeout": _TIMEOUT_S,
                "protocol": 2,
                "retry": None,
            },
        )

    def sentinels(self) -> Iterator[tuple[tuple[str, int], redis.Redis]]:
        """Each sentinel's address, and a client of it."""
        for sentinel in list(self._sentinel.sentinels):
            kwargs = sentinel.connection_pool.connection_kwargs
            yield (kwargs["host"], kwargs["port"]), sentinel

    def get_master_address(self) -> tuple[str, int]:
        """Raises redis.ConnectionError while the sentinels name no master that lives."""
        host, port = self._sentinel.discover_master(self.service_name)  # type: ignore[no-untyped-call]
        return str(host), int(port)


class _FollowsMaster(SentinelManagedConnection):
    def connect(self) -> None:
        """Once: who sends the command tries again, and with several sentinels away tries would multiply."""
        if not self._sock:
            self.connect_to(self.connection_pool.get_master_address())  # type: ignore[no-untyped-call]

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """As of any other connection: one that was not answered in time is not used again.

        redis-py's own default here would keep it, for a frozen master to be asked for ever, and for a late
        answer to be taken for that of the next command.
        """
        return super().read_response(*args, **{"disconnect_on_error": True, **kwargs})


class _FollowsMasterSSL(_FollowsMaster, SentinelManagedSSLConnection):
    pass


def connection_arguments(url: SentinelUrl) -> dict[str, Any]:
    """Arguments of a redis-py connection pool whose connections go to the master."""
    login = {"username": url.username, "password": url.password}
    return {
        "connection_class": _FollowsMasterSSL if url.ssl else _FollowsMaster,
        "connection_pool": Master(url),
        "db": url.db,
        **{name: value for name, value in login.items() if value is not None},
    }


def master_of(client: redis.Redis) -> Master | None:
    """The master that a client follows; None when it is connected without Sentinel."""
    found = client.connection_pool.connection_kwargs.get("connection_pool")
    return found if isinstance(found, Master) else None
