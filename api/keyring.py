"""Who calls, and what is theirs; found out from the key that came with the request."""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from wicore.access.keys import NO_LIMITS, ApiKey, Limits, client_id, digest_of
from wicore.access.store import KeyStore, may_be_open
from wicore.config import ApiSettings
from wicore.errors import Unauthenticated, Unavailable

FRESH_S = 2.0
"""How long a copy of the keys is used: how late a new key is known, and a revoked one refused."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent the current request."""

    client: str
    """Owns the jobs that it submits, and takes turns with the other clients on the queue; '' is one, too."""
    restricted: bool = False
    """Whether it sees its own jobs alone: keys are configured, and this is one of them, not an operator's."""
    limits: Limits = NO_LIMITS
    keyed: bool = False
    """Whether a key said so, and not the place where it comes from."""

    @property
    def admin(self) -> bool:
        """An operator: sees every job, dead letters, status and metrics. Without keys everybody is one."""
        return not self.restricted

    def may_see(self, client: str) -> bool:
        """Whether something that `client` owns is visible to this caller."""
        return not self.restricted or client == self.client


class KeyRing:
    """The keys of the settings and a copy, at most FRESH_S old, of those in Redis. Thread-safe."""

    def __init__(self, store: KeyStore, settings: ApiSettings) -> None:
        self._store = store
        self._configured = [key.api_key() for key in settings.keys or ()]
        self._may_be_open = may_be_open(settings)
        self._stored: Sequence[ApiKey] = ()
        self._by_digest: dict[str, ApiKey] = {}
        self._live = {key.id for key in self._configured}
        self._read_at = float("-inf")
        self._failure: Unavailable | None = None
        self._lock = threading.Lock()

    def identify(self, secret: str | None) -> Caller:
        """Who a request comes from that brought this key; None: it brought none.

        Raises Unauthenticated for a bad or missing key, where keys are asked for, and Unavailable when the
        keys cannot be read.
        """
        digest = "" if secret is None else digest_of(secret)
        if (key := self._find(digest)) is not None:
            return Caller(key.id, not key.admin, key, keyed=True)
        if self._is_open():
            return Caller(client_id(digest) if digest else "")
        if secret is None:
            raise Unauthenticated("Authorization: missing; send `Authorization: Bearer KEY`")
        raise Unauthenticated("Authorization: no key in force, or revoked; send `Authorization: Bearer KEY`")

    def is_live(self, caller: Caller) -> bool:
        """Whether `caller` would be let in again: what stays open for long asks now and then.

        While the keys cannot be read, as they were.
        """
        with suppress(Unavailable):
            self._refresh()
        return caller.client in self._live or self._nobody_has_keys()

    def _find(self, digest: str) -> ApiKey | None:
        if not digest:
            return None
        # Every one is compared, and in constant time, so that no answer tells which came close.
        found = [key for key in self._configured if hmac.compare_digest(key.digest, digest)]
        if found:
            return found[0]
        self._refresh()
        return self._by_digest.get(digest)

    def _is_open(self) -> bool:
        """Nobody has made a key, ever: everybody is served, unless others than this machine's reach us."""
        if self._may_be_open and not self._configured:
            self._refresh()
        return self._nobody_has_keys()

    def _nobody_has_keys(self) -> bool:
        return self._may_be_open and not self._configured and not self._stored

    def _refresh(self) -> None:
        if self._failure is None and time.monotonic() - self._read_at < FRESH_S:
            return  # without the lock: streams ask with every token
        with self._lock:
            if time.monotonic() - self._read_at < FRESH_S:
                if self._failure is not None:
                    raise self._failure
                return
            try:
                self._stored, self._failure = self._store.all(), None
            except Unavailable as err:
                # Told to all who ask for a while: each trying by itself would wait in line for its timeout.
                self._failure = err
                raise
            finally:
                self._read_at = time.monotonic()
            self._by_digest = {key.digest: key for key in self._stored if key.revoked_ms is None}
            self._live = {key.id for key in (*self._configured, *self._by_digest.values())}
