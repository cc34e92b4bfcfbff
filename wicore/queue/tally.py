"""What the queue holds now, and what has passed through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import redis

from wicore.queue.connection import unavailable_on_failure
from wicore.queue.schema import Keys

COUNTED = ("accepted", "leased", "handed_back", "redelivered", "succeeded", "failed", "cancelled", "expired")


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts are of all workers together, and outlive them."""

    leases: int
    """Jobs that workers have."""
    dead: int
    """Dead letters kept."""
    buried: int
    """Dead letters ever."""
    counts: Mapping[str, int]
    """Jobs so far, by what became of them (COUNTED)."""


def read_tally(client: redis.Redis, prefix: str = "wicore") -> Tally:
    """Raises Unavailable."""
    keys = Keys(prefix)
    with unavailable_on_failure(client), client.pipeline(transaction=False) as pipe:
        pipe.zcard(keys.leases)
        pipe.llen(keys.dead)
        pipe.get(keys.dead_count)
        pipe.hmget(keys.counts, list(COUNTED))
        leases, dead, buried, counts = pipe.execute()
    return Tally(
        leases, dead, int(buried or 0), {name: int(n or 0) for name, n in zip(COUNTED, counts, strict=True)}
    )
