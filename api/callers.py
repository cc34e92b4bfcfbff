"""Who calls, and what of the service is theirs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import cast

from flask import g, request


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent the current request."""

    client: str
    """Owns the jobs that it submits, and takes turns with the other clients on the queue; '' is one, too."""
    restricted: bool = False
    """Whether it sees its own jobs alone: keys are configured, and this is one of them."""

    def may_see(self, client: str) -> bool:
        """Whether something that `client` owns is visible to this caller."""
        return not self.restricted or client == self.client


def caller() -> Caller:
    """Of the current request."""
    if "caller" not in g:
        g.caller = _identify()
    return cast(Caller, g.caller)


def _identify() -> Caller:
    key = request.headers.get("Authorization", "")
    return Caller(hashlib.sha256(key.encode()).hexdigest()[:32] if key else "")
