"""`GET /docs`: the description of the doors for people, made of the same document, without any script."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, current_app, render_template
from markupsafe import Markup, escape

from api import openapi
from api.openapi import Schema, document_of

door = Blueprint("docs", __name__, template_folder="templates")


@dataclass(frozen=True, slots=True)
class Row:
    """A field or a parameter."""

    name: str
    type: Markup
    required: bool
    meaning: str


@door.get("/docs")
@openapi.describe("This description, for people", tag="service", answers=openapi.HTML)
def docs() -> Response:
    document = document_of(current_app)
    operations: dict[str, list[tuple[str, str, Schema]]] = {tag["name"]: [] for tag in document["tags"]}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            operations[operation["tags"][0]].append((method.upper(), path, operation))
    html = render_template(
        "docs.html.jinja",
        info=document["info"],
        operations=operations,
        schemas=document["components"]["schemas"],
        type_of=type_of,
        fields=fields,
        parameters=parameters,
    )
    return Response(html)


def parameters(operation: Schema) -> Iterator[Row]:
    """Of an operation, in words."""
    for one in operation["parameters"]:
        meaning = one.get("description", "")
        yield Row(f"{one['name']} ({one['in']})", type_of(one["schema"]), one["required"], meaning)


def fields(schema: Schema) -> Iterator[Row]:
    """Of an object, those that must be there first."""
    required = schema.get("required", ())
    rows = schema.get("properties", {}).items()
    for name, part in sorted(rows, key=lambda row: row[0] not in required):
        yield Row(name, type_of(part), name in required, part.get("description", ""))


def type_of(schema: Mapping[str, Any]) -> Markup:
    """What a value may be, in words, with links to what is described elsewhere."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return Markup('<a href="#schema-{0}">{0}</a>').format(name)
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return _or(type_of(part) for part in schema[several])
    if "const" in schema:
        return _code(schema["const"])
    if "enum" in schema:
        return _or(map(_code, schema["enum"]))
    kind = schema.get("type")
    if kind == "array":
        return Markup("list of {}{}").format(type_of(schema.get("items", {})), _bounds(schema))
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return Markup("object of {}{}").format(type_of(schema["additionalProperties"]), _bounds(schema))
    if isinstance(kind, list):
        kind = " or ".join(kind)
    return Markup("{}{}").format(kind or "anything", _bounds(schema))


_WORDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "over {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} of them",
    "maxItems": "at most {} of them",
    "maxProperties": "at most {} names",
    "pattern": "matching {}",
}


def _bounds(schema: Mapping[str, Any]) -> Markup:
    words = [text.format(schema[name]) for name, text in _WORDS.items() if name in schema]
    if schema.get("default") is not None:
        words.append(f"default {json.dumps(schema['default'])}")
    return escape("".join(f", {word}" for word in words))


def _code(value: Any) -> Markup:
    return Markup("<code>{}</code>").format(json.dumps(value))


def _or(parts: Iterable[Markup]) -> Markup:
    return Markup(" or ").join(dict.fromkeys(parts))
