"""The dead-letter doors: list, look at, try again, throw away."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, request

from api import http, jobs
from api.services import current
from wicore.queue.dead import DeadLetter

door = Blueprint("dead", __name__, url_prefix="/v1/dead")


@door.get("")
def listing() -> Response:
    limit = jobs.page_size()
    # One more than asked for, to know whether more follow.
    found = current().dead.list(limit + 1, request.args.get("after"))
    page = [_public(letter) for letter in found[:limit]]
    return http.reply({"object": "list", "data": page, "has_more": len(found) > limit})


@door.get("/<letter_id>")
def lookup(letter_id: str) -> Response:
    return http.reply(_public(current().dead.get(letter_id)))


@door.post("/<letter_id>/retry")
def retry(letter_id: str) -> Response:
    return jobs.accepted(current().dead.retry(letter_id))


@door.delete("/<letter_id>")
def drop(letter_id: str) -> Response:
    current().dead.drop(letter_id)
    return http.reply({"object": "dead_letter", "id": letter_id, "dropped": True})


@door.delete("")
def drop_all() -> Response:
    return http.reply({"object": "list", "dropped": current().dead.drop_all()})


def _public(letter: DeadLetter) -> dict[str, Any]:
    return {"object": "dead_letter", **letter.public()}
