"""The job doors: submit, look up, list, cancel, follow."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flask import Blueprint, Response, request

from api import answers, http, openapi, streams
from api.callers import caller
from api.services import current, stopping
from wicore.errors import Conflict, InvalidRequest, QueueFull, UnknownJob, UnknownModel
from wicore.queue.producer import JobRecord, Submission
from wicore.request import STATUS_OF_TERMINAL, Event, JobBody, Priority, parse_job

ENDED = frozenset(STATUS_OF_TERMINAL.values())
STATUSES = ("queued", "running", *STATUS_OF_TERMINAL.values())
MAX_PAGE = 100

ACCEPTED_HEADERS = {"X-Job-Id": "The job's id.", "Location": "Its record."}

door = Blueprint("jobs", __name__, url_prefix="/v1/jobs")


@door.post("")
@openapi.describe(
    "Put a job on the queue",
    tag="jobs",
    notes="It outlives the connection, the API process and any worker, and ends in exactly one last event.",
    body=JobBody,
    answers={202: answers.JobAccepted},
    parameters=(openapi.IDEMPOTENCY_KEY,),
    errors=(UnknownModel, Conflict, QueueFull),
    headers=ACCEPTED_HEADERS,
)
def submit() -> Response:
    services = current()
    body = parse_job(http.read_json())
    return accepted(services.accept(body, Priority.NORMAL, caller(), http.idempotency_key()))


def accepted(job: Submission) -> Response:
    """202, with where to look."""
    answer = {
        "id": job.id,
        "object": "job",
        "status": job.status,
        "position": job.position,
        "estimated_wait_s": job.estimated_wait_s,
        "links": links(job.id),
    }
    return http.reply(answer, 202, {"X-Job-Id": job.id, "Location": f"/v1/jobs/{job.id}"})


@door.get("/<job_id>")
@openapi.describe("A job's record", tag="jobs", answers=answers.Job, errors=(UnknownJob,))
def lookup(job_id: str) -> Response:
    return http.reply(public(current().record(job_id, caller())))


@door.get("")
@openapi.describe(
    "List jobs",
    tag="jobs",
    answers=answers.Jobs,
    parameters=(
        openapi.Parameter("status", {"type": "string", "enum": list(STATUSES)}, "Only these."),
        *openapi.page_of("jobs", MAX_PAGE),
    ),
    errors=(UnknownJob,),
)
def listing() -> Response:
    status = request.args.get("status")
    if status is not None and status not in STATUSES:
        raise InvalidRequest(f"status: must be one of {', '.join(STATUSES)} (got {status!r})", param="status")
    limit = page_size()
    # One more than asked for, to know whether more follow.
    found = current().records(status, limit + 1, request.args.get("after"), caller())
    page = [public(record) for record in found[:limit]]
    return http.reply({"object": "list", "data": page, "has_more": len(found) > limit})


def page_size() -> int:
    """The query's `limit`. Raises InvalidRequest unless it is from 1 to MAX_PAGE."""
    limit = streams.sequence_number(request.args.get("limit", 20), "limit")
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"limit: must be from 1 to {MAX_PAGE} (got {limit})", param="limit")
    return limit


@door.delete("/<job_id>")
@openapi.describe(
    "Cancel a job",
    tag="jobs",
    notes="Idempotent. A waiting job ends at once, a running one at its next step; one that has ended stays.",
    answers=answers.Job,
    errors=(UnknownJob,),
)
def cancel(job_id: str) -> Response:
    services = current()
    services.cancel(job_id, caller())
    return http.reply(public(services.record(job_id, caller())))


@door.get("/<job_id>/events")
@openapi.describe(
    "A job's events, as server-sent events",
    tag="jobs",
    notes="First those in the log, then live ones, each once. 204: the job has ended, and no event is left.",
    answers={200: openapi.EVENTS, 204: None},
    parameters=(openapi.FROM, openapi.LAST_EVENT_ID),
    errors=(UnknownJob,),
)
def events(job_id: str) -> Response:
    services = current()
    first = streams.first_wanted()
    batches = services.relay.follow(job_id, first - 1, streams.TICK_S)
    if services.record(job_id, caller()).status in ENDED:
        head = next(batches, None)
        if head is None:
            # Tells an EventSource that reconnects after the last event to stop doing so.
            return Response(status=204)
        batches = itertools.chain([head], batches)
    is_stopping, who = stopping(), caller()
    pieces = _pieces(
        job_id, batches, lambda: is_stopping() or not services.keys.is_live(who), http.request_id()
    )
    with services.slots.taken_for_response(who.client):
        response = streams.event_stream(services, pieces, lambda: None)
    response.headers["X-Job-Id"] = job_id
    return response


def _pieces(
    job_id: str, batches: Iterable[list[Event]], leaves: Callable[[], bool], request_id: str
) -> Iterator[str]:
    yield f": job {job_id}\n\n"
    try:
        for batch in batches:
            yield "".join(streams.data(event, event["seq"]) for event in batch)
            if leaves():
                return
    except Exception as err:
        yield streams.data({"type": "error", "error": http.as_wicore_error(err, request_id).body()})


def links(job_id: str) -> dict[str, str]:
    base = f"/v1/jobs/{job_id}"
    return {"self": base, "events": f"{base}/events", "stream": f"{base}/stream"}


def public(record: JobRecord) -> dict[str, Any]:
    return {"object": "job", **record.public(), "links": links(record.id)}
