"""`GET /`, the page for people, and the files that it is made of.

The page is plain HTML, CSS and ES modules, served as they lie in api/static; it speaks to the public doors
alone. Its policy lets nothing run or load that does not come from here.
"""

from __future__ import annotations

from pathlib import Path

from flask import Blueprint, Response, send_from_directory

from api import answers, openapi

STATIC = Path(__file__).parent / "static"
MIMETYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
"""Not asked of the system, whose list may know modules as something that browsers refuse to run."""
YEAR_S = 365 * 86_400
POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Content-Security-Policy: no inline script or style, no other host. Images may be a user's own files."""

door = Blueprint("page", __name__)


@door.get("/")
@openapi.describe("The page", tag="page", answers=openapi.HTML)
def page() -> Response:
    return _file("index.html")


@door.get("/static/<path:name>")
@openapi.describe("What the page is made of", tag="page", answers={200: openapi.ANY, 404: answers.Error})
def static_file(name: str) -> Response:
    return _file(name)


def _file(name: str) -> Response:
    """A file under STATIC, or 304 to who has it.

    Browsers ask each time whether a file has changed, but for vendored ones, whose path has their version.
    Raises NotFound for what is not there, or not under STATIC.
    """
    response = send_from_directory(
        STATIC,
        name,
        mimetype=MIMETYPES.get(Path(name).suffix),
        max_age=YEAR_S if name.startswith("vendor/") else None,
    )
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    return response
