"""OpenAI's request bodies as JSON Schema, put together from what checks them (requests.py). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from wicore.openai.requests import MAX_PROMPTS, NEUTRAL, NO_PRIORITY, ChatForm, CompletionForm
from wicore.openai.responses_api import NEUTRAL as RESPONSES_NEUTRAL

Schema = dict[str, Any]

_NULL: Schema = {"type": "null"}
_NO_PRIORITY: Schema = {"properties": {"priority": _NULL}}


def chat_schema(job: Schema) -> Schema:
    """Of `POST /v1/chat/completions`, from that of JobBody."""
    schema = _schema(job, ChatForm, needs="messages")
    schema["properties"] |= {"prompt": _NULL, "best_of": _NULL, "echo": {"enum": [None, False]}}
    schema["allOf"] = [
        _unless("top_logprobs", {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]}),
        _unless("max_completion_tokens", {"properties": {"max_tokens": {"type": "null"}}}),
        {"anyOf": [{"properties": {"service_tier": {"enum": [None, *NO_PRIORITY]}}}, _NO_PRIORITY]},
        _STREAM_OPTIONS,
    ]
    return schema


def completion_schema(job: Schema) -> Schema:
    """Of `POST /v1/completions`, from that of JobBody."""
    schema = _schema(job, CompletionForm, needs="prompt")
    schema["properties"] |= {
        "messages": _NULL,
        "tools": {"enum": [None, []]},
        "tool_choice": _NULL,
        "parallel_tool_calls": _NULL,
    }
    schema["properties"]["prompt"] = _several(schema["properties"]["prompt"], MAX_PROMPTS)
    schema["allOf"] = [_STREAM_OPTIONS]
    return schema


def response_schema(body: Schema) -> Schema:
    """Of `POST /v1/responses`, from that of ResponseBody."""
    properties = {name: _or_null(part) for name, part in body["properties"].items() if name != "logprobs"}
    properties |= {name: {"enum": [None, *values]} for name, values in RESPONSES_NEUTRAL.items()}
    properties["input"] = body["properties"]["input"]
    stored = {"properties": {"store": {"const": True}}}
    return {
        "type": "object",
        "properties": dict(sorted(properties.items())),
        "required": ["input"],
        "additionalProperties": False,
        "allOf": [
            {"anyOf": [{"properties": {"background": {"enum": [None, False]}}}, stored]},
            _STREAM_OPTIONS,
        ],
    }


def nullable(body: Schema) -> Schema:
    """Of a body whose fields may be null, which means the same as leaving them out."""
    required = body.get("required", ())
    properties = body["properties"].items()
    return body | {
        "properties": {name: part if name in required else _or_null(part) for name, part in properties}
    }


def _schema(job: Schema, form: type[BaseModel], needs: str) -> Schema:
    left = {name: part for name, part in job["properties"].items() if name != "kind"}
    own = form.model_json_schema()
    properties = left | {
        name: _inlined(part, own.get("$defs", {})) for name, part in own["properties"].items()
    }
    properties = {name: _or_null(part) for name, part in properties.items()}
    properties |= {name: {"enum": [None, *values]} for name, values in NEUTRAL.items()}
    properties[needs] = _present(left[needs])
    return {
        "type": "object",
        "properties": dict(sorted(properties.items())),
        "required": [needs],
        "additionalProperties": False,
    }


def _inlined(schema: Any, definitions: Mapping[str, Schema]) -> Any:
    """With what it refers to in place, and without the titles that pydantic makes of names."""
    if isinstance(schema, list):
        return [_inlined(part, definitions) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {
        name: _inlined(part, definitions)
        for name, part in schema.items()
        if not (name == "title" and isinstance(part, str))
    }


def _or_null(schema: Schema) -> Schema:
    """OpenAI's clients send null for an optional field that was not set."""
    if {"type": "null"} in schema.get("anyOf", ()):
        return schema
    about = {name: schema[name] for name in ("description", "default") if name in schema}
    rest = {name: part for name, part in schema.items() if name not in about}
    return about | {"anyOf": [*rest.pop("anyOf", ()), *([rest] if rest else []), {"type": "null"}]}


def _present(schema: Schema) -> Schema:
    """Of a field that must be there: not null, and not empty."""
    branches = [branch for branch in schema["anyOf"] if branch != {"type": "null"}]
    smallest = {"string": {"minLength": 1}, "array": {"minItems": 1}}
    return {"anyOf": [branch | smallest[branch["type"]] for branch in branches]}


def _several(prompt: Schema, most: int) -> Schema:
    """A prompt, or a list of them."""
    return {"anyOf": [*prompt["anyOf"], {"type": "array", "items": prompt, "minItems": 1, "maxItems": most}]}


def _unless(name: str, then: Schema) -> Schema:
    """Either the field is not there, or null, or this holds."""
    return {"anyOf": [{"properties": {name: {"type": "null"}}}, then]}


_STREAM_OPTIONS = _unless(
    "stream_options", {"properties": {"stream": {"const": True}}, "required": ["stream"]}
)
