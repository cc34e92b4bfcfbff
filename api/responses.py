"""OpenAI's Responses API: create, look up, follow, cancel, delete. A response is a job, by another name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from flask import Blueprint, Response, request

from api import answers, http, openapi, queries, streams
from api.callers import caller
from api.calls import Call
from api.services import Services, current, stopping
from wicore.admission import admit
from wicore.errors import (
    Cancelled,
    Conflict,
    Expired,
    InvalidRequest,
    QueueFull,
    UnknownJob,
    UnknownModel,
    UnknownResponse,
    WorkerLost,
)
from wicore.openai.published import response_schema
from wicore.openai.responses_api import (
    LOGPROBS,
    PREFIX,
    EventWriter,
    Item,
    ResponseBody,
    ResponseRequest,
    Stored,
    numbered,
    output_items,
    own_words,
    response_id,
    response_of,
    response_request,
)
from wicore.queue.producer import JobRecord, Submission
from wicore.request import STATUS_OF_TERMINAL, TERMINAL_TYPES, Event, Priority
from wicore.stream.relay import read_log

CANCEL_WAIT_S = 5.0
"""How long a cancel waits for the job's end: a running one ends with its worker's next step."""
ENDED = frozenset(STATUS_OF_TERMINAL.values())

door = Blueprint("responses", __name__, url_prefix="/v1/responses")


INCLUDE = openapi.Parameter(
    "include", {"type": "array", "items": {"const": LOGPROBS}}, "Beyond what is always there."
)


@door.post("")
@openapi.describe(
    "Create a response",
    tag="responses",
    body=openapi.Derived("ResponseRequest", ResponseBody, response_schema),
    answers=answers.ResponseView,
    stream=openapi.EVENTS,
    parameters=(openapi.IDEMPOTENCY_KEY,),
    errors=(UnknownModel, Conflict, Cancelled, QueueFull, WorkerLost, Expired),
    headers={"X-Job-Id": "The job that answers it."},
)
def create() -> Response:
    services = current()
    asked = response_request(http.read_json())
    earlier = _conversation(services, asked.form.previous_response_id)
    stored = asked.stored(earlier)
    if asked.form.stream:
        # Before the job is accepted: a refused stream must leave none behind.
        with services.slots.taken_for_response(caller().client):
            job = _accept(services, asked, stored, Priority.INTERACTIVE)
            call = _call(services, asked, job)
            pieces = _pieces(services, job.id, stored, call.batches(), lambda: False, http.request_id())
            response = streams.event_stream(services, pieces, call.abandon)
    else:
        with nullcontext() if asked.form.background else services.slots.taken(caller().client):
            job = _accept(services, asked, stored, Priority.NORMAL)
            if not asked.form.background:
                _call(services, asked, job).wait()
        response = http.reply(response_of(services.record(job.id, caller()), stored, services.model.name))
    response.headers["X-Job-Id"] = job.id
    return response


def _accept(services: Services, asked: ResponseRequest, stored: Stored, default: Priority) -> Submission:
    body = asked.job(stored.earlier, lambda body: admit(body, services.model, services.settings))
    kept = {"response": http.dumps(stored.as_json())} if asked.form.store else {}
    with own_words():
        return services.accept(body, default, caller(), http.idempotency_key(), kept)


def _call(services: Services, asked: ResponseRequest, job: Submission) -> Call:
    # A job in the background outlives its caller; a repeated call joins one that another may be waiting for.
    owns = job.created and not asked.form.background
    return Call(services, job.id, request.environ, timeout_s=asked.form.timeout_s, owns_job=owns)


def _conversation(services: Services, previous: str | None) -> list[Item]:
    """Everything said up to the end of a response. Raises InvalidRequest unless it is there and complete."""
    if previous is None:
        return []
    name = "previous_response_id"
    try:
        record, stored = _find(services, previous)
    except UnknownResponse as err:
        raise InvalidRequest(f"{name}: {err.message}", param=name) from None
    if record.result is None:
        status = response_of(record, stored, services.model.name)["status"]
        raise InvalidRequest(
            f"{name}: {previous} is {status}; it must be completed or incomplete to be followed up",
            param=name,
        )
    return [*_items(record, stored), *output_items(record.id, record.result)]


def _items(record: JobRecord, stored: Stored) -> list[Item]:
    return [*stored.earlier, *numbered(stored.input, record.id)]


def _find(services: Services, name: str) -> tuple[JobRecord, Stored]:
    """Raises UnknownResponse unless it is stored and the caller's."""
    try:
        record = services.record(name.removeprefix(PREFIX), caller()) if name.startswith(PREFIX) else None
    except UnknownJob:
        record = None
    # A batch's request keeps it, whether or not it asked for it, until it is answered.
    if record is None or record.response is None or not record.response["echo"]["store"]:
        raise _unknown(name)
    return record, Stored.from_json(record.response)


def _unknown(name: str) -> UnknownResponse:
    return UnknownResponse(
        f"No response {name!r:.140}: it never was, was not stored, was deleted, or has expired.", param="id"
    )


# --- one that is there ----------------------------------------------------------------------------


@door.get("/<name>")
@openapi.describe(
    "A response",
    tag="responses",
    answers=answers.ResponseView,
    stream=openapi.EVENTS,
    parameters=(
        openapi.Parameter("stream", {"type": "boolean"}, "As server-sent events, from the first on."),
        openapi.Parameter("starting_after", openapi.SEQ, "Only events after this one; of a stream."),
        INCLUDE,
        openapi.Parameter("include_obfuscation", {"const": False}, "Events are not padded."),
    ),
    errors=(UnknownResponse,),
)
def lookup(name: str) -> Response:
    queries.check_known("stream", "starting_after", "include", "include_obfuscation")
    services = current()
    record, stored = _find(services, name)
    _check_included(record)
    if queries.flag("include_obfuscation"):
        raise InvalidRequest("include_obfuscation: unsupported; leave it out", param="include_obfuscation")
    if queries.flag("stream"):
        return _resume(services, record, stored)
    if "starting_after" in request.args:
        raise InvalidRequest("starting_after: only allowed when stream is true", param="starting_after")
    return http.reply(_object(services, record, stored))


def _check_included(record: JobRecord) -> None:
    for wanted in queries.several("include"):
        if wanted != LOGPROBS:
            raise InvalidRequest(f"include: must be {LOGPROBS!r} (got {wanted!r:.60})", param="include")


def _resume(services: Services, record: JobRecord, stored: Stored) -> Response:
    given = request.args.get("starting_after")
    after = -1 if given is None else streams.sequence_number(given, "starting_after")
    batches = services.relay.follow(record.id, 0, streams.TICK_S)
    pieces = _pieces(services, record.id, stored, batches, stopping(), http.request_id(), after)
    with services.slots.taken_for_response(caller().client):
        response = streams.event_stream(services, pieces, lambda: None)
    response.headers["X-Job-Id"] = record.id
    return response


def _object(services: Services, record: JobRecord, stored: Stored) -> dict[str, Any]:
    partial: Sequence[Item] = ()
    if record.status in ENDED and record.result is None and record.seq > 1:
        writer = _writer(services, record, stored)
        for event in read_log(services.redis, record.id, prefix=services.settings.redis.prefix):
            writer.events(event)
        partial = writer.partial()
    return response_of(record, stored, services.model.name, partial)


@door.get("/<name>/input_items")
@openapi.describe(
    "What a response was asked",
    tag="responses",
    answers=answers.Items,
    parameters=(*openapi.page_of("items", 100), openapi.ORDER, INCLUDE),
    errors=(UnknownResponse,),
)
def input_items(name: str) -> Response:
    queries.check_known("limit", "order", "after", "include")
    record, stored = _find(current(), name)
    _check_included(record)
    limit = queries.number("limit", 20, 1, 100)
    items = _items(record, stored)
    if queries.order() == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    after = request.args.get("after")
    if after is not None and after not in ids:
        raise InvalidRequest(f"after: no item {after!r:.60} here", param="after")
    rest = items if after is None else items[ids.index(after) + 1 :]
    return http.reply(queries.page(rest[:limit], len(rest) > limit))


@door.post("/<name>/cancel")
@openapi.describe(
    "Cancel a response made in the background",
    tag="responses",
    answers=answers.ResponseView,
    errors=(InvalidRequest, UnknownResponse),
)
def cancel(name: str) -> Response:
    services = current()
    record, stored = _find(services, name)
    if not stored.background:
        raise InvalidRequest(
            "id: only a response created with background can be cancelled; a call ends with its connection",
            param="id",
        )
    if record.status not in ENDED:
        services.cancel(record.id, caller())
        _await_end(services, record.id)
        record, stored = _find(services, name)
    return http.reply(_object(services, record, stored))


def _await_end(services: Services, job_id: str) -> None:
    until = time.monotonic() + CANCEL_WAIT_S
    for batch in services.relay.follow(job_id, 0, streams.TICK_S):
        if time.monotonic() > until:
            return
        if batch and batch[-1]["type"] in TERMINAL_TYPES:
            return


@door.delete("/<name>")
@openapi.describe(
    "Delete a response", tag="responses", answers=answers.ResponseDeleted, errors=(UnknownResponse,)
)
def delete(name: str) -> Response:
    services = current()
    record, _ = _find(services, name)
    if not services.producer.forget(record.id):
        raise _unknown(name)
    return http.reply({"id": response_id(record.id), "object": "response", "deleted": True})


# --- the stream -----------------------------------------------------------------------------------


def _writer(services: Services, record: JobRecord, stored: Stored) -> EventWriter:
    return EventWriter(record.id, stored, services.model.name, record.created_ms // 1000)


def _pieces(
    services: Services,
    job_id: str,
    stored: Stored,
    batches: Iterable[list[Event]],
    stopping: Callable[[], bool],
    request_id: str,
    after: int = -1,
) -> Iterator[str]:
    """The stream's events numbered over `after`; it may end early when this process is told to stop."""
    writer = _writer(services, services.producer.record(job_id), stored)
    try:
        yield f": job {job_id}\n\n" + _written(writer.opening(), after)
        for batch in batches:
            finished_s = _finished_s(services, job_id) if _has_ended(batch) else None
            told = [event for one in batch for event in writer.events(one, finished_s)]
            yield _written(told, after)
            if stopping():
                return
    except Exception as err:
        yield _written([writer.error(http.as_wicore_error(err, request_id).body())], after)


def _has_ended(batch: Sequence[Event]) -> bool:
    return bool(batch) and batch[-1]["type"] in TERMINAL_TYPES


def _finished_s(services: Services, job_id: str) -> int | None:
    finished_ms = services.producer.record(job_id).finished_ms
    return None if finished_ms is None else finished_ms // 1000


def _written(events: Iterable[dict[str, Any]], after: int) -> str:
    wanted = [event for event in events if event["sequence_number"] > after]
    return "".join(f"event: {event['type']}\n{streams.data(event)}" for event in wanted)
