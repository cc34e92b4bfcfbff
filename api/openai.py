"""OpenAI's doors: chat completions, completions, models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flask import Blueprint, Response, request
from pydantic import BaseModel

from api import answers, http, openapi, streams
from api.callers import caller
from api.openapi import Schema, View
from api.services import Services, current
from wicore.admission import check_model
from wicore.errors import Cancelled, Conflict, Expired, QueueFull, UnknownModel, WorkerLost
from wicore.openai import ChunkWriter, OpenAIRequest, chat_request, completion_request
from wicore.openai.published import chat_schema, completion_schema
from wicore.request import TERMINAL_TYPES, Event, JobBody, Priority

EXPIRY_GRACE_S = 5.0
"""How much longer than the job's own deadline a caller waits before giving the job up."""

door = Blueprint("openai", __name__, url_prefix="/v1")


def _described(
    name: str, answer: type[BaseModel], make: Callable[[Schema], Schema]
) -> Callable[[View], View]:
    return openapi.describe(
        f"OpenAI's {name}",
        tag="openai",
        body=openapi.Derived(answer.__name__ + "Request", JobBody, make),
        answers=answer,
        stream=openapi.EVENTS,
        parameters=(openapi.IDEMPOTENCY_KEY,),
        errors=(UnknownModel, Conflict, Cancelled, QueueFull, WorkerLost, Expired),
        headers={"X-Job-Id": "The job that answers it."},
    )


@door.post("/chat/completions")
@_described("chat completions", answers.ChatCompletion, chat_schema)
def chat_completions() -> Response:
    return _answer(chat_request(http.read_json()))


@door.post("/completions")
@_described("completions", answers.TextCompletion, completion_schema)
def completions() -> Response:
    return _answer(completion_request(http.read_json()))


def _answer(asked: OpenAIRequest) -> Response:
    services = current()
    if asked.stream:
        # Before the job is accepted: a refused stream must leave none behind.
        with services.slots.taken_for_response():
            call = _accept(services, asked, Priority.INTERACTIVE)
            response = streams.event_stream(services, call.pieces(), call.abandon)
    else:
        call = _accept(services, asked, Priority.NORMAL)
        response = http.reply(call.wait())
    response.headers["X-Job-Id"] = call.job_id
    return response


def _accept(services: Services, asked: OpenAIRequest, default: Priority) -> _Call:
    job = services.accept(asked.body, default, caller(), http.idempotency_key())
    # A repeated call joins a job that another call may be waiting for: then it is not ours to cancel.
    return _Call(services, job.id, asked, request.environ, http.request_id(), owns_job=job.created)


class _Call:
    """A client that waits for one job."""

    def __init__(
        self,
        services: Services,
        job_id: str,
        asked: OpenAIRequest,
        environ: Mapping[str, Any],
        request_id: str,
        *,
        owns_job: bool,
    ) -> None:
        self._services = services
        self.job_id = job_id
        self._asked = asked
        self._environ = environ
        self._request_id = request_id
        self._owns_job = owns_job
        self._ended = False
        timeout_s = asked.body.timeout_s
        self._give_up_at = None if timeout_s is None else time.monotonic() + timeout_s + EXPIRY_GRACE_S

    def wait(self) -> dict[str, Any]:
        """The job's result. Raises the error that it ended with, or Cancelled when the client left."""
        for batch in self._batches():
            if batch and (error := streams.failure(batch[-1])):
                raise error
        result = self._services.producer.record(self.job_id).result
        assert result is not None  # `done` and the result are stored in one step
        return result

    def pieces(self) -> Iterator[str]:
        """The job as OpenAI's stream; a failure is sent as an `error` event, since the status is gone."""
        body, model = self._asked.body, self._services.model.name
        writer = ChunkWriter(self.job_id, body.kind, model, int(time.time()), self._asked.include_usage)
        yield f": job {self.job_id}\n\n" + "".join(map(streams.data, writer.opening(body.n)))
        try:
            for batch in self._batches():
                yield "".join(streams.data(chunk) for event in batch for chunk in writer.chunks(event))
                if batch and (error := streams.failure(batch[-1])):
                    raise error
        except Exception as err:
            yield streams.data({"error": http.as_wicore_error(err, self._request_id).body()})
        else:
            yield "data: [DONE]\n\n"

    def abandon(self) -> None:
        """Cancel the job if its client left before the end and `api.cancel_on_disconnect` says so.

        A response is also closed early when this process is told to stop; its job lives on then.
        """
        wanted = self._owns_job and self._services.settings.api.cancel_on_disconnect
        if wanted and not self._ended and http.client_gone(self._environ):
            self._services.producer.cancel(self.job_id)

    def _batches(self) -> Iterator[list[Event]]:
        """The job's events up to its end, an empty list for each idle tick."""
        look_at = time.monotonic() + streams.TICK_S
        for batch in self._services.relay.follow(self.job_id, 0, streams.TICK_S):
            self._ended = bool(batch) and batch[-1]["type"] in TERMINAL_TYPES
            yield batch
            # By the clock, too: a job that never pauses gives no idle tick.
            if not self._ended and (not batch or time.monotonic() >= look_at):
                self._check_waiting()
                look_at = time.monotonic() + streams.TICK_S

    def _check_waiting(self) -> None:
        if http.client_gone(self._environ):
            self.abandon()
            raise Cancelled("The client closed the connection")
        if self._give_up_at is not None and time.monotonic() > self._give_up_at:
            if self._owns_job:
                self._services.producer.cancel(self.job_id)
            raise Expired(f"timeout_s: the job did not finish within {self._asked.body.timeout_s:g} s")


@door.get("/models")
@openapi.describe("The model that is served, as OpenAI lists models", tag="openai", answers=answers.Models)
def models() -> Response:
    return http.reply({"object": "list", "data": [_model(current())]})


@door.get("/models/<path:name>")
@openapi.describe("A model", tag="openai", answers=answers.Model, errors=(UnknownModel,))
def model(name: str) -> Response:
    services = current()
    check_model(name, services.model)
    return http.reply(_model(services))


def _model(services: Services) -> dict[str, Any]:
    served = services.model
    return {
        "id": served.name,
        "object": "model",
        "created": served.created_s,
        "owned_by": "wicore",
        "max_context": served.context,
    }
