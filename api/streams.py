"""Server-sent events: what the two kinds of event streams share.

Form: the WHATWG HTML standard, section "Server-sent events".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from flask import Response, request

from api import http
from api.callers import caller
from api.services import Services
from wicore.errors import Cancelled, Expired, InvalidRequest, WicoreError, error_from_body
from wicore.request import TERMINAL_TYPES, Event

KEEP_ALIVE_S = 15.0
"""Silence after which a comment is sent, so that proxies do not cut an idle stream."""
TICK_S = 1.0
"""How often an idle stream looks whether its client or this process is going away."""
KEEP_ALIVE = ": keep-alive\n\n"
MAX_SEQ = 2**53
"""Larger numbers are not exact in a JavaScript client."""


def event_stream(services: Services, pieces: Iterator[str], on_close: Callable[[], None]) -> Response:
    """A streaming response; when it is closed it gives back the slot that the caller took for it.

    `pieces` yields text to send at once, or "" when there was nothing to send for a tick. `on_close`
    runs exactly once, whether the stream ended, broke, or was never started.
    """

    client = caller().client

    def close() -> None:
        services.slots.give(client)
        on_close()

    response = Response(_kept_alive(pieces), mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-cache"
    # Tells nginx not to collect the stream before passing it on.
    response.headers["X-Accel-Buffering"] = "no"
    response.call_on_close(close)
    return response


def _kept_alive(pieces: Iterator[str]) -> Iterator[bytes]:
    last = time.monotonic()
    for piece in pieces:
        now = time.monotonic()
        if not piece and now - last < KEEP_ALIVE_S:
            continue
        last = now
        yield (piece or KEEP_ALIVE).encode()


def data(value: Any, event_id: int | None = None) -> str:
    """One server-sent event with `value` as JSON."""
    head = "" if event_id is None else f"id: {event_id}\n"
    return f"{head}data: {http.dumps(value)}\n\n"


def first_wanted() -> int:
    """The sequence number that the client wants first, from `?from=` or after `Last-Event-ID`; 1 if unsaid.

    A reconnecting browser repeats the URL that it was given and adds the header, so the header wins.
    Raises InvalidRequest when one of them is not a whole number.
    """
    first = first_of(request.args.get("from", 1))
    if "Last-Event-ID" in request.headers:
        return sequence_number(request.headers["Last-Event-ID"], "Last-Event-ID") + 1
    return first


def first_of(value: Any) -> int:
    """The sequence number that a `from` asks for; 0 means from the beginning, too. Raises InvalidRequest."""
    return max(1, sequence_number(value, "from"))


def sequence_number(value: Any, name: str) -> int:
    """Raises InvalidRequest naming `name` unless `value` is a whole number or its digits."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 16:
        value = int(value)
    if type(value) is int and 0 <= value <= MAX_SEQ:
        return value
    raise InvalidRequest(f"{name}: must be a whole number from 0 to {MAX_SEQ}", param=name)


def failure(event: Event) -> WicoreError | None:
    """The error that a job's terminal event stands for; None for any other event and for `done`."""
    kind = event["type"]
    if kind not in TERMINAL_TYPES or kind == "done":
        return None
    if "error" in event:
        return error_from_body(event["error"])
    return {
        "cancelled": Cancelled("The job was cancelled"),
        "expired": Expired("The job's deadline passed before it finished"),
    }.get(kind) or WicoreError("The job failed")
