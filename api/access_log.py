"""The access log: a line of JSON for each request, when its answer has ended, and the counts beside it."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from typing import Any

from flask import Flask, Response, g, request

from api import http, traffic

log = logging.getLogger("wicore.access")
"""Silent until `write`: whoever serves the app decides."""


def write() -> None:
    """Send the lines to standard output, bare, whatever happens to other logs."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def install(app: Flask, *, log_bodies: bool) -> None:
    """Have each request of the app counted and logged, its JSON body too if wanted.

    Call it before what may answer early is registered.
    """
    app.config["LOG_BODIES"] = log_bodies

    @app.before_request
    def _begin() -> None:
        g.started = time.monotonic()

    @app.after_request
    def _end(response: Response) -> Response:
        entry = _entry(response)
        if response.is_streamed:
            counted = _Counted(response.response)
            response.response = counted
            response.call_on_close(lambda: _tell(entry, counted.bytes))
        else:
            _tell(entry, response.content_length or 0)
        return response


class _Counted:
    """A streamed body that knows how much of it was sent."""

    def __init__(self, pieces: Iterable[Any]) -> None:
        self._pieces = pieces
        self.bytes = 0

    def __iter__(self) -> Iterator[Any]:
        for piece in self._pieces:
            self.bytes += len(piece)
            yield piece

    def close(self) -> None:
        if (close := getattr(self._pieces, "close", None)) is not None:
            close()


def _entry(response: Response) -> dict[str, Any]:
    """What is known of a request when its answer begins."""
    rule = request.url_rule
    upgraded = rule is not None and rule.websocket and response.status_code == 200
    caller = g.get("caller")
    entry: dict[str, Any] = {
        "request_id": http.request_id(),
        "method": request.method,
        "route": "" if rule is None else rule.rule,
        "path": request.path,
        "status": 101 if upgraded else response.status_code,
        "started": g.get("started"),
        "client": "" if caller is None else caller.client,
        "job": response.headers.get("X-Job-Id") or (request.view_args or {}).get("job_id"),
    }
    if "body" in g:  # telemetry.log_prompts
        entry["body"] = g.body.decode("utf-8", "replace")
    return entry


def _tell(entry: dict[str, Any], size: int) -> None:
    now = time.monotonic()
    seconds = now - (entry.pop("started") or now)
    traffic.answered(entry["method"], entry["route"], entry["status"], seconds)
    if log.isEnabledFor(logging.INFO):
        at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": at, **entry, "ms": round(seconds * 1e3, 1), "bytes": size}
        log.info(json.dumps(line, ensure_ascii=False, separators=(",", ":")))
