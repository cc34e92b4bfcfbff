"""OpenAI's doors: chat completions, completions, models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flask import Blueprint, Response, request
from pydantic import BaseModel

from api import answers, http, openapi, streams
from api.callers import caller
from api.calls import Call
from api.openapi import Schema, View
from api.services import Services, current
from wicore.admission import check_model
from wicore.errors import Cancelled, Conflict, Expired, QueueFull, UnknownModel, WorkerLost
from wicore.openai import ChunkWriter, OpenAIRequest, chat_request, completion_request
from wicore.openai.published import chat_schema, completion_schema
from wicore.request import JobBody, Priority

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
        response = http.reply(call.result())
    response.headers["X-Job-Id"] = call.job_id
    return response


def _accept(services: Services, asked: OpenAIRequest, default: Priority) -> _Call:
    job = services.accept(asked.body, default, caller(), http.idempotency_key())
    # A repeated call joins a job that another call may be waiting for: then it is not ours to cancel.
    return _Call(services, job.id, asked, request.environ, http.request_id(), owns_job=job.created)


class _Call(Call):
    """A client that waits for one job of OpenAI's doors."""

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
        super().__init__(services, job_id, environ, timeout_s=asked.body.timeout_s, owns_job=owns_job)
        self._asked = asked
        self._request_id = request_id

    def result(self) -> dict[str, Any]:
        """The job's result. Raises as `wait` does."""
        result = self.wait().result
        assert result is not None  # `done` and the result are stored in one step
        return result

    def pieces(self) -> Iterator[str]:
        """The job as OpenAI's stream; a failure is sent as an `error` event, since the status is gone."""
        body, model = self._asked.body, self._services.model.name
        writer = ChunkWriter(self.job_id, body.kind, model, int(time.time()), self._asked.include_usage)
        yield f": job {self.job_id}\n\n" + "".join(map(streams.data, writer.opening(body.n)))
        try:
            for batch in self.batches():
                yield "".join(streams.data(chunk) for event in batch for chunk in writer.chunks(event))
                if batch and (error := streams.failure(batch[-1])):
                    raise error
        except Exception as err:
            yield streams.data({"error": http.as_wicore_error(err, self._request_id).body()})
        else:
            yield "data: [DONE]\n\n"


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
