"""The dead-letter doors: list, look at, try again, throw away."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, request

from api import answers, http, jobs, openapi
from api.services import current
from wicore.errors import InvalidRequest, QueueFull, UnknownDeadLetter
from wicore.queue.dead import DeadLetter

door = Blueprint("dead", __name__, url_prefix="/v1/dead")


@door.get("")
@openapi.describe(
    "List dead letters",
    tag="dead letters",
    answers=answers.DeadLetters,
    parameters=openapi.page_of("letters", jobs.MAX_PAGE, id_pattern="^[0-9]{1,15}-[0-9]{1,15}$"),
)
def listing() -> Response:
    limit = jobs.page_size()
    # One more than asked for, to know whether more follow.
    found = current().dead.list(limit + 1, request.args.get("after"))
    page = [_public(letter) for letter in found[:limit]]
    return http.reply({"object": "list", "data": page, "has_more": len(found) > limit})


@door.get("/<letter_id>")
@openapi.describe(
    "A dead letter, whole", tag="dead letters", answers=answers.DeadLetterView, errors=(UnknownDeadLetter,)
)
def lookup(letter_id: str) -> Response:
    return http.reply(_public(current().dead.get(letter_id)))


@door.post("/<letter_id>/retry")
@openapi.describe(
    "Try a dead letter again, as a new job",
    tag="dead letters",
    notes="Idempotent: a repeat gives the same job.",
    answers={202: answers.JobAccepted},
    errors=(InvalidRequest, UnknownDeadLetter, QueueFull),
    headers=jobs.ACCEPTED_HEADERS,
)
def retry(letter_id: str) -> Response:
    return jobs.accepted(current().dead.retry(letter_id))


@door.delete("/<letter_id>")
@openapi.describe(
    "Drop a dead letter", tag="dead letters", answers=answers.DeadLetterDropped, errors=(UnknownDeadLetter,)
)
def drop(letter_id: str) -> Response:
    current().dead.drop(letter_id)
    return http.reply({"object": "dead_letter", "id": letter_id, "dropped": True})


@door.delete("")
@openapi.describe("Drop all dead letters", tag="dead letters", answers=answers.AllDropped)
def drop_all() -> Response:
    return http.reply({"object": "list", "dropped": current().dead.drop_all()})


def _public(letter: DeadLetter) -> dict[str, Any]:
    return {"object": "dead_letter", **letter.public()}
