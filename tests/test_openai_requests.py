"""Request bodies of OpenAI's doors reduce to jobs, or say which field is wrong."""

from typing import Any

import pytest
from pydantic import ValidationError

from wicore.errors import InvalidRequest
from wicore.openai import chat_request, completion_request
from wicore.request import JobBody, Priority

HELLO = [{"role": "user", "content": "Hello"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]


def test_a_chat_body_becomes_a_chat_job() -> None:
    request = chat_request({"messages": HELLO, "temperature": 0, "priority": "batch", "seed": 7})
    assert request.body.kind == "chat"
    assert request.body.priority is Priority.BATCH
    assert (request.body.temperature, request.body.seed) == (0, 7)
    assert not request.stream


def test_max_completion_tokens_is_another_name_of_max_tokens() -> None:
    assert chat_request({"messages": HELLO, "max_completion_tokens": 9}).body.max_tokens == 9


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
    ],
)
def test_chat_logprobs_become_a_count(given: dict[str, Any], expected: int | None) -> None:
    assert chat_request({"messages": HELLO, **given}).body.logprobs == expected


def test_completion_logprobs_are_a_count_already() -> None:
    assert completion_request({"prompt": "a", "logprobs": 5}).body.logprobs == 5


def test_null_stands_for_a_field_that_was_not_set() -> None:
    nulls = dict.fromkeys(
        ["temperature", "stop", "n", "stream", "stream_options", "tools", "logprobs", "user"]
    )
    request = chat_request({"messages": HELLO, **nulls})
    assert (request.body.temperature, request.body.n, request.stream) == (1.0, 1, False)


def test_a_field_that_asks_for_nothing_is_accepted() -> None:
    chat_request({"messages": HELLO, "tools": [], "response_format": {"type": "text"}, "store": False})
    completion_request({"prompt": "a", "echo": False, "suffix": "", "best_of": 2, "n": 2})


@pytest.mark.parametrize("prompt", ["one", ["one"]])
def test_a_list_of_one_prompt_is_that_prompt(prompt: Any) -> None:
    assert completion_request({"prompt": prompt}).body.prompt == "one"


@pytest.mark.parametrize("prompt", [[5, 6], [[5, 6]]])
def test_a_prompt_may_be_token_ids(prompt: Any) -> None:
    assert completion_request({"prompt": prompt}).body.prompt == [5, 6]


def test_usage_is_streamed_on_request() -> None:
    request = chat_request({"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}})
    assert request.stream
    assert request.include_usage


@pytest.mark.parametrize(
    ("field", "extra"),
    [
        ("tools", {"tools": [{"type": "function"}]}),
        ("tool_choice", {"tool_choice": "auto"}),
        ("response_format.type", {"response_format": {"type": "xml"}}),
        ("store", {"store": 0}),
        ("kind", {"kind": "chat"}),
        ("best_of", {"best_of": 2}),
        ("colour", {"colour": "red"}),
        ("colour", {"colour": None}),
        ("Colour-2", {"Colour-2": 1}),
        ("stream", {"stream": "yes"}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("stream_options.x", {"stream": True, "stream_options": {"x": 1}}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("logprobs", {"logprobs": 2}),
        ("max_completion_tokens", {"max_completion_tokens": 2, "max_tokens": 2}),
        ("max_tokens", {"max_tokens": 0}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": float("inf")}),
        ("temperature", {"temperature": "hot"}),
        ("messages", {"messages": []}),
        ("messages", {"messages": None}),
        ("messages.0.role", {"messages": [{"role": "king", "content": "x"}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": "\ud800"}]}),
        ("prompt", {"prompt": "x"}),
        ("n", {"n": 1000}),
        ("stop.0", {"stop": [""]}),
        ("stop", {"stop": ["x"] * 17}),
        (
            "messages.0.content.0.type",
            {"messages": IMAGE},
        ),
        ("priority", {"priority": "urgent"}),
        ("timeout_s", {"timeout_s": -1}),
    ],
)
def test_a_bad_or_unsupported_chat_field_is_named(field: str, extra: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat_request({"messages": HELLO, **extra})
    assert caught.value.param == field
    assert caught.value.message.startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("field", "extra"),
    [
        ("echo", {"echo": True}),
        ("suffix", {"suffix": "end"}),
        ("best_of", {"best_of": 3, "n": 2}),
        ("prompt", {"prompt": ["a", "b"]}),
        ("prompt", {"prompt": [[1], [2]]}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": []}),
        ("prompt.0", {"prompt": [-1]}),
        ("messages", {"messages": HELLO}),
        ("max_completion_tokens", {"max_completion_tokens": 2}),
        ("logprobs", {"logprobs": True}),
    ],
)
def test_a_bad_or_unsupported_completion_field_is_named(field: str, extra: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion_request({"prompt": "a", **extra})
    assert caught.value.param == field


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "completion", "prompt": [-1] * 1000},
        {"messages": [{}] * 1000},
        {"messages": [{"role": "user", "content": [{}] * 1000}]},
    ],
)
def test_a_long_list_of_faults_fails_at_the_first_one(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        JobBody.model_validate(fields)
    assert caught.value.error_count() < 10


@pytest.mark.parametrize("data", [None, 3, "x", [], [{}]])
def test_a_body_that_is_no_object_is_refused(data: Any) -> None:
    for parse in (chat_request, completion_request):
        with pytest.raises(InvalidRequest, match="must be a JSON object"):
            parse(data)
