"""`GET /openapi.json`: the doors, described by what validates them.

A door says beside itself what it is (`describe`); paths, methods and path parameters come from the routes,
bodies from the pydantic models that check them, answers from those in answers.py. A door that says nothing is
a fault (tests/test_openapi.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flask import Blueprint, Flask, Response, current_app
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from werkzeug.routing import Rule

from api import callers, http
from api.answers import Error
from wicore import __version__, errors

Schema = dict[str, Any]
View = TypeVar("View", bound=Callable[..., Any])

JSON, EVENTS, TEXT, HTML = "application/json", "text/event-stream", "text/plain", "text/html"
FORM, BYTES, ANY = "multipart/form-data", "application/octet-stream", "*/*"
REF = "#/components/schemas/{model}"
EXTENSION = "wicore-openapi"

door = Blueprint("openapi", __name__)


@dataclass(frozen=True, slots=True)
class Derived:
    """A body that is checked in more than one step: its schema, made of that of a model."""

    name: str
    base: type[BaseModel]
    make: Callable[[Schema], Schema]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One in the query or the headers."""

    name: str
    schema: Schema
    meaning: str
    place: str = "query"


@dataclass(frozen=True, slots=True)
class Operation:
    """What a door says of itself."""

    summary: str
    tag: str
    notes: str
    body: type[BaseModel] | Derived | None
    media: str
    """What the body is sent as."""
    answers: Mapping[int, type[BaseModel] | str | None]
    """By status: a model, sent as JSON; a media type; or nothing."""
    stream: str | None
    """The media type that the door answers in as well, when it is asked to stream."""
    parameters: Sequence[Parameter]
    errors: Sequence[type[errors.WicoreError]]
    headers: Mapping[str, str]
    """Of a good answer, with their meaning."""


def describe(
    summary: str,
    *,
    tag: str,
    notes: str = "",
    body: type[BaseModel] | Derived | None = None,
    media: str = JSON,
    answers: Mapping[int, type[BaseModel] | str | None] | type[BaseModel] | str,
    stream: str | None = None,
    parameters: Sequence[Parameter] = (),
    errors: Sequence[type[errors.WicoreError]] = (),
    headers: Mapping[str, str] | None = None,
) -> Callable[[View], View]:
    """Say what a door is. `errors` are those beyond what every door of its kind can answer (`_errors`)."""
    found = answers if isinstance(answers, Mapping) else {200: answers}
    said = Operation(summary, tag, notes, body, media, found, stream, parameters, errors, headers or {})

    def mark(view: View) -> View:
        view.operation = said  # type: ignore[attr-defined]
        return view

    return mark


# --- parameters that several doors have -----------------------------------------------------------

IDEMPOTENCY_KEY = Parameter(
    "Idempotency-Key",
    {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[\\x21-\\x7e]+$"},
    "The same key and body within 24 hours give the same job.",
    "header",
)
SEQ: Schema = {"type": "integer", "minimum": 0, "maximum": 2**53}
FROM = Parameter("from", {**SEQ, "default": 1}, "The first sequence number wanted.")
LAST_EVENT_ID = Parameter(
    "Last-Event-ID", SEQ, "The last one seen, as browsers send it; wins over `from`.", "header"
)
_REQUEST_ID = Parameter(
    "X-Request-Id", {"type": "string"}, "Comes back, and is in the log; made if it is missing.", "header"
)
_TRACEPARENT = Parameter(
    "traceparent", {"type": "string"}, "The W3C's trace context; the job's trace goes on from it.", "header"
)


ORDER = Parameter("order", {"type": "string", "enum": ["asc", "desc"], "default": "desc"}, "By time.")


def page_of(
    what: str, most: int, id_pattern: str | None = None, default: int = 20
) -> tuple[Parameter, Parameter]:
    """`limit` and `after` of a listing of things whose ids have this form, or any."""
    form = {} if id_pattern is None else {"pattern": id_pattern}
    return (
        Parameter(
            "limit",
            {"type": "integer", "minimum": 1, "maximum": most, "default": default},
            f"How many {what}.",
        ),
        Parameter("after", {"type": "string", **form}, "The last id of the page before."),
    )


# --- the document ---------------------------------------------------------------------------------


@door.get("/openapi.json")
@describe("This description", tag="service", answers=JSON)
def openapi() -> Response:
    return http.reply(document_of(current_app))


def document_of(app: Flask) -> Schema:
    """The app's description, made once. Raises KeyError for a door that does not describe itself."""
    if EXTENSION not in app.extensions:
        app.extensions[EXTENSION] = _document(app)
    found: Schema = app.extensions[EXTENSION]
    return found


def operations(app: Flask) -> Iterator[tuple[Rule, str, Operation]]:
    """Each door: route, method in capitals, and what it says; OPTIONS and HEAD are Flask's."""
    for rule in sorted(app.url_map.iter_rules(), key=lambda rule: rule.rule):
        view = app.view_functions[rule.endpoint]
        for method in sorted((rule.methods or set()) - {"OPTIONS", "HEAD"}):
            said = getattr(view, "operation", None)
            if said is None:
                raise KeyError(f"{method} {rule.rule} does not describe itself; see api/openapi.py")
            yield rule, method, said


def _document(app: Flask) -> Schema:
    found = list(operations(app))
    paths: dict[str, Schema] = {}
    for rule, method, said in found:
        paths.setdefault(_path(rule), {})[method.lower()] = _operation(rule, method, said)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "WiCore",
            "version": __version__,
            "description": "Gemma 3 from a message queue: OpenAI's API, and jobs that outlive connections.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {}],
        "tags": [{"name": tag} for tag in dict.fromkeys(said.tag for _, _, said in found)],
        "paths": paths,
        "components": {
            "schemas": _schemas([said for _, _, said in found]),
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _path(rule: Rule) -> str:
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)


def _operation(rule: Rule, method: str, said: Operation) -> Schema:
    answers = {str(status): _answer(status, content, said) for status, content in said.answers.items()}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in sorted(rule.arguments)
    ]
    makes_jobs = errors.QueueFull in said.errors
    everywhere = [_REQUEST_ID, *([_TRACEPARENT] if makes_jobs else [])]
    parameters += [
        {
            "name": one.name,
            "in": one.place,
            "description": one.meaning,
            "required": False,
            "schema": one.schema,
        }
        for one in (*said.parameters, *everywhere)
    ]
    operation: Schema = {
        "operationId": rule.endpoint.replace(".", "_"),
        "summary": said.summary,
        "tags": [said.tag],
        "parameters": parameters,
        "responses": answers | _errors(rule, said),
    }
    if said.notes:
        operation["description"] = said.notes
    if rule.websocket:
        operation["x-websocket"] = True
    if callers.is_open(rule.rule):
        operation["security"] = []
    if said.body is not None:
        name = said.body.name if isinstance(said.body, Derived) else said.body.__name__
        operation["requestBody"] = {"required": True, "content": {said.media: {"schema": _ref(name)}}}
    return operation


def _answer(status: int, content: type[BaseModel] | str | None, said: Operation) -> Schema:
    answer: Schema = {
        "description": said.summary,
        "headers": _headers({"X-Request-Id": "Names the request in the log."} | dict(said.headers)),
    }
    if isinstance(content, str):
        answer["content"] = {content: {}}
    elif content is not None:
        answer["content"] = {JSON: {"schema": _ref(content.__name__)}}
    if said.stream is not None and status == 200:
        answer["content"][said.stream] = {}
    return answer


def _headers(meanings: Mapping[str, str]) -> Schema:
    return {
        name: {"description": meaning, "required": True, "schema": {"type": "string"}}
        for name, meaning in meanings.items()
    }


def _is_static(rule: Rule) -> bool:
    """Whether the door needs nothing but this process."""
    return rule.rule in ("/", "/health", "/openapi.json", "/docs") or rule.rule.startswith(callers.FILES)


def _errors(rule: Rule, said: Operation) -> Schema:
    """The error answers: those that the door names, and those that any door with its parts can give."""
    kinds: list[type[errors.WicoreError]] = [*said.errors, errors.WicoreError]
    if not _is_static(rule):
        kinds.append(errors.Unavailable)
    if not callers.is_open(rule.rule):
        kinds += [errors.Unauthenticated, errors.Forbidden]
    if errors.QueueFull in kinds:
        kinds.append(errors.RateLimited)
    if said.body is not None or said.parameters or rule.websocket:
        kinds.append(errors.InvalidRequest)
    if said.body is not None:
        kinds.append(errors.TooLarge)
    by_status: dict[int, list[str]] = {}
    for kind in kinds:
        by_status.setdefault(kind.status, []).append(kind.code)
    if said.body is not None:
        by_status[415] = ["unsupported_media_type"]
    answers = {}
    for status, codes in sorted(by_status.items()):
        if status in said.answers:
            continue
        headers = {"X-Request-Id": "Names the request in the log."}
        if status in (429, 503):
            headers["Retry-After"] = "Seconds after which to try again."
        answers[str(status)] = {
            "description": "`code`: " + ", ".join(f"`{code}`" for code in dict.fromkeys(codes)),
            "headers": _headers(headers),
            "content": {JSON: {"schema": _ref(Error.__name__)}},
        }
    return answers


# --- schemas --------------------------------------------------------------------------------------


class _Untitled(GenerateJsonSchema):
    """Without the titles that pydantic makes of the fields' names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _schemas(said: Iterable[Operation]) -> Schema:
    asked: dict[type[BaseModel], None] = {}
    given: dict[type[BaseModel], None] = {Error: None}
    derived: dict[str, Derived] = {}
    for one in said:
        if isinstance(one.body, Derived):
            derived[one.body.name] = one.body
            asked[one.body.base] = None
        elif one.body is not None:
            asked[one.body] = None
        given |= {answer: None for answer in one.answers.values() if isinstance(answer, type)}
    models = [(model, "validation") for model in asked] + [(model, "serialization") for model in given]
    _, definitions = models_json_schema(models, ref_template=REF, schema_generator=_Untitled)  # type: ignore[arg-type]
    schemas: Schema = definitions["$defs"]
    for name, one_derived in derived.items():
        schemas[name] = one_derived.make(schemas[one_derived.base.__name__])
    return dict(sorted(schemas.items()))


def _ref(name: str) -> Schema:
    return {"$ref": REF.format(model=name)}
