"""OpenAI's doors: chat completions, completions, models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flask import Blueprint, Response, request
from pydantic import BaseModel

from api import answers, http, openapi, streams
from api.callers import caller
from api.calls import Call
from api.openapi import Schema, View
from api.services import Services, current
from wicore.admission import check_model, image_limits, takes_images
from wicore.errors import (
    Cancelled,
    Conflict,
    Expired,
    QueueFull,
    Unavailable,
    UnknownModel,
    WicoreError,
    WorkerLost,
)
from wicore.openai import (
    ChunkWriter,
    OpenAIRequest,
    chat_request,
    completion_id,
    completion_request,
    summed_usage,
)
from wicore.openai.published import chat_schema, completion_schema
from wicore.request import JobBody, Priority
from wicore.text.prompt import prompt_text

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
    return _respond(chat_request(http.read_json()))


@door.post("/completions")
@_described("completions", answers.TextCompletion, completion_schema)
def completions() -> Response:
    return _respond(completion_request(http.read_json()))


def _respond(asked: OpenAIRequest) -> Response:
    services = current()
    if asked.stream:
        # Before the jobs are accepted: a refused stream must leave none behind.
        with services.slots.taken_for_response(caller().client):
            answer = _accept(services, asked, Priority.INTERACTIVE)
            response = streams.event_stream(services, answer.pieces(), answer.abandon)
    else:
        with services.slots.taken(caller().client):
            answer = _accept(services, asked, Priority.NORMAL)
            response = http.reply(answer.whole())
    response.headers["X-Job-Id"] = ", ".join(answer.job_ids)
    return response


def _accept(services: Services, asked: OpenAIRequest, default: Priority) -> _Answer:
    """All jobs of a request, or none."""
    who, key, environ = caller(), http.idempotency_key(), request.environ
    calls: list[Call] = []
    try:
        for i, body in enumerate(asked.bodies):
            # No key of a client's has a space.
            job = services.accept(body, default, who, f"{key} {i}" if key and i else key)
            # A repeated request joins a job that another may be waiting for: then it is not ours to cancel.
            calls.append(Call(services, job.id, environ, timeout_s=body.timeout_s, owns_job=job.created))
    except Exception:
        for call in calls:
            call.cancel()
        raise
    return _Answer(services, calls, asked, environ, http.request_id())


class _Answer:
    """What a client waits for: jobs, one for each prompt, with one answer."""

    def __init__(
        self,
        services: Services,
        calls: Sequence[Call],
        asked: OpenAIRequest,
        environ: Mapping[str, Any],
        request_id: str,
    ) -> None:
        self._services = services
        self._calls = calls
        self._asked = asked
        self._environ = environ
        self._request_id = request_id

    @property
    def job_ids(self) -> list[str]:
        return [call.job_id for call in self._calls]

    def whole(self) -> dict[str, Any]:
        """The answer of a request that does not stream. Raises as `Call.wait` does, of any of the jobs."""
        results = []
        try:
            for call in self._calls:
                result = call.wait().result
                assert result is not None  # `done` and the result are stored in one step
                results.append(result)
        except WicoreError as err:
            self._end_others(err)
            raise
        return self._asked.answer(results)

    def pieces(self) -> Iterator[str]:
        """The jobs, one after the other, as OpenAI's stream; a failure is sent as an `error` event, since the
        status is gone."""
        writers, n = self._writers(), self._asked.bodies[0].n
        opening = [chunk for writer in writers for chunk in writer.opening(n)]
        yield f": job {', '.join(self.job_ids)}\n\n" + "".join(map(streams.data, opening))
        usages = []
        try:
            for call, writer in zip(self._calls, writers, strict=True):
                for batch in call.batches():
                    yield "".join(streams.data(chunk) for event in batch for chunk in writer.chunks(event))
                    if batch and (error := streams.failure(batch[-1])):
                        self._end_others(error)
                        raise error
                usages.append(batch[-1]["usage"])
            if self._asked.include_usage:
                yield streams.data(writers[0].usage(summed_usage(usages)))
        except Exception as err:
            yield streams.data({"error": http.as_wicore_error(err, self._request_id).body()})
        else:
            yield "data: [DONE]\n\n"

    def abandon(self) -> None:
        """Cancel the jobs if their client left, as `Call.abandon` does."""
        for call in self._calls:
            call.abandon()

    def _end_others(self, err: WicoreError) -> None:
        """Nobody wants the other jobs when one did not succeed, but when we only lost sight of it."""
        if isinstance(err, Unavailable):
            return
        if http.client_gone(self._environ):
            self.abandon()
            return
        for call in self._calls:
            call.cancel()

    def _writers(self) -> list[ChunkWriter]:
        """One for each job, in order."""
        asked, model = self._asked, self._services.model
        created_s = int(time.time())
        return [
            ChunkWriter(
                job_id,
                body.kind,
                model.name,
                created_s,
                completion_id(self.job_ids[0], body.kind),
                include_usage=asked.include_usage,
                fingerprint=model.fingerprint,
                service_tier=asked.service_tier,
                first_index=i * body.n,
                echo=prompt_text(body, model.tokenizer) if body.echo else "",
                use=body.tool_use(),
            )
            for i, (job_id, body) in enumerate(zip(self.job_ids, asked.bodies, strict=True))
        ]


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
    served, limits = services.model, image_limits(services.settings.model)
    sees = takes_images(served, services.settings.model)
    most = {"images": limits.count, "bytes": limits.bytes, "pixels": limits.pixels}
    return {
        "id": served.name,
        "object": "model",
        "created": served.created_s,
        "owned_by": "wicore",
        "max_context": served.context,
        "input_modalities": ["text", "image"] if sees else ["text"],
        "image_limits": most if sees else None,
    }
