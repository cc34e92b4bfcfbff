"""API keys and what each may do. Pure, but for the random bytes of a new key.

A key is a random secret of at least 128 bits, so only its SHA-256 digest is kept: a slow password hash would
protect what can be guessed, which this cannot. A key is found by its digest; what the time of that look-up
tells of a digest says nothing of the secret.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from wicore.request import Priority

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
SECRET = r"^[A-Za-z0-9_.~-]{22,200}$"
"""At least 128 bits as base64url, of characters that a header and a websocket's subprotocol can carry."""


class Limits(BaseModel):
    """What a key may use; unset: no limit of the key's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    requests_per_minute: Annotated[int | None, Field(ge=1, le=10**9)] = None
    """Requests that make work, on average."""
    burst: Annotated[int | None, Field(ge=1, le=10**9)] = None
    """Requests at once after a pause; unset: those of a minute."""
    tokens_per_minute: Annotated[int | None, Field(ge=1, le=10**12)] = None
    """Tokens of prompts and output, on average; those of a minute at once after a pause."""
    parallel: Annotated[int | None, Field(ge=1, le=10**9)] = None
    """Jobs that wait or run."""
    priority: Literal["interactive", "normal", "batch", "background"] | None = None
    """The highest level."""
    models: tuple[str, ...] | None = None
    """Names of the models."""

    @model_validator(mode="after")
    def _burst_of_a_rate(self) -> Limits:
        if self.burst is not None and self.requests_per_minute is None:
            raise ValueError("burst needs requests_per_minute beside it")
        return self

    @property
    def level(self) -> Priority:
        """The highest level as a number: no job's `Priority` may be below it."""
        return Priority[self.priority.upper()] if self.priority else min(Priority)


NO_LIMITS = Limits()


class ApiKey(Limits):
    """A key as it is kept: without the secret."""

    name: Annotated[str, Field(pattern=NAME)]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the secret, in hexadecimal."""
    admin: bool = False
    """Sees the jobs of all keys, dead letters, status and metrics."""
    created_ms: int | None = None
    """None for one that the settings name."""
    revoked_ms: int | None = None

    @property
    def id(self) -> str:
        """Owns the key's jobs; says nothing of the secret."""
        return client_id(self.digest)


class ConfiguredKey(Limits):
    """A key in the settings: its secret, or the digest that `wicore keys create` prints beside one."""

    name: Annotated[str, Field(pattern=NAME)]
    key: Annotated[str | None, Field(pattern=SECRET, repr=False)] = None
    """The secret itself."""
    sha256: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$")] = None
    """Its digest, where the secret shall not lie in a file."""
    admin: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> ConfiguredKey:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("needs key, of at least 22 letters, digits or _.~-, or its sha256: one of both")
        return self

    def api_key(self) -> ApiKey:
        digest = self.sha256 or digest_of(self.key or "")
        return ApiKey(digest=digest, **self.model_dump(exclude={"key", "sha256"}))


def new_secret() -> str:
    """256 random bits, marked so that scanners for leaked secrets can tell what it is."""
    return "wicore-" + secrets.token_urlsafe(32)


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def client_id(digest: str) -> str:
    """The name under which the jobs of a key are kept: the digest's first 64 bits."""
    return f"key-{digest[:16]}"


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach what listens on `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
