"""Where Redis is, as Celery and Kombu want to be told."""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from wicore.errors import ConfigError
from wicore.queue import sentinel


class CeleryURL(NamedTuple):
    """`url` is for broker and result backend, `options` for the transport options of both."""

    url: str
    options: dict[str, Any]


def celery_url(url: str) -> CeleryURL:
    """`redis.url` for Celery: the same server, database, user and password.

    Pure. Options of redis-py in the query are kept where Celery knows them too (`ssl_...`).
    Raises ConfigError for a scheme that Celery has no form of.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    # As in redis-py, the query's database goes before the path's.
    path = f"/{query['db']}" if "db" in query else parts.path or "/0"
    if parts.scheme == "redis":
        return CeleryURL(_joined("redis", parts.netloc, path), {})
    if parts.scheme == "rediss":
        tls = {name: value for name, value in query.items() if name.startswith("ssl_")}
        # redis-py verifies the server unless told not to; Celery wants that said.
        tls.setdefault("ssl_cert_reqs", "required")
        return CeleryURL(_joined("rediss", parts.netloc, path, tls), {})
    if parts.scheme == "unix":
        database = {"virtual_host": query["db"]} if "db" in query else {}
        return CeleryURL(_joined("redis+socket", parts.netloc, parts.path, database), {})
    if url.startswith(sentinel.SCHEME):
        return _sentinels(sentinel.parse(url))
    raise ConfigError(f"redis.url: {parts.scheme}:// has no form for Celery", param="redis.url")


def _sentinels(url: sentinel.SentinelUrl) -> CeleryURL:
    """One URL a sentinel, each with the master's user, password and database."""
    login = ""
    if url.username or url.password:
        login = f"{quote(url.username or '', safe='')}:{quote(url.password or '', safe='')}@"
    tls = {"ssl_cert_reqs": "required"} if url.ssl else {}
    hosts = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in url.sentinels)
    urls = (_joined("sentinel", login + host, f"/{url.db}", tls) for host in hosts)
    own = {"username": url.sentinel_username, "password": url.sentinel_password, "ssl": url.ssl or None}
    kwargs = {name: value for name, value in own.items() if value is not None}
    return CeleryURL(";".join(urls), {"master_name": url.master, "sentinel_kwargs": kwargs})


def _joined(scheme: str, netloc: str, path: str, query: dict[str, str] | None = None) -> str:
    return f"{scheme}://{netloc}{path}" + (f"?{urlencode(query)}" if query else "")
