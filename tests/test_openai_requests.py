"""Request bodies of OpenAI's doors reduce to jobs, or say which field is wrong."""

from typing import Any

import pytest
from pydantic import ValidationError

from tests.images import data_url, png
from wicore.errors import InvalidRequest
from wicore.openai import chat_request, completion_request
from wicore.request import JobBody, Priority, parse_job

HELLO = [{"role": "user", "content": "Hello"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PART = {"type": "text", "text": "Hello"}
PNG = data_url(png())
OBFUSCATED = {"include_obfuscation": True}


def shown(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(parts)}]}


def image(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(n) for n in names]}}


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
    chat_request(
        {"messages": HELLO, "reasoning_effort": "none", "verbosity": "medium", "tool_choice": "none"}
    )
    completion_request({"prompt": "a", "echo": False, "suffix": "", "best_of": 2, "n": 2})


@pytest.mark.parametrize("prompt", ["one", ["one"]])
def test_a_list_of_one_prompt_is_that_prompt(prompt: Any) -> None:
    assert completion_request({"prompt": prompt}).body.prompt == "one"


@pytest.mark.parametrize("prompts", [["one", "two"], [[5, 6], [7]], ["one", [7]]])
def test_several_prompts_are_a_job_each(prompts: Any) -> None:
    request = completion_request({"prompt": prompts, "n": 2})
    assert [body.prompt for body in request.bodies] == prompts
    assert {body.n for body in request.bodies} == {2}
    with pytest.raises(InvalidRequest, match="must be one prompt here"):
        _ = request.body


@pytest.mark.parametrize(
    ("tier", "priority", "answered"),
    [
        ("auto", None, "default"),
        ("flex", Priority.BATCH, "flex"),
        ("priority", Priority.INTERACTIVE, "priority"),
        ("fast", Priority.INTERACTIVE, "priority"),
    ],
)
def test_a_service_tier_is_a_priority_and_is_named_in_the_answer(
    tier: str, priority: Priority | None, answered: str
) -> None:
    request = chat_request({"messages": HELLO, "service_tier": tier})
    assert request.body.priority is priority
    assert request.answer([{}])["service_tier"] == answered
    assert "service_tier" not in chat_request({"messages": HELLO}).answer([{}])


@pytest.mark.parametrize(
    ("fields", "names", "required", "parallel"),
    [
        ({}, ["f", "g"], False, True),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ["f", "g"], False, False),
        ({"tool_choice": "required"}, ["f", "g"], True, True),
        ({"tool_choice": named("g")}, ["g"], True, False),
        ({"tool_choice": allowed("auto", "g")}, ["g"], False, True),
        ({"tool_choice": allowed("required", "g", "f")}, ["f", "g"], True, True),
    ],
)
def test_tool_choice_says_what_may_be_called(
    fields: dict[str, Any], names: list[str], required: bool, parallel: bool
) -> None:
    use = chat_request({"messages": HELLO, "tools": [tool("f"), tool("g")], **fields}).body.tool_use()
    assert use is not None
    assert ([f.name for f in use.functions], use.required, use.parallel) == (names, required, parallel)


def test_with_tool_choice_none_nothing_is_called() -> None:
    body = chat_request({"messages": HELLO, "tools": [tool("f")], "tool_choice": "none"}).body
    assert body.tool_use() is None


def test_a_message_may_be_sent_back_as_it_came() -> None:
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    messages = [*HELLO, {"role": "assistant", "content": "Hi", **empty}, *HELLO]
    plain = [*HELLO, {"role": "assistant", "content": "Hi"}, *HELLO]
    assert chat_request({"messages": messages}).body == chat_request({"messages": plain}).body


def test_a_chat_with_tools_travels_unchanged() -> None:
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
    ]
    body = chat_request({"messages": messages, "tools": [tool("f")], "tool_choice": named("f")}).body
    assert parse_job(body.wire()) == body


def test_images_of_a_chat_travel_unchanged() -> None:
    body = chat_request(shown(PART, image(PNG, detail="high"), image(PNG))).body
    wire = body.wire()
    assert wire["messages"][0]["content"][1]["image_url"] == {"url": PNG, "detail": "high"}
    assert parse_job(wire) == body


def test_an_image_on_another_host_is_refused_with_what_to_do() -> None:
    words = "nothing is fetched from other hosts; send the image's bytes as a data: URL"
    with pytest.raises(InvalidRequest, match=words):
        chat_request(shown(image("https://a.example/b.png")))


def test_best_of_asks_for_logprobs_of_its_own() -> None:
    body = completion_request({"prompt": "a", "best_of": 3}).body
    assert (body.sequences, body.n, body.logprobs, body.sampling().logprobs) == (3, 1, None, 0)
    assert completion_request({"prompt": "a", "best_of": 3, "logprobs": 2}).body.sampling().logprobs == 2
    assert completion_request({"prompt": "a", "best_of": 2, "n": 2}).body.sampling().logprobs is None


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
        ("tools.0.function", {"tools": [{"type": "function"}]}),
        ("tools.0.type", {"tools": [{"type": "custom", "custom": {"name": "f"}}]}),
        ("tools.0.function.name", {"tools": [tool("no spaces")]}),
        ("tools.0.function.parameters", {"tools": [tool("f", {"title": "\ud800"})]}),
        ("tools.0.function.parameters", {"tools": [tool("f", {"type": "string"})]}),
        ("tools", {"tools": [tool("f"), tool("f")]}),
        ("tool_choice", {"tool_choice": "auto"}),
        ("tool_choice", {"tools": [tool("f")], "tool_choice": "any"}),
        ("tool_choice", {"tools": [tool("f")], "tool_choice": named("g")}),
        ("tool_choice", {"tools": [tool("f")], "tool_choice": allowed("auto", "f", "g")}),
        ("tool_choice.function", {"tools": [tool("f")], "tool_choice": {"type": "function"}}),
        ("parallel_tool_calls", {"parallel_tool_calls": True}),
        ("response_format", {"tools": [tool("f")], "response_format": {"type": "json_object"}}),
        ("ignore_eos", {"tools": [tool("f")], "ignore_eos": True}),
        ("messages.0.tool_calls", {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}),
        ("messages.0.tool_call_id", {"messages": [{"role": "tool", "content": "x"}]}),
        ("messages.0.content", {"messages": [{"role": "assistant"}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": None}]}),
        ("messages.0.refusal", {"messages": [{"role": "user", "content": "x", "refusal": "no"}]}),
        ("messages.0.function_call", {"messages": [{**HELLO[0], "function_call": {"name": "f"}}]}),
        ("messages.0.tool_calls", {"messages": [{"role": "assistant", "tool_calls": [CALL, CALL]}]}),
        ("metadata.a", {"metadata": {"a": "x" * 513}}),
        ("service_tier", {"service_tier": "scale"}),
        ("service_tier", {"service_tier": "flex", "priority": "normal"}),
        ("stream_options.include_obfuscation", {"stream": True, "stream_options": OBFUSCATED}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("echo", {"echo": True}),
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
        ("messages.0.content.0.type", shown({"type": "input_audio", "input_audio": {}})),
        ("messages.0.content.0.image_url", shown({"type": "image_url", "text": ""})),
        ("messages.0.content.0.image_url", shown(image(PNG) | PART)),
        ("messages.0.content.0.image_url.url", shown(image("https://a.example/b.png"))),
        ("messages.0.content.0.image_url.url", shown(image("HTTP://a.example/b.png"))),
        ("messages.0.content.0.image_url.url", shown(image("file:///etc/passwd"))),
        ("messages.0.content.0.image_url.url", shown(image("data:text/plain;base64,aGk="))),
        ("messages.0.content.0.image_url.url", shown(image("data:image/png,aGk="))),
        ("messages.0.content.0.image_url.url", shown(image("data:image/png;base64,\ud800"))),
        ("messages.0.content.0.image_url.url", shown(image(""))),
        ("messages.0.content.0.image_url.detail", shown(image(PNG, detail="best"))),
        ("messages.0.content.0.image_url.size", shown(image(PNG, size=5))),
        ("messages.0.content", shown(image(PNG), role="system")),
        ("messages.0.content", shown(image(PNG), role="assistant")),
        ("messages.0.content.0.zz", {"messages": [{"role": "user", "content": [{**PART, "zz": 1}]}]}),
        ("messages.0.zz", {"messages": [{**HELLO[0], "zz": 1}]}),
        ("tools.0.function.zz", {"tools": [{"type": "function", "function": {"name": "f", "zz": 1}}]}),
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
        ("echo", {"echo": True, "logprobs": 1}),
        ("suffix", {"suffix": "end"}),
        ("best_of", {"best_of": 2, "n": 3}),
        ("best_of", {"best_of": 3, "n": 2, "stream": True}),
        ("prompt", {"prompt": ["a"] * 129}),
        ("prompt.1", {"prompt": ["a", ""]}),
        ("prompt.1.0", {"prompt": [[1], [-1]]}),
        ("prompt.1", {"prompt": ["a", 5]}),
        ("prompt", {"prompt": ""}),
        ("tools", {"tools": [tool("f")]}),
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
