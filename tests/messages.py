"""Queue messages as other clients write them."""

from __future__ import annotations

import base64
import json
from typing import Any


def message(**changes: Any) -> dict[str, Any]:
    """A good message as a Celery client writes it, its parts replaced by `changes`."""
    body = base64.b64encode(json.dumps([[], {"kind": "completion", "prompt": "x"}, {}]).encode()).decode()
    good = {
        "body": body,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": "wicore.generate", "id": "j1", "retries": 0, "expires": None},
        "properties": {"correlation_id": "j1", "body_encoding": "base64", "delivery_tag": "t1"},
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            good[part][field] = value
        else:
            good[part.replace("_", "-")] = value
    return good


def pushed(job_id: str, tag: str | None = None, **fields: Any) -> bytes:
    """A message as a plain Redis client pushes it."""
    body = json.dumps([[], {"kind": "completion", "prompt": "x", **fields}, {}])
    tag = f"tag-{job_id}" if tag is None else tag
    return raw(body=body, headers__id=job_id, properties={"delivery_tag": tag})


def raw(**changes: Any) -> bytes:
    return json.dumps(message(**changes)).encode()
