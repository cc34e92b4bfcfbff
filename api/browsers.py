"""What is said to browsers: which pages may call, and what a page from here may do.

A page of any site can send requests to this service from its reader's browser, and open websockets, which
the same-origin policy does not cover. A key is not sent along by itself, so a request that brings one is
meant. One without a key is let in for where it comes from, and then where it comes from must be right.
"""

from __future__ import annotations

from functools import partial
from urllib.parse import urlsplit

from flask import Flask, Response, request

from wicore.access.keys import is_loopback
from wicore.config import ApiSettings
from wicore.errors import Forbidden

PREFLIGHT_S = 600
"""How long a browser may remember that a page may call."""
READABLE = (
    "X-Job-Id, X-Request-Id, Location, Retry-After, "
    "X-RateLimit-Limit-Requests, X-RateLimit-Remaining-Requests, X-RateLimit-Reset-Requests, "
    "X-RateLimit-Limit-Tokens, X-RateLimit-Remaining-Tokens, X-RateLimit-Reset-Tokens"
)
"""Headers that a page of another origin is let read."""
SECURITY = {
    # The page loads its own files and speaks to its own server; nobody frames it, nothing is inline.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def install(app: Flask, settings: ApiSettings) -> None:
    app.after_request(partial(_tell, settings))


def check_origin(settings: ApiSettings) -> None:
    """Refuse a request without a key that a page of another site may have made. Raises Forbidden.

    A page is known by `Origin`, which browsers send with websockets and all but plain reads. A name that an
    attacker lets point here (DNS rebinding) is known by `Host`: a service for this machine is called by its
    loopback address, or by `localhost`.
    """
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.host and not _is_allowed(origin, settings):
        raise Forbidden(
            f"Origin: pages of {origin:.100} may not call this service; see api.cors_origins", param="Origin"
        )
    host = urlsplit(f"//{request.host}").hostname or ""
    if not settings.allow_anonymous and not is_loopback(host):
        raise Forbidden(
            f"Host: {host:.100} is not this machine's own address, and there are no API keys; make one by "
            "`wicore keys create NAME`, or set api.allow_anonymous",
            param="Host",
        )


def _is_allowed(origin: str, settings: ApiSettings) -> bool:
    allowed = (settings.cors_origins or "").split(",")
    return origin in allowed or allowed == ["*"]


def _tell(settings: ApiSettings, response: Response) -> Response:
    for name, value in SECURITY.items():
        response.headers.setdefault(name, value)
    if settings.cors_origins is None:
        return response
    response.vary.add("Origin")
    origin = request.headers.get("Origin")
    if origin is not None and _is_allowed(origin, settings):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = READABLE
        if request.method == "OPTIONS":
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
            # Whatever it wants to send: no header has a meaning here that a page must not use.
            wanted = request.headers.get("Access-Control-Request-Headers", "")
            response.headers["Access-Control-Allow-Headers"] = wanted
            response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_S)
    return response
