"""`GET /status`: what waits, who works, and what their KV caches hold."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from flask import Blueprint, Response

from api import answers, http, openapi
from api.services import Services, current
from wicore import __version__
from wicore.queue.connection import unavailable_on_failure

door = Blueprint("status", __name__)


@door.get("/status")
@openapi.describe("What waits, who works, and what their caches hold", tag="service", answers=answers.Status)
def status() -> Response:
    services = current()
    workers = services.heartbeats()
    queue = {level.name.lower(): waiting for level, waiting in services.producer.depths().items()}
    return http.reply(
        {
            "version": __version__,
            "versions": _versions(services),
            "queue": {**queue, "suspect": services.producer.suspects()},
            "rates": add_up([heartbeat["rates"] for heartbeat in workers if heartbeat.get("rates")]),
            "workers": [_public(heartbeat) for heartbeat in workers],
            "kv": add_up([heartbeat["kv"] for heartbeat in workers if heartbeat.get("kv")]),
        }
    )


def _public(heartbeat: Mapping[str, Any]) -> dict[str, Any]:
    """A heartbeat as clients see it: without what only workers need of each other, and without buckets."""
    inner = ("worker", "lifeline")
    shown = {name: heartbeat[name] for name in heartbeat if name not in inner}
    for name in ("latency", "requests"):
        if name in shown:
            shown[name] = add_up([shown[name]])
    return {"id": heartbeat["worker"], **shown}


def _versions(services: Services) -> dict[str, str]:
    """Of what this API runs on; each worker tells its own."""
    with unavailable_on_failure(services.redis):
        server = services.redis.info("server")
    redis = server.get("valkey_version") or server.get("redis_version", "")
    return {"wicore": __version__, "python": platform.python_version(), "redis": str(redis)}


def add_up(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of equal names added, to any depth; of a histogram, `count` and `sum`. Pure.

    What is no number (a text, a list, true) says something of one worker alone and is left out.
    """
    total: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        if inner := [_without_buckets(value) for value in values if isinstance(value, Mapping)]:
            total[name] = add_up(inner)
        elif numbers := [value for value in values if type(value) in (int, float)]:
            total[name] = sum(numbers)
    return total


def _without_buckets(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Histograms of different bounds add up no further than to how many values there were, and their sum."""
    if "counts" in part:
        return {"count": sum(part["counts"]), "sum": part["sum"]}
    return part
