"""OpenAI's files: upload, list, look up, download, delete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from flask import Blueprint, Response, request
from pydantic import BaseModel, ConfigDict, Field
from werkzeug.exceptions import RequestEntityTooLarge, UnsupportedMediaType

from api import answers, http, openapi, queries
from api.callers import caller
from api.services import current
from wicore.errors import InvalidRequest, TooLarge, UnknownFile
from wicore.files import MAX_LIFETIME_S
from wicore.request import parse_model

MAX_PAGE = 10_000
MAX_NAME = 256
FORM_BYTES = 65_536
"""What the form around a file may take."""

door = Blueprint("files", __name__, url_prefix="/v1/files")


class ExpiresAfter(BaseModel):
    """How long after its creation a file goes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    anchor: Literal["created_at"]
    # A form's fields are texts.
    seconds: Annotated[int, Field(ge=3600, le=MAX_LIFETIME_S, strict=False)]


class UploadForm(BaseModel):
    """The fields of the form beside `file`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    purpose: Literal["batch"]
    expires_after: ExpiresAfter | None = None


def _upload_schema(fields: openapi.Schema) -> openapi.Schema:
    """The form: its fields, those of an object spelled `name[key]`, and the file."""
    own = {name: part for name, part in fields["properties"].items() if name != "expires_after"}
    lifetime = {"type": "integer", "minimum": 3600, "maximum": MAX_LIFETIME_S}
    return {
        **fields,
        "properties": {
            **own,
            "expires_after[anchor]": {"const": "created_at"},
            "expires_after[seconds]": lifetime,
            "file": {"type": "string", "format": "binary", "minLength": 1},
        },
        "required": ["file", "purpose"],
        "dependentRequired": {
            "expires_after[anchor]": ["expires_after[seconds]"],
            "expires_after[seconds]": ["expires_after[anchor]"],
        },
    }


@door.post("")
@openapi.describe(
    "Upload a file",
    tag="files",
    body=openapi.Derived("FileUpload", UploadForm, _upload_schema),
    media=openapi.FORM,
    answers=answers.File,
)
def upload() -> Response:
    services = current()
    limit = services.settings.api.max_file_bytes
    request.max_content_length = limit + FORM_BYTES
    if request.mimetype != "multipart/form-data":
        raise UnsupportedMediaType(
            f"Content-Type: must be multipart/form-data (got {request.mimetype or 'none'})"
        )
    try:
        # Reading them reads the body; what is large goes to a temporary file on the way.
        fields, files = request.form, request.files
    except RequestEntityTooLarge:
        raise TooLarge(
            f"file: larger than the {limit} bytes that api.max_file_bytes allows", param="file"
        ) from None
    if not fields and not files:
        raise InvalidRequest("body: is no multipart form, or one that breaks off")
    form = parse_model(UploadForm, _nested(fields))
    for name in files.keys() - {"file"}:
        raise InvalidRequest(f"{name}: unknown or unsupported field; remove it", param=name)
    if len(files.getlist("file")) != 1:
        raise InvalidRequest(
            "file: must be one file, sent as a part of the form with a filename", param="file"
        )
    given = files["file"]
    record = services.files.upload(
        given.stream.read,
        client=caller().client,
        filename=_checked_name(given.filename or "file"),
        purpose=form.purpose,
        lifetime_s=MAX_LIFETIME_S if form.expires_after is None else form.expires_after.seconds,
    )
    return http.reply(record.public())


def _nested(fields: Mapping[str, str]) -> dict[str, Any]:
    """`name[key]`, as clients write an object in a form, to an object."""
    nested: dict[str, Any] = {}
    for name, value in fields.items():
        outer, bracket, inner = name.partition("[")
        if bracket and inner.endswith("]") and isinstance(nested.setdefault(outer, {}), dict):
            nested[outer][inner[:-1]] = value
        else:
            nested[name] = value
    return nested


def _checked_name(name: str) -> str:
    if len(name) > MAX_NAME:
        raise InvalidRequest(f"file: its name must have at most {MAX_NAME} characters", param="file")
    return name.encode("utf-8", "replace").decode()


@door.get("")
@openapi.describe(
    "List files",
    tag="files",
    answers=answers.Files,
    parameters=(
        *openapi.page_of("files", MAX_PAGE, default=MAX_PAGE),
        openapi.ORDER,
        openapi.Parameter("purpose", {"type": "string"}, "Only these."),
    ),
    errors=(UnknownFile,),
)
def listing() -> Response:
    queries.check_known("limit", "after", "order", "purpose")
    services, who = current(), caller()
    limit = queries.number("limit", MAX_PAGE, 1, MAX_PAGE)
    after = request.args.get("after")
    found = services.files.list(
        who.client if who.restricted else None,
        limit=limit + 1,  # to know whether more follow
        after=None if after is None else services.file(after, who),
        order=queries.order(),
        purpose=request.args.get("purpose"),
    )
    return http.reply(queries.page([record.public() for record in found[:limit]], len(found) > limit))


@door.get("/<file_id>")
@openapi.describe("A file", tag="files", answers=answers.File, errors=(UnknownFile,))
def lookup(file_id: str) -> Response:
    return http.reply(current().file(file_id, caller()).public())


@door.get("/<file_id>/content")
@openapi.describe("What a file holds", tag="files", answers=openapi.BYTES, errors=(UnknownFile,))
def content(file_id: str) -> Response:
    services = current()
    record = services.file(file_id, caller())
    response = Response(services.files.read(record), mimetype="application/octet-stream")
    response.content_length = record.bytes
    response.headers.set("Content-Disposition", "attachment", filename=record.filename)
    return response


@door.delete("/<file_id>")
@openapi.describe("Delete a file", tag="files", answers=answers.FileDeleted, errors=(UnknownFile,))
def delete(file_id: str) -> Response:
    services = current()
    services.files.delete(services.file(file_id, caller()))
    return http.reply({"id": file_id, "object": "file", "deleted": True})
