"""What every HTTP door shares: reading JSON, answering JSON, and one form for every error."""

from __future__ import annotations

import json
import logging
import math
import re
import select
import socket
import uuid
from collections.abc import Mapping
from typing import Any, cast

import redis.exceptions
from flask import Flask, Response, current_app, g, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge, UnsupportedMediaType

from api.services import current
from api.slots import Budget
from wicore.errors import InvalidRequest, TooLarge, Unavailable, WicoreError
from wicore.queue.connection import is_outage

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
MAX_KEYS = 2048
"""No field has that many; a million unknown ones would take seconds to report."""
MAX_WHOLE = 2**63
"""No field takes a larger whole number."""
PIECE = 2**16
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def dumps(value: Any) -> str:
    """Compact JSON; NaN and infinities, which JSON has no form for, are a bug and raise ValueError."""
    return _encode(value)


def reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumps(value) + "\n", status, headers, mimetype="application/json")


def loads(data: bytes | str) -> Any:
    """Parse JSON from a client.

    Raises InvalidRequest that says where the first fault is: not UTF-8, not JSON, NaN or Infinity
    (which Python's parser would take), nested too deeply, a number with too many digits, or an object
    with more than MAX_KEYS keys.
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data
        return json.loads(
            text, parse_float=_number, parse_constant=_refuse_constant, object_pairs_hook=_bounded_object
        )
    except UnicodeDecodeError as err:
        raise InvalidRequest(f"body: not valid UTF-8 at byte {err.start}") from None
    except json.JSONDecodeError as err:
        where = f"line {err.lineno} column {err.colno}"
        raise InvalidRequest(f"body: not valid JSON at {where}: {err.msg}") from None
    except RecursionError:
        raise InvalidRequest("body: JSON nested too deeply") from None
    except ValueError as err:
        raise InvalidRequest(f"body: not valid JSON: {err}") from None


def _number(text: str) -> int | float:
    """7.0 is 7: JSON knows one kind of number, and its schemas call both integers."""
    value = float(text)
    return int(value) if abs(value) < MAX_WHOLE and value.is_integer() else value


def _bounded_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise InvalidRequest(f"body: an object has {len(pairs)} keys; at most {MAX_KEYS} are allowed")
    return dict(pairs)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def read_json() -> Any:
    """The JSON body of the current request, at most MAX_CONTENT_LENGTH bytes of it read.

    Taken whatever it is declared as (`curl -d` declares a form), unless that cannot hold JSON.
    Raises InvalidRequest as `loads` does or when the body cannot be read, and werkzeug's errors.
    """
    if request.mimetype.startswith("multipart/"):
        raise UnsupportedMediaType(
            f"Content-Type: must be application/json, with the JSON as the body (got {request.mimetype})"
        )
    try:
        data = _whole_body(current().arriving)
    except (HTTPException, WicoreError):
        raise
    except Exception as err:
        # Nothing but what the client sent can fail here, e.g. gunicorn's InvalidChunkSize.
        raise InvalidRequest(f"body: cannot be read: {err}") from None
    limit = request.max_content_length
    if request.content_length is None and limit is not None and len(data) >= limit:
        raise RequestEntityTooLarge  # werkzeug cuts a chunked body off without a word
    if current_app.config["LOG_BODIES"]:
        g.body = data
    return loads(data)


def _whole_body(arriving: Budget) -> bytes:
    """Read it piece by piece, each counted until all are there; raises Unavailable when too much arrives."""
    pieces: list[bytes] = []
    try:
        while piece := request.stream.read(PIECE):
            arriving.change(len(piece))
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        arriving.change(-sum(map(len, pieces)))


def as_wicore_error(err: BaseException, request_id: str) -> WicoreError:
    """Any failure as one a caller may see. Only an unforeseen one is logged, with its traceback."""
    if isinstance(err, WicoreError):
        return err
    if isinstance(err, redis.exceptions.RedisError) and is_outage(err):
        log.warning("redis failed: %s", err, extra={"request_id": request_id})
        return Unavailable("Redis is not reachable; try again", retry_after=2)
    log.error("internal error in request %s", request_id, exc_info=err, extra={"request_id": request_id})
    return WicoreError(f"Internal error; quote request id {request_id} when you report it")


def error_reply(err: WicoreError) -> Response:
    response = reply({"error": err.body()}, err.status)
    # OpenAI's clients go by it; by the status they would send a cancelled job again.
    response.headers["x-should-retry"] = "true" if err.retryable else "false"
    if err.status in (429, 503):
        response.headers["Retry-After"] = str(max(1, math.ceil(err.retry_after or 1)))
    if err.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _http_error(err: HTTPException) -> Response:
    """Werkzeug's errors (no such route, method, media type, size) in OpenAI's form, headers kept."""
    status = err.code or 500
    if status < 400:
        return cast(Response, Response.force_type(err.get_response(), request.environ))
    if isinstance(err, RequestEntityTooLarge):
        limit = request.max_content_length
        return error_reply(TooLarge(f"body: larger than the {limit} bytes that api.max_body_bytes allows"))
    message = {
        404: f"No such route: {request.method} {request.path}",
        405: f"{request.method} is not allowed on {request.path}",
    }.get(status, err.description or err.name)
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = err.name.lower().replace(" ", "_")
    response = reply({"error": {"message": message, "type": kind, "code": code, "param": None}}, status)
    if "Allow" in (allowed := dict(err.get_headers())):
        response.headers["Allow"] = allowed["Allow"]
    return response


def install(app: Flask) -> None:
    """Request ids in and out, and error handlers for everything that a door can raise."""

    @app.before_request
    def _take_request_id() -> None:
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

    @app.after_request
    def _give_request_id(response: Response) -> Response:
        response.headers["X-Request-Id"] = request_id()
        return response

    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, lambda err: error_reply(as_wicore_error(err, request_id())))


def idempotency_key() -> str | None:
    """The Idempotency-Key header. Raises InvalidRequest unless it is 1 to 255 printable characters."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest(
            "Idempotency-Key: must be 1 to 255 printable ASCII characters", param="Idempotency-Key"
        )
    return key


def request_id() -> str:
    """Of the current request; one is made when the request failed before it got one."""
    if "request_id" not in g:
        g.request_id = uuid.uuid4().hex
    return str(g.request_id)


def client_gone(environ: Mapping[str, Any]) -> bool:
    """Whether the client closed its connection; False where the server does not let us look.

    WSGI has no notice of it, so this peeks at gunicorn's socket: readable with nothing to read is
    the end of the stream. What a client may have pipelined stays unread.
    """
    sock = environ.get("gunicorn.socket")
    if sock is None:
        return False
    try:
        if not select.select([sock], [], [], 0)[0]:
            return False
        return not sock.recv(1, socket.MSG_PEEK)
    except (OSError, ValueError):
        return True
