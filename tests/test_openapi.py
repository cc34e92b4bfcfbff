"""The description of the doors: whole, and as strict as what checks requests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jsonschema_rs import validator_for
from schemathesis.openapi import from_dict

from api.app import create_app
from api.openapi import document_of, operations
from tests.images import image_part
from tests.services import settings_for
from wicore.errors import InvalidRequest
from wicore.openai import chat_request, completion_request
from wicore.openai.responses_api import response_request
from wicore.request import parse_job

Schema = dict[str, Any]


@pytest.fixture(scope="module")
def app() -> Any:
    return create_app(settings_for("unix:///nowhere/at/all.sock"))


@pytest.fixture(scope="module")
def document(app: Any) -> Schema:
    return document_of(app)


def test_every_route_is_described(app: Any, document: Schema) -> None:
    told = {(path, method) for path, item in document["paths"].items() for method in item}
    assert len(told) == len(list(operations(app))) > 15
    for rule in app.url_map.iter_rules():
        path = rule.rule.replace("<path:", "<").replace("<", "{").replace(">", "}")
        assert path in document["paths"]


def test_a_door_without_a_description_is_a_fault(app: Any) -> None:
    mute = create_app(settings_for("unix:///nowhere/at/all.sock"))
    mute.add_url_rule("/mute", view_func=lambda: "")
    with pytest.raises(KeyError, match="GET /mute does not describe itself"):
        document_of(mute)


def test_the_document_is_openapi(app: Any) -> None:
    client = app.test_client()
    answer = client.get("/openapi.json")
    assert answer.status_code == 200
    assert answer.json["openapi"].startswith("3.1")
    loaded = from_dict(answer.json)
    loaded.validate()
    assert len(list(loaded.get_all_operations())) == len(list(operations(app)))


def test_each_operation_tells_its_errors_in_one_form(document: Schema) -> None:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            answers = operation["responses"]
            assert "500" in answers, (path, method)
            assert operation["operationId"]
            for status, answer in answers.items():
                assert "X-Request-Id" in answer["headers"]
                if status in ("429", "503") and path != "/ready":
                    assert "Retry-After" in answer["headers"]
                if int(status) >= 400 and path != "/ready":
                    assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/Error")
    responses = document["paths"]["/v1/jobs"]["post"]["responses"]
    assert {"202", "400", "404", "409", "413", "415", "429", "500", "503"} <= set(responses)


def test_operation_ids_are_unique(document: Schema) -> None:
    ids = [one["operationId"] for item in document["paths"].values() for one in item.values()]
    assert len(set(ids)) == len(ids)


def test_the_page_for_people_shows_every_operation_and_schema_and_needs_no_script(
    app: Any, document: Schema
) -> None:
    answer = app.test_client().get("/docs")
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    for needle in ("<script", "style=", "http://", "https://", "//"):
        assert needle not in answer.text, needle
    found = set(re.findall(r'id="([^"]+)"', answer.text))
    for item in document["paths"].values():
        assert {operation["operationId"] for operation in item.values()} <= found
    linked = set(re.findall(r'href="#([^"]+)"', answer.text))
    assert linked <= found
    assert {f"schema-{name}" for name in document["components"]["schemas"]} <= linked
    (sheet,) = re.findall(r'<link rel="stylesheet" href="([^"]+)">', answer.text)
    with app.test_client().get(sheet) as style:
        assert style.mimetype == "text/css"


# --- as strict as the validators ------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"name": "a", "schema": {"type": "object"}}
TOOL = {"type": "function", "function": {"name": "look"}}
IMAGE = image_part()
INPUT_IMAGE = {"type": "input_image", "image_url": IMAGE["image_url"]["url"]}
COMMON: list[tuple[Schema, bool]] = [
    ({}, True),
    ({"temperature": 2}, True),
    ({"temperature": 2.1}, False),
    ({"temperature": "1"}, False),
    ({"top_p": 0}, False),
    ({"repetition_penalty": 1e-30}, False),
    ({"top_k": -1}, False),
    ({"n": 0}, False),
    ({"n": 17}, False),
    ({"max_tokens": 0}, False),
    ({"seed": 2**63}, False),
    ({"stop": "."}, True),
    ({"stop": ["a"] * 17}, False),
    ({"stop": ""}, False),
    ({"stop": None}, True),
    ({"priority": "batch"}, True),
    ({"priority": 6}, False),
    ({"priority": None}, True),
    ({"timeout_s": 0}, False),
    ({"logit_bias": {"5": 1.5}}, True),
    ({"logit_bias": {" 5": 1.5}}, False),
    ({"logit_bias": {"5.0": 1.5}}, False),
    ({"logit_bias": {"5": 101}}, False),
    ({"metadata": {"a": "b"}}, True),
    ({"metadata": {"a": 1}}, False),
    ({"unknown": None}, False),
    ({"user": "u" * 513}, False),
]
CHAT: list[tuple[Schema, bool]] = [
    *(({"messages": HELLO} | more, right) for more, right in COMMON),
    ({}, False),
    ({"messages": None}, False),
    ({"messages": []}, False),
    ({"messages": [{"role": "tool", "content": "a"}]}, False),
    ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]}, True),
    ({"messages": [{"role": "user", "content": "a", "tool_call_id": "b"}]}, False),
    ({"messages": [{"role": "user"}]}, False),
    ({"messages": [{"role": "assistant", "refusal": "no", "audio": None}]}, True),
    ({"messages": [{"role": "assistant", "audio": {}, "content": "a"}]}, False),
    ({"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}]}, True),
    ({"messages": [{"role": "assistant", "content": [{"type": "refusal", "text": "no"}]}]}, False),
    ({"messages": HELLO, "echo": True}, False),
    ({"messages": HELLO, "best_of": 2}, False),
    ({"messages": HELLO, "tools": [TOOL], "tool_choice": "required"}, True),
    ({"messages": HELLO, "tools": [TOOL | {"type": "custom"}]}, False),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "more": 1}]}]}, False),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, True),
    ({"messages": [{"role": "user", "content": [IMAGE | {"text": "a"}]}]}, False),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, False),
    ({"messages": [{"role": "user", "content": [image_part(detail="best")]}]}, False),
    ({"messages": [{"role": "user", "content": [image_part(url="https://a.example/b.png")]}]}, False),
    ({"messages": "Hello"}, False),
]
COMPLETION: list[tuple[Schema, bool]] = [
    *(({"prompt": "Once"} | more, right) for more, right in COMMON),
    ({}, False),
    ({"prompt": ""}, False),
    ({"prompt": []}, False),
    ({"prompt": [1, 2]}, True),
    ({"prompt": [-1]}, False),
    ({"prompt": [1.5]}, False),
    ({"prompt": "Once", "tools": [TOOL]}, False),
    ({"prompt": "Once", "tool_choice": "none"}, False),
    ({"prompt": "Once", "echo": True, "best_of": 2}, True),
]
CASES: list[tuple[str, Callable[[Any], Any], list[tuple[Schema, bool]]]] = [
    (
        "JobBody",
        parse_job,
        [
            *CHAT,
            *(({"kind": "completion"} | body, right) for body, right in COMPLETION),
            ({"kind": "chat", "messages": HELLO, "prompt": "Once"}, False),
            ({"kind": "completion", "messages": HELLO, "prompt": "Once"}, False),
            ({"kind": "completion", "messages": None, "prompt": "Once"}, True),
            ({"prompt": "Once"}, False),
            ({"messages": HELLO, "stream": False}, False),
            ({"messages": HELLO, "response_format": {"type": "json_object"}}, True),
            ({"messages": HELLO, "response_format": {"type": "json_schema"}}, False),
            ({"messages": HELLO, "response_format": {"type": "text", "json_schema": SCHEMA}}, False),
            ({"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": SCHEMA}}, True),
        ],
    ),
    (
        "ChatCompletionRequest",
        chat_request,
        [
            *CHAT,
            ({"messages": HELLO, "n": None, "metadata": None, "temperature": None}, True),
            ({"messages": HELLO, "stream_options": {"include_usage": True}}, False),
            ({"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}, True),
            ({"messages": HELLO, "stream": True, "stream_options": {"more": True}}, False),
            ({"messages": HELLO, "top_logprobs": 2}, False),
            ({"messages": HELLO, "top_logprobs": 2, "logprobs": True}, True),
            ({"messages": HELLO, "logprobs": 2}, False),
            ({"messages": HELLO, "max_tokens": 2, "max_completion_tokens": 2}, False),
            ({"messages": HELLO, "max_tokens": None, "max_completion_tokens": 2}, True),
            ({"messages": HELLO, "service_tier": "flex", "priority": "normal"}, False),
            ({"messages": HELLO, "service_tier": "flex", "priority": None}, True),
            ({"messages": HELLO, "service_tier": "auto", "priority": "normal"}, True),
            ({"messages": HELLO, "service_tier": None, "priority": "normal"}, True),
            ({"messages": HELLO, "store": False}, True),
            ({"messages": HELLO, "store": True}, False),
            ({"messages": HELLO, "kind": "chat"}, False),
            ({"messages": HELLO, "prompt": "Once"}, False),
        ],
    ),
    (
        "TextCompletionRequest",
        completion_request,
        [
            *COMPLETION,
            ({"prompt": ["Once"]}, True),
            ({"prompt": [[1, 2]]}, True),
            ({"prompt": [[]]}, False),
            ({"prompt": "Once", "logprobs": 2}, True),
            ({"prompt": "Once", "logprobs": True}, False),
            ({"prompt": "Once", "suffix": "x"}, False),
            ({"prompt": "Once", "messages": HELLO}, False),
        ],
    ),
]


CASES.append(
    (
        "ResponseRequest",
        response_request,
        [
            ({"input": "Hello"}, True),
            ({"input": ""}, False),
            ({}, False),
            ({"input": [{"role": "user", "content": "Hello"}], "temperature": None}, True),
            ({"input": [{"type": "image", "content": "Hello"}]}, False),
            ({"input": [{"role": "user", "content": [INPUT_IMAGE]}]}, True),
            ({"input": [{"role": "user", "content": [INPUT_IMAGE | {"file_id": "file-1"}]}]}, False),
            ({"input": [{"role": "user", "content": [INPUT_IMAGE | {"image_url": "b.png"}]}]}, False),
            ({"input": "Hello", "logprobs": 1}, False),
            ({"input": "Hello", "background": True, "store": False}, False),
            ({"input": "Hello", "background": True}, True),
            ({"input": "Hello", "stream_options": {}}, False),
            ({"input": "Hello", "reasoning": {"effort": "none"}}, True),
            ({"input": "Hello", "reasoning": {"effort": "high"}}, False),
            ({"input": "Hello", "include": ["message.output_text.logprobs"]}, True),
            ({"input": "Hello", "include": ["x"]}, False),
        ],
    )
)


def cases() -> Iterator[Any]:
    for name, check, bodies in CASES:
        for body, right in bodies:
            yield pytest.param(name, check, body, right, id=f"{name}-{body}"[:90])


@pytest.mark.parametrize(("name", "check", "body", "right"), list(cases()))
def test_the_schema_takes_what_the_service_takes(
    document: Schema, name: str, check: Callable[[Any], Any], body: Schema, right: bool
) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    assert validator_for(schema).is_valid(body) == right
    try:
        check(body)
        taken = True
    except InvalidRequest:
        taken = False
    assert taken == right
