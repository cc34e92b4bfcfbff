"""Workers that are nothing but a heartbeat."""

from __future__ import annotations

from typing import Any

import redis

from wicore.queue.registry import Heartbeat

KV: dict[str, Any] = {
    "tiers": {
        "device": {
            "global": {"total": 10, "free": 3, "used": 5, "cached": 2},
            "window": {"total": 4, "free": 4, "used": 0, "cached": 0},
        },
        "host": {"global": {"total": 20, "free": 1, "used": 0, "cached": 19}},
    },
    "moved_bytes": {"device>host": {"global": 4096, "window": 128}, "host>device": {"global": 512}},
    "hit_tokens": {"device": 640, "host": 64, "nvme": 0},
    "miss_blocks": {"absent": 7, "checksum": 1},
    "move_seconds": {"device>host": {"bounds": [0.001, 0.01], "counts": [5, 0, 1], "sum": 0.25}},
    "victim_age_tokens": {"device": {"bounds": [1000, 10000], "counts": [0, 2, 0], "sum": 9000}},
    "direct_io": None,
}
"""What a worker tells of its KV cache."""


def beat(client: redis.Redis, worker: str, **status: Any) -> None:
    """Write one heartbeat of such a worker."""
    heartbeat = Heartbeat(client, worker, lambda: {"model": "tiny", **status})
    heartbeat._beat()
    heartbeat._lifeline.close()
