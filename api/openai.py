"""OpenAI's doors: chat completions, completions, models."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flask import Blueprint, Response, request

from api import http, streams
from api.callers import caller
from api.services import Services, current
from wicore.admission import check_model
from wicore.errors import Cancelled, Expired
from wicore.openai import (
    ChunkWriter,
    OpenAIRequest,
    chat_request,
    completion_id,
    completion_request,
    summed_usage,
)
from wicore.queue.producer import Submission
from wicore.request import TERMINAL_TYPES, Event, Priority
from wicore.text.prompt import prompt_text

EXPIRY_GRACE_S = 5.0
"""How much longer than the job's own deadline a caller waits before giving the job up."""

door = Blueprint("openai", __name__, url_prefix="/v1")


@door.post("/chat/completions")
def chat_completions() -> Response:
    return _answer(chat_request(http.read_json()))


@door.post("/completions")
def completions() -> Response:
    return _answer(completion_request(http.read_json()))


def _answer(asked: OpenAIRequest) -> Response:
    services = current()
    if asked.stream:
        # Before the jobs are accepted: a refused stream must leave none behind.
        with services.slots.taken_for_response():
            call = _accept(services, asked, Priority.INTERACTIVE)
            response = streams.event_stream(services, call.pieces(), call.abandon)
    else:
        call = _accept(services, asked, Priority.NORMAL)
        response = http.reply(call.wait())
    response.headers["X-Job-Id"] = ", ".join(call.job_ids)
    return response


def _accept(services: Services, asked: OpenAIRequest, default: Priority) -> _Call:
    """All jobs of a call, or none. A key is spent on the first; no key of a client's has a space."""
    who, key = caller(), http.idempotency_key()
    jobs: list[Submission] = []
    try:
        for i, body in enumerate(asked.bodies):
            jobs.append(services.accept(body, default, who, f"{key} {i}" if key and i else key))
    except Exception:
        for job in jobs:
            if job.created:
                services.producer.cancel(job.id)
        raise
    return _Call(services, jobs, asked, request.environ, http.request_id())


class _Call:
    """A client that waits for the jobs of one request."""

    def __init__(
        self,
        services: Services,
        jobs: Sequence[Submission],
        asked: OpenAIRequest,
        environ: Mapping[str, Any],
        request_id: str,
    ) -> None:
        self._services = services
        self.job_ids = [job.id for job in jobs]
        self._asked = asked
        self._environ = environ
        self._request_id = request_id
        # A repeated call joins jobs that another call may be waiting for: then they are not ours to cancel.
        self._ours = {job.id for job in jobs if job.created}
        """Those that have not ended, as far as we know."""
        timeout_s = asked.bodies[0].timeout_s
        self._give_up_at = None if timeout_s is None else time.monotonic() + timeout_s + EXPIRY_GRACE_S

    def wait(self) -> dict[str, Any]:
        """The jobs' one answer. Raises the error that one of them ended with, which ends the others, or
        Cancelled when the client left."""
        results = []
        for job_id in self.job_ids:
            for batch in self._batches(job_id):
                if batch and (error := streams.failure(batch[-1])):
                    self._cancel()
                    raise error
            result = self._services.producer.record(job_id).result
            assert result is not None  # `done` and the result are stored in one step
            results.append(result)
        return self._asked.answer(results)

    def pieces(self) -> Iterator[str]:
        """The jobs, one after the other, as OpenAI's stream; a failure is sent as an `error` event, since the
        status is gone."""
        writers = self._writers()
        n = self._asked.bodies[0].n
        yield f": job {', '.join(self.job_ids)}\n\n" + "".join(
            streams.data(chunk) for writer in writers for chunk in writer.opening(n)
        )
        usages = []
        try:
            for writer in writers:
                for batch in self._batches(writer.job_id):
                    yield "".join(streams.data(chunk) for event in batch for chunk in writer.chunks(event))
                    if batch and (error := streams.failure(batch[-1])):
                        self._cancel()
                        raise error
                usages.append(batch[-1]["usage"])
            if self._asked.include_usage:
                yield streams.data(writers[0].usage(summed_usage(usages)))
        except Exception as err:
            yield streams.data({"error": http.as_wicore_error(err, self._request_id).body()})
        else:
            yield "data: [DONE]\n\n"

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

    def abandon(self) -> None:
        """Cancel the jobs if their client left before the end and `api.cancel_on_disconnect` says so.

        A response is also closed early when this process is told to stop; its jobs live on then.
        """
        wanted = bool(self._ours) and self._services.settings.api.cancel_on_disconnect
        if wanted and http.client_gone(self._environ):
            self._cancel()

    def _cancel(self) -> None:
        for job_id in self._ours:
            self._services.producer.cancel(job_id)

    def _batches(self, job_id: str) -> Iterator[list[Event]]:
        """A job's events up to its end, an empty list for each idle tick."""
        look_at = time.monotonic() + streams.TICK_S
        for batch in self._services.relay.follow(job_id, 0, streams.TICK_S):
            ended = bool(batch) and batch[-1]["type"] in TERMINAL_TYPES
            if ended:
                self._ours.discard(job_id)
            yield batch
            # By the clock, too: a job that never pauses gives no idle tick.
            if not ended and (not batch or time.monotonic() >= look_at):
                self._check_waiting()
                look_at = time.monotonic() + streams.TICK_S

    def _check_waiting(self) -> None:
        if http.client_gone(self._environ):
            self.abandon()
            raise Cancelled("The client closed the connection")
        if self._give_up_at is not None and time.monotonic() > self._give_up_at:
            self._cancel()
            timeout_s = self._asked.bodies[0].timeout_s
            raise Expired(f"timeout_s: the job did not finish within {timeout_s:g} s")


@door.get("/models")
def models() -> Response:
    return http.reply({"object": "list", "data": [_model(current())]})


@door.get("/models/<path:name>")
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
