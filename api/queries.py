"""Query strings as OpenAI's clients write them: each known parameter once, anything else refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from flask import request

from api import streams
from wicore.errors import InvalidRequest
from wicore.queue.index import Order


def check_known(*names: str) -> None:
    """Raises InvalidRequest for a parameter that is not among `names`; `name[]` is a list's."""
    for name in request.args:
        if name.removesuffix("[]") not in names:
            raise InvalidRequest(f"{name}: unknown or unsupported parameter; remove it", param=name)


def flag(name: str) -> bool:
    """True or false; false if unsaid."""
    text = request.args.get(name, "false").lower()
    if text not in ("true", "false", "1", "0"):
        raise InvalidRequest(f"{name}: must be true or false (got {text!r:.60})", param=name)
    return text in ("true", "1")


def number(name: str, default: int, low: int, high: int) -> int:
    """A whole number from `low` to `high`."""
    value = streams.sequence_number(request.args.get(name, default), name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name}: must be from {low} to {high} (got {value})", param=name)
    return value


def order() -> Order:
    """Newest first if unsaid."""
    value = request.args.get("order", "desc")
    if value not in ("asc", "desc"):
        raise InvalidRequest(f"order: must be asc or desc (got {value!r:.60})", param="order")
    return cast(Order, value)


def several(name: str) -> list[str]:
    """The values of a list, in the three ways in which clients write one."""
    args = request.args
    return [*args.getlist(name), *args.getlist(f"{name}[]")]


def page(data: Sequence[Any], has_more: bool) -> dict[str, Any]:
    """OpenAI's list object; every entry has an `id`."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": list(data), "first_id": first, "last_id": last, "has_more": has_more}
