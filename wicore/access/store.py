"""The keys that `wicore keys` made, in Redis: for all API processes, in force within seconds."""

from __future__ import annotations

import redis

from wicore.access.keys import ApiKey, Limits, digest_of, is_loopback, new_secret
from wicore.config import ApiSettings
from wicore.errors import ConfigError, Conflict, UnknownKey
from wicore.queue.connection import unavailable_on_failure
from wicore.queue.schema import Keys


class KeyStore:
    """Thread-safe; holds nothing but the client. Every method raises Unavailable when Redis is away."""

    def __init__(self, client: redis.Redis, prefix: str = "wicore") -> None:
        self._client = client
        self._hash = Keys(prefix).keys

    def all(self) -> list[ApiKey]:
        """Every key that ever was, also revoked ones, the oldest first."""
        with unavailable_on_failure(self._client):
            entries = self._client.hvals(self._hash)
        keys = [ApiKey.model_validate_json(entry) for entry in entries]
        return sorted(keys, key=lambda key: (key.created_ms or 0, key.name))

    def create(self, name: str, limits: Limits, *, admin: bool = False) -> tuple[ApiKey, str]:
        """A new key and its secret, which is kept nowhere. Raises Conflict when a live key has the name."""
        if any(key.name == name for key in self.all() if key.revoked_ms is None):
            raise Conflict(f"NAME: a key named {name!r} exists; revoke it first, or choose another name")
        secret = new_secret()
        key = ApiKey(
            name=name, digest=digest_of(secret), admin=admin, created_ms=self._now(), **limits.model_dump()
        )
        self._write(key)
        return key, secret

    def revoke(self, name_or_id: str) -> ApiKey:
        """End a key for good. It stays listed: a service that has had keys never opens by losing its last.

        Raises UnknownKey when no live key has the name or id.
        """
        for key in self.all():
            if name_or_id in (key.name, key.id) and key.revoked_ms is None:
                revoked = key.model_copy(update={"revoked_ms": self._now()})
                self._write(revoked)
                return revoked
        raise UnknownKey(f"{name_or_id}: no key in force has this name or id; `wicore keys list` shows them")

    def _write(self, key: ApiKey) -> None:
        with unavailable_on_failure(self._client):
            self._client.hset(self._hash, key.digest, key.model_dump_json(exclude_none=True))

    def _now(self) -> int:
        with unavailable_on_failure(self._client):
            seconds, micros = self._client.time()
        return int(seconds) * 1000 + int(micros) // 1000


def may_be_open(settings: ApiSettings) -> bool:
    """Whether a service without keys may serve everybody: only this machine reaches it, or so it was set."""
    return settings.allow_anonymous or is_loopback(settings.host)


def require_keys(settings: ApiSettings, store: KeyStore) -> None:
    """Raises ConfigError when the API would be open to the network: there, nobody is served without a key."""
    if may_be_open(settings) or settings.keys or any(key.revoked_ms is None for key in store.all()):
        return
    raise ConfigError(
        f"api.host: other machines reach {settings.host}, and there are no API keys; make one by "
        "`wicore keys create NAME --admin`, or set api.keys; or listen on 127.0.0.1; or, behind a proxy of "
        "yours that asks who calls, set api.allow_anonymous",
        param="api.host",
    )
