"""Waiting for what other processes do, and a port for them to do it on."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import redis

from wicore.errors import Unavailable

PATIENCE_S = 20.0


def until(condition: Callable[[], Any], what: str = "it", patience_s: float = PATIENCE_S) -> Any:
    """The first true value of `condition`; while Redis does not answer there is none."""
    end = time.monotonic() + patience_s
    while True:
        try:
            if value := condition():
                return value
        except (redis.RedisError, Unavailable):
            pass
        assert time.monotonic() < end, f"{what}: did not happen"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
