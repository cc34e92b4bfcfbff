"""Headers that say what is left of a key's limits, under OpenAI's names."""

from __future__ import annotations

from collections.abc import Iterator

from flask import Flask, Response, g, has_request_context

from wicore.access.rates import Rates


def remember(rates: Rates) -> None:
    """What the answer to the current request shall say; outside of a request nothing."""
    if has_request_context():
        g.rates = rates


def install(app: Flask) -> None:
    app.after_request(_tell)


def _tell(response: Response) -> Response:
    response.headers.extend(list(headers(g.get("rates", ()))))
    return response


def headers(rates: Rates) -> Iterator[tuple[str, str]]:
    """Pure."""
    for rate in rates:
        yield f"X-RateLimit-Limit-{rate.name.title()}", str(rate.limit)
        yield f"X-RateLimit-Remaining-{rate.name.title()}", str(rate.remaining)
        yield f"X-RateLimit-Reset-{rate.name.title()}", duration(rate.reset_ms)


def duration(ms: int) -> str:
    """As OpenAI writes it: 80ms, 1.5s, 6m0s."""
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    return f"{minutes}m{rest // 1000}s" if minutes else f"{rest / 1000:g}s"
