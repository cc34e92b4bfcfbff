"""The websocket doors: one job's events, and many jobs over one socket.

Frames are JSON text (RFC 6455). Close codes: 1000 the job is over, 1008 the key was revoked, 1009 a frame was
too big, 1011 a fault here, 1012 this process is stopping (connect again and resume), 1013 the reader was too
slow (resume).
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

from flask import Blueprint, Flask, g, request
from flask_sock import Sock

from api import http, openapi, streams
from api.callers import SUBPROTOCOL, caller
from api.services import current, stopping
from api.session import GONE, MAX_WAITING, NOT_ALLOWED, SERVICE_RESTART, Session, error_frame
from wicore.config import ApiSettings
from wicore.errors import InvalidRequest, UnknownJob

PING_S = 25.0
INTERNAL_ERROR = 1011
HOLD_S = 0.01
MAX_UNWANTED_BYTES = 1024
SETTLE_S = 0.25
"""What a client has to read the answer to its handshake before the socket may close again."""
SERVER_SOCKETS = frozenset({"gunicorn.socket", "werkzeug.socket"})
"""Where the servers put a connection's socket, and simple_websocket looks for it."""


def server_options(settings: ApiSettings) -> dict[str, Any]:
    """What every websocket is opened with; a message is bounded as a request body is."""
    return {
        "ping_interval": PING_S,
        "max_message_size": settings.max_body_bytes,
        "subprotocols": [SUBPROTOCOL],
    }


def install(app: Flask) -> None:
    """Register both doors. A handshake that cannot be served is refused by an HTTP error before it."""
    sock = Sock()
    doors = Blueprint("sockets", __name__, url_prefix="/v1")
    doors.before_request(_before_handshake)
    doors.teardown_request(_release)
    sock.route("/jobs/<job_id>/stream", bp=doors)(_survive(_follow_one))
    sock.route("/stream", bp=doors)(_survive(_many))
    app.register_blueprint(doors)


def _before_handshake() -> None:
    services = current()
    if request.view_args:
        g.first_wanted = streams.first_wanted()
        services.record(request.view_args["job_id"], caller())
    services.slots.take(caller().client)
    g.slots = services.slots
    environ = request.environ
    # Compression would cost 256 KiB and a good part of the CPU time of a socket, for frames this short.
    environ.pop("HTTP_SEC_WEBSOCKET_EXTENSIONS", None)
    for server in SERVER_SOCKETS & environ.keys():
        environ[server] = WholeSends(environ[server])


def _release(_error: BaseException | None) -> None:
    slots = g.pop("slots", None)
    if slots is not None:
        slots.give(caller().client)


class WholeSends:
    """A socket whose `send` sends everything, one caller at a time.

    simple_websocket calls `send` and ignores the count, from its handler and from the thread that
    answers pings. gevent's sockets do not block in the kernel: on a full buffer they send a part,
    which would leave half a frame on the wire.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self.hold_input: Callable[[], bool] = lambda: False
        """While true nothing is read, so that a client that sends too much is held back by TCP."""

    def send(self, data: bytes) -> int:
        with self._lock:
            self._sock.sendall(data)
        return len(data)

    def recv(self, size: int) -> Any:
        # A client that sends without pause is always readable: let others run between two reads.
        time.sleep(0)
        while self.hold_input():
            time.sleep(HOLD_S)
        return self._sock.recv(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def _survive(handler: Callable[..., None]) -> Callable[..., None]:
    """Answer a failure on the socket itself: after the handshake an HTTP error would be garbage."""

    def handle(ws: Any, **view_args: str) -> None:
        try:
            handler(ws, **view_args)
        except GONE:
            pass  # flask_sock closes our side
        except Exception as err:
            error = http.as_wicore_error(err, http.request_id())
            try:
                ws.send(error_frame(error))
                ws.close(INTERNAL_ERROR, error.code)
            except GONE:
                pass

    return functools.wraps(handler)(handle)


@openapi.describe(
    "A job's events, over a websocket",
    tag="jobs",
    notes="Each event is a JSON text frame. It closes with 1000 after the last; at 1012 or 1013, come back.",
    answers={101: None},
    parameters=(openapi.FROM,),
    errors=(UnknownJob,),
)
def _follow_one(ws: Any, job_id: str) -> None:
    """`WS /v1/jobs/{id}/stream?from=N`: the job's events; whatever the client sends is refused."""
    services, is_stopping = current(), stopping()
    ws.max_message_size = MAX_UNWANTED_BYTES
    ws.sock.hold_input = lambda: ws.connected and len(ws.input_buffer) >= MAX_WAITING
    opened = time.monotonic()
    for batch in services.relay.follow(job_id, g.first_wanted - 1, streams.TICK_S):
        for event in batch:
            ws.send(http.dumps(event))
        if ws.input_buffer:
            ws.input_buffer.clear()
            ws.send(error_frame(InvalidRequest("frame: this socket only sends; /v1/stream takes commands")))
        if not ws.connected:
            return
        if is_stopping():
            ws.close(SERVICE_RESTART, "restarting; resume")
            return
        if not services.keys.is_live(caller()):
            ws.close(NOT_ALLOWED, "the key was revoked")
            return
    # simple_websocket's client looks at frames that came with the handshake's answer only when more comes:
    # a close in the same read, as for a job that has ended, would make it miss them all.
    time.sleep(max(0.0, SETTLE_S - (time.monotonic() - opened)))


@openapi.describe(
    "Many jobs over one websocket",
    tag="jobs",
    notes="Takes `submit`, `resume` and `cancel` commands, and sends the jobs' events; see docs/api.md.",
    answers={101: None},
)
def _many(ws: Any) -> None:
    """`WS /v1/stream`: submit, resume and cancel jobs, whose events come tagged with the job."""
    Session(ws, current(), stopping(), http.request_id(), caller()).run()
