"""What a request may ask of the form of its output."""

from __future__ import annotations

from typing import Any

import pytest

from wicore.errors import InvalidRequest
from wicore.grammar import grammar_of, json_object_grammar, json_schema_grammar
from wicore.request import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, JobBody, parse_job

SCHEMA = {"type": "object", "properties": {"é": {"type": "string"}, "a": {"type": "integer"}}}
FIELD = "response_format.json_schema.schema"


def body(response_format: Any, **fields: Any) -> JobBody:
    return parse_job({"kind": "completion", "prompt": "a", "response_format": response_format} | fields)


def asking(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


def test_the_form_of_the_output_follows_the_request() -> None:
    assert grammar_of(body(None)) is None
    assert grammar_of(body({"type": "text"})) is None
    assert grammar_of(body({"type": "json_object"})) == json_object_grammar()
    assert grammar_of(body(asking(SCHEMA))) == json_schema_grammar(SCHEMA)


def test_grammars_are_equal_whatever_field_asked_for_them() -> None:
    grammars = {json_schema_grammar(SCHEMA, "tools.0.function.parameters"), json_schema_grammar(SCHEMA)}
    assert len(grammars) == 1


def test_the_order_of_properties_is_part_of_a_grammar() -> None:
    turned = {**SCHEMA, "properties": dict(reversed(SCHEMA["properties"].items()))}  # type: ignore[attr-defined]
    assert json_schema_grammar(SCHEMA) != json_schema_grammar(turned)


def test_a_message_carries_the_format() -> None:
    sent = body({**asking(SCHEMA), "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}})
    assert parse_job(sent.wire()) == sent


@pytest.mark.parametrize(
    ("response_format", "param", "says"),
    [
        ({"type": "json_schema"}, "response_format", "json_schema is required"),
        ({"type": "text", "json_schema": {"name": "a", "schema": {}}}, "response_format", "not allowed"),
        ({"type": "xml"}, "response_format.type", "'json_object'"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, FIELD, "required"),
        (
            {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
            "response_format.json_schema.name",
            "pattern",
        ),
        (asking([]), FIELD, "dictionary"),
        (asking({"const": "\ud800"}), FIELD, "Unicode"),
        (asking({"const": float("nan")}), FIELD, "NaN"),
        (asking({"const": "x" * MAX_SCHEMA_BYTES}), FIELD, str(MAX_SCHEMA_BYTES)),
        (asking(nested(MAX_SCHEMA_DEPTH + 1)), FIELD, "deep"),
        (asking(nested(100_000)), FIELD, "deep"),
    ],
)
def test_a_format_that_is_wrong_in_itself_is_refused_by_name(
    response_format: Any, param: str, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        body(response_format)
    assert refused.value.param == param


def test_a_schema_may_be_as_deep_as_the_limit_says() -> None:
    sent = body(asking(nested(MAX_SCHEMA_DEPTH)))
    assert parse_job(sent.wire()) == sent


def test_an_output_with_a_form_ends_where_it_is_complete() -> None:
    with pytest.raises(InvalidRequest) as refused:
        body({"type": "json_object"}, ignore_eos=True)
    assert refused.value.param == "ignore_eos"
