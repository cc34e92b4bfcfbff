"""Doors about the service itself: alive, able to serve, what a prompt's tokens are."""

from __future__ import annotations

from typing import Annotated

from flask import Blueprint, Response
from pydantic import BaseModel, ConfigDict, Field

from api import http
from api.callers import caller
from api.services import current
from wicore.admission import check_model
from wicore.errors import InvalidRequest, WicoreError
from wicore.request import JobBody, Message, Text, parse_model
from wicore.text.prompt import prompt_ids

door = Blueprint("service", __name__)


@door.get("/health")
def health() -> Response:
    """The process is alive; nothing else is looked at."""
    return http.reply({"status": "ok"})


@door.get("/ready")
def ready() -> Response:
    """200 when a request sent now would be served; otherwise 503 and what is missing."""
    missing = []
    workers = 0
    try:
        services = current()
        workers = len(services.workers())
        if not workers:
            missing.append(f"no live worker serves {services.model.name!r}; start one with `wicore worker`")
    except WicoreError as err:
        missing.append(err.message)
    answer = {"ready": not missing, "workers": workers, "missing": missing}
    return http.reply(answer, 503 if missing else 200, {"Retry-After": "2"} if missing else None)


class _TokenizeForm(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: Text | None = None
    prompt: Annotated[Text | None, Field(min_length=1)] = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None


@door.post("/v1/tokenize")
def tokenize() -> Response:
    services = current()
    form = parse_model(_TokenizeForm, http.read_json())
    check_model(form.model, services.model)
    if (form.prompt is None) == (form.messages is None):
        raise InvalidRequest("prompt: send either prompt or messages", param="prompt")
    services.check_model_allowed(caller().limits)
    services.spend(caller())
    if form.messages is None:
        body = JobBody(kind="completion", prompt=form.prompt)
    else:
        body = JobBody(kind="chat", messages=form.messages)
    tokens = prompt_ids(body, services.model.tokenizer, services.model.context)
    return http.reply({"tokens": tokens, "count": len(tokens)})
