"""OpenAI's batches: create, look up, list, cancel. workers/batches.py carries them out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from flask import Blueprint, Response, request
from pydantic import BaseModel, ConfigDict, Field

from api import answers, http, openapi, queries
from api.callers import caller
from api.files import ExpiresAfter
from api.services import current
from wicore.batches.record import Endpoint
from wicore.errors import Conflict, InvalidRequest, QueueFull, UnknownBatch, UnknownFile, UnknownModel
from wicore.files import MAX_LIFETIME_S
from wicore.openai.published import nullable
from wicore.openai.responses_api.request import Metadata
from wicore.request import Text, parse_model

MAX_PAGE = 100

door = Blueprint("batches", __name__, url_prefix="/v1/batches")


class BatchBody(BaseModel):
    """The body of `POST /v1/batches`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    input_file_id: Annotated[Text, Field(max_length=256)]
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata = Field(default_factory=dict, max_length=16)
    output_expires_after: ExpiresAfter | None = None


@door.post("")
@openapi.describe(
    "Create a batch",
    tag="batches",
    body=openapi.Derived("BatchRequest", BatchBody, nullable),
    answers=answers.Batch,
    errors=(UnknownModel, QueueFull),
)
def create() -> Response:
    services, who = current(), caller()
    data = http.read_json()
    if isinstance(data, Mapping):
        known = BatchBody.model_fields
        data = {name: value for name, value in data.items() if value is not None or name not in known}
    form = parse_model(BatchBody, data)
    try:
        file = services.file(form.input_file_id, who)
    except UnknownFile as err:
        raise InvalidRequest(f"input_file_id: {err.message}", param="input_file_id") from None
    if file.purpose != "batch":
        raise InvalidRequest(
            f"input_file_id: its purpose must be batch (it is {file.purpose})", param="input_file_id"
        )
    services.check_model_allowed(who.limits)
    services.spend(who)
    expiry = form.output_expires_after
    batch = services.batches.create(
        client=who.client,
        endpoint=form.endpoint,
        input_file=file,
        model=services.model.name,
        metadata=form.metadata,
        limits=who.limits,
        lifetime_s=MAX_LIFETIME_S if expiry is None else expiry.seconds,
    )
    return http.reply(batch.public())


@door.get("")
@openapi.describe(
    "List batches",
    tag="batches",
    answers=answers.Batches,
    parameters=openapi.page_of("batches", MAX_PAGE),
    errors=(UnknownBatch,),
)
def listing() -> Response:
    queries.check_known("limit", "after")
    services, who = current(), caller()
    limit = queries.number("limit", 20, 1, MAX_PAGE)
    after = request.args.get("after")
    found = services.batches.list(
        who.client if who.restricted else None,
        limit=limit + 1,  # to know whether more follow
        after=None if after is None else services.batch(after, who),
    )
    return http.reply(queries.page([batch.public() for batch in found[:limit]], len(found) > limit))


@door.get("/<batch_id>")
@openapi.describe("A batch", tag="batches", answers=answers.Batch, errors=(UnknownBatch,))
def lookup(batch_id: str) -> Response:
    return http.reply(current().batch(batch_id, caller()).public())


@door.post("/<batch_id>/cancel")
@openapi.describe(
    "Cancel a batch", tag="batches", answers=answers.Batch, errors=(UnknownBatch, Conflict, InvalidRequest)
)
def cancel(batch_id: str) -> Response:
    services = current()
    batch = services.batch(batch_id, caller())
    return http.reply(services.batches.cancel(batch.id).public())
