"""Doors about the service itself: alive, able to serve, what a prompt's tokens are."""

from __future__ import annotations

from typing import Annotated

from flask import Blueprint, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from api import answers, http, openapi
from api.callers import caller
from api.services import current
from wicore.admission import check_images, check_model, image_limits
from wicore.errors import InvalidRequest, UnknownModel, WicoreError
from wicore.request import JobBody, Message, Text, parse_model
from wicore.text.prompt import prompt_ids

door = Blueprint("service", __name__)


@door.get("/health")
@openapi.describe("Whether the process is alive", tag="service", answers=answers.Health)
def health() -> Response:
    """The process is alive; nothing else is looked at."""
    return http.reply({"status": "ok"})


@door.get("/ready")
@openapi.describe(
    "Whether a request sent now would be served",
    tag="service",
    answers={200: answers.Readiness, 503: answers.Readiness},
)
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


_EITHER: JsonDict = {
    "oneOf": [
        {"properties": {"prompt": {"type": "string"}, "messages": {"type": "null"}}, "required": ["prompt"]},
        {"properties": {"prompt": {"type": "null"}, "messages": {"type": "array"}}, "required": ["messages"]},
    ]
}


class TokenizeForm(BaseModel):
    """A prompt, or a chat."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, json_schema_extra=_EITHER)

    model: Text | None = None
    prompt: Annotated[Text | None, Field(min_length=1)] = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None


@door.post("/v1/tokenize")
@openapi.describe(
    "The tokens of a prompt", tag="service", body=TokenizeForm, answers=answers.Tokens, errors=(UnknownModel,)
)
def tokenize() -> Response:
    services = current()
    form = parse_model(TokenizeForm, http.read_json())
    check_model(form.model, services.model)
    if (form.prompt is None) == (form.messages is None):
        raise InvalidRequest("prompt: send either prompt or messages", param="prompt")
    services.check_model_allowed(caller().limits)
    services.spend(caller())
    if form.messages is None:
        body = JobBody(kind="completion", prompt=form.prompt)
    else:
        body = JobBody(kind="chat", messages=form.messages)
    check_images(body, services.model, services.settings.model)
    model, limits = services.model, image_limits(services.settings.model)
    config = model.checkpoint.config
    ids, _ = prompt_ids(body, model.tokenizer, config, model.context, limits)
    # What stands for an image in the model's vocabulary: negative ids are our own.
    soft = None if config.vision is None else config.vision.soft_token_id
    return http.reply({"tokens": [soft if one < 0 else one for one in ids], "count": len(ids)})
