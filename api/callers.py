"""Which doors ask who calls, and who that is."""

from __future__ import annotations

from typing import cast

from flask import Flask, g, request

from api import browsers
from api.keyring import Caller
from api.services import current
from wicore.errors import Forbidden

__all__ = ["SUBPROTOCOL", "Caller", "caller", "install"]

OPEN = frozenset({"/", "/health", "/ready", "/openapi.json", "/docs"})
"""Doors that ask for no key, by their rule; so do the files of the page. They tell nothing of anybody."""
FILES = "/static/"
OPERATORS = ("/status", "/metrics", "/v1/dead")
"""What begins so is for operators: it tells of everybody."""

SUBPROTOCOL = "wicore"
KEY_SUBPROTOCOL = "wicore-key."
"""A browser can give a websocket no header, but names of subprotocols: `wicore` and this with the key."""


def caller() -> Caller:
    """Of the current request. Raises Unauthenticated when it must say who it is, and did not."""
    if "caller" not in g:
        g.caller = current().keys.identify(_presented_key())
    return cast(Caller, g.caller)


def install(app: Flask) -> None:
    """Let nobody through to a door that is not open without a key, where keys are asked for."""
    app.before_request(_admit)


def is_open(rule: str) -> bool:
    """Whether a door, by its rule, asks for no key."""
    return rule in OPEN or rule.startswith(FILES)


def _admit() -> None:
    rule = request.url_rule.rule if request.url_rule is not None else None
    if rule is None or is_open(rule):
        return
    if request.method == "OPTIONS":  # comes without a key before a page's call; Flask answers it
        return
    if not caller().keyed:
        browsers.check_origin(current().settings.api)
    if not caller().admin and rule.startswith(OPERATORS):
        raise Forbidden(f"{rule}: only for operators' keys (made by `wicore keys create NAME --admin`)")


def _presented_key() -> str | None:
    header = request.headers.get("Authorization")
    if header is not None:
        scheme, _, key = header.partition(" ")
        return key.strip() if scheme.lower() == "bearer" else header
    offered = request.headers.get("Sec-WebSocket-Protocol", "")
    for name in map(str.strip, offered.split(",")):
        if name.startswith(KEY_SUBPROTOCOL):
            return name.removeprefix(KEY_SUBPROTOCOL)
    return None
