"""What of a client's rate limits is left, and the call that takes of them without being a job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis

from wicore.access.keys import Limits
from wicore.config import QueueSettings
from wicore.errors import RateLimited
from wicore.queue.connection import unavailable_on_failure
from wicore.queue.schema import Keys
from wicore.queue.scripts import Scripts
from wicore.request import JobBody
from wicore.text.prompt import Prompt

PARALLEL_RETRY_S = 2.0
"""Told to who has as many jobs open as he may: nobody knows when one ends."""
OUTPUT_GUESS = 512
"""Output tokens taken in advance for a choice that names no bound; its end settles the account."""


class RateLimiter:
    """Thread-safe; holds nothing but the client."""

    def __init__(self, client: redis.Redis, prefix: str = "wicore") -> None:
        self._client = client
        self._scripts = Scripts(client, Keys(prefix), QueueSettings())

    def spend(self, client: str, limits: Limits) -> Rates:
        """Take one request; `Producer.submit` does that for jobs. Raises RateLimited or Unavailable."""
        text = limits_text(limits)
        if not text:
            return ()
        with unavailable_on_failure(self._client):
            answer = self._scripts.call("spend", client, text)
        if answer[0] == b"limited":
            raise rate_limited(answer)
        return rates_of(answer[1])


@dataclass(frozen=True, slots=True)
class Rate:
    """One bucket."""

    name: str
    """requests or tokens."""
    limit: int
    """What it holds when it is full."""
    remaining: int
    reset_ms: int
    """Until it is full again, if nothing more is taken."""


Rates = tuple[Rate, ...]


def tokens_taken(body: JobBody, prompt: Prompt) -> int:
    """What a job takes of its client's tokens in advance."""
    return len(prompt.token_ids) + min(prompt.max_tokens, body.max_tokens or OUTPUT_GUESS) * body.sequences


def limits_text(limits: Limits) -> str:
    """The limits as the scripts take them; "" when there are none."""
    used = {"requests_per_minute", "burst", "tokens_per_minute", "parallel"}
    given = limits.model_dump(include=used, exclude_none=True)
    return json.dumps(given) if given else ""


def rates_of(levels: Sequence[Any]) -> Rates:
    """From what limits.lua says of the buckets."""
    return tuple(Rate(name.decode(), *map(int, numbers)) for name, *numbers in levels)


def rate_limited(answer: Sequence[Any]) -> RateLimited:
    """The error for limits.lua's answer "limited"; its attribute `rates` says how full the buckets are."""
    what, limit, wait_ms = answer[1].decode(), int(answer[2]), int(answer[3])
    if what == "parallel":
        message, wait_s = (
            f"{limit} jobs of this key wait or run, its limit; wait for one to end",
            PARALLEL_RETRY_S,
        )
    else:
        wait_s = wait_ms / 1000
        message = f"The key's limit of {limit} {what} a minute is reached; try again in {wait_s:.1f} s"
    error = RateLimited(message, retry_after=wait_s)
    error.rates = rates_of(answer[4])
    return error
