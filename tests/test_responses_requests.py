"""Bodies of the Responses API become jobs, or say which field is wrong; items become chats."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from tests.images import data_url, png
from wicore.errors import InvalidRequest, TooLarge
from wicore.openai.responses_api import Stored, numbered, response_request
from wicore.openai.responses_api.request import ResponseBody
from wicore.request import JobBody, Priority

HELLO: dict[str, Any] = {"input": "Hello"}
USER = {"role": "user", "content": "Hi"}
ANSWER = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "phase": None,
    "content": [{"type": "output_text", "text": "Yes?", "annotations": [], "logprobs": []}],
}


IMAGE = {"type": "input_image", "image_url": data_url(png()), "detail": "high"}


def seen(*content: Any, role: str = "user") -> dict[str, Any]:
    return {"input": [{"role": role, "content": list(content)}]}


def job(body: dict[str, Any], earlier: Any = (), check: Any = None) -> JobBody:
    return response_request(body).job(list(earlier), check)


def chat(body: JobBody) -> list[tuple[str, str]]:
    return [(message.role, message.text()) for message in body.messages or []]


def test_a_text_is_one_user_message_after_the_instructions() -> None:
    body = job({"input": "Hello", "instructions": "Be brief."})
    assert chat(body) == [("developer", "Be brief."), ("user", "Hello")]


def test_items_become_a_chat_in_their_order() -> None:
    parts = [{"type": "input_text", "text": "And "}, {"type": "input_text", "text": "you?"}]
    body = job({"input": [USER, ANSWER, {"type": "message", "role": "user", "content": parts}]})
    assert chat(body) == [("user", "Hi"), ("assistant", "Yes?"), ("user", "And you?")]


def test_a_follow_up_comes_after_all_that_was_said_before() -> None:
    before = numbered(response_request({"input": "Hi"}).input, "j")
    body = job({"input": "And you?"}, [*before, ANSWER])
    assert chat(body) == [("user", "Hi"), ("assistant", "Yes?"), ("user", "And you?")]


def test_items_without_an_id_get_one_that_is_always_the_same() -> None:
    items = response_request({"input": [USER, ANSWER, USER]}).input
    assert [item["id"] for item in numbered(items, "j")] == ["msg_j_0", "msg_1", "msg_j_2"]


def test_fields_of_sampling_and_queueing_reach_the_job() -> None:
    fields = {"temperature": 0, "top_p": 0.5, "seed": 7, "top_k": 3, "stop": "x", "priority": "batch"}
    body = job(
        {**HELLO, **fields, "timeout_s": 9, "max_output_tokens": 5, "metadata": {"a": "b"}, "user": "u"}
    )
    assert (body.temperature, body.top_p, body.seed, body.top_k, body.stop) == (0, 0.5, 7, 3, ["x"])
    assert (body.priority, body.timeout_s, body.max_tokens) == (Priority.BATCH, 9, 5)
    assert (body.metadata, body.user, body.kind) == ({"a": "b"}, "u", "chat")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 3}, 3),
        ({"top_logprobs": 2}, 2),
    ],
)
def test_logprobs_are_reported_when_they_are_asked_for(given: dict[str, Any], expected: int | None) -> None:
    assert job({**HELLO, **given}).logprobs == expected


TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
VALUES: dict[str, tuple[Any, Any]] = {
    # field: (a value that is honoured or asks for nothing, a value that is refused)
    "access_programs": (None, {"cyber": "standard"}),
    "background": (True, "yes"),
    "background_options": ({"completion_window": "soonest"}, {"completion_window": "2h"}),
    "context_management": ([], [{"type": "compaction"}]),
    "conversation": (None, "conv_1"),
    "image": (None, {"context_compression": "auto"}),
    "include": (["message.output_text.logprobs"], ["reasoning.encrypted_content"]),
    "input": ([USER], [{"type": "reasoning", "id": "r", "summary": []}]),
    "instructions": ("Be brief.", 5),
    "max_output_tokens": (5, 0),
    "max_tool_calls": (None, 3),
    "metadata": ({"a": "b"}, {"a": 1}),
    "model": ("tiny", 5),
    "moderation": (None, {"model": "m"}),
    "parallel_tool_calls": (False, "no"),
    "previous_response_id": ("resp_1", 5),
    "prompt": (None, {"id": "pmpt_1"}),
    "prompt_cache_key": ("k", 5),
    "prompt_cache_options": (None, {"mode": "explicit"}),
    "prompt_cache_retention": (None, "24h"),
    "reasoning": ({"effort": None, "summary": None}, {"effort": "high"}),
    "safety_identifier": ("s", 5),
    "service_tier": ("auto", "flex"),
    "store": (False, "no"),
    "stream_options": (None, {"include_obfuscation": True}),
    "temperature": (0.5, 3),
    "text": ({"format": {"type": "json_object"}}, {"format": {"type": "grammar"}}),
    "tool_choice": ("auto", "required"),
    "tools": ([TOOL], [{"type": "web_search"}]),
    "top_logprobs": (5, 21),
    "top_p": (0.5, 0),
    "truncation": ("auto", "middle"),
    "user": ("u", 5),
}


def test_every_field_of_the_official_client_is_known_here() -> None:
    assert VALUES.keys() == ResponseCreateParamsBase.__annotations__.keys()


@pytest.mark.parametrize("field", sorted(VALUES))
def test_every_field_of_the_official_client_is_taken_or_refused_by_name(field: str) -> None:
    honoured, refused = VALUES[field]
    job({**HELLO, field: honoured}, check=lambda body: None)
    response_request({**HELLO, field: None} if field != "input" else HELLO)
    streamed = {"stream": True} if field == "stream_options" else {}
    with pytest.raises(InvalidRequest) as caught:
        job({**HELLO, **streamed, field: refused})
    assert str(caught.value.param).split(".")[0] == field
    assert caught.value.message.startswith(field)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        (seen({**IMAGE, "image_url": "https://a.example/b.png"}), "input.0.content.0.image_url"),
        (seen({"type": "input_image"}), "input.0.content.0.image_url"),
        (seen({**IMAGE, "file_id": "file-1"}), "input.0.content.0.file_id"),
        (seen({**IMAGE, "detail": "best"}), "input.0.content.0.detail"),
        (seen(IMAGE, role="system"), "input.0.content"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": "x", "mood": "good"}]}, "input.0.mood"),
        ({**HELLO, "background": True, "store": False}, "background"),
        ({**HELLO, "stream_options": {}}, "stream_options"),
        ({**HELLO, "logprobs": 3}, "logprobs"),
        ({**HELLO, "messages": [USER]}, "messages"),
        ({**HELLO, "max_tokens": 3}, "max_tokens"),
        ({**HELLO, "nonsense": None}, "nonsense"),
        ({**HELLO, "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        job(body)
    assert str(caught.value.param).startswith(param)


CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
CALLED = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}


def test_an_image_is_that_of_a_chat_where_it_stands() -> None:
    words = {"type": "input_text", "text": "What"}
    body = job(seen(words, IMAGE, {**words, "text": "is it?"}))
    assert body.messages is not None
    content = body.messages[0].content
    assert isinstance(content, list)
    assert [part.type for part in content] == ["text", "image_url", "text"]
    assert content[1].image_url is not None
    assert (content[1].image_url.url, content[1].image_url.detail) == (IMAGE["image_url"], "high")


def test_tools_and_formats_are_those_of_a_chat() -> None:
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    body = job({**HELLO, "text": {"format": schema}})
    assert body.response_format is not None
    assert body.response_format.json_schema is not None
    assert body.response_format.json_schema.name == "n"
    use = job({**HELLO, "tools": [TOOL], "parallel_tool_calls": False, "tool_choice": "required"}).tool_use()
    assert use is not None
    assert (use.functions[0].name, use.required, use.parallel) == ("weather", True, False)


@pytest.mark.parametrize(
    ("choice", "required"),
    [
        ({"type": "function", "name": "weather"}, True),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]},
            False,
        ),
    ],
)
def test_a_tool_choice_may_name_functions(choice: Any, required: bool) -> None:
    other = {**TOOL, "name": "time"}
    use = job({**HELLO, "tools": [TOOL, other], "tool_choice": choice}).tool_use()
    assert use is not None
    assert ([function.name for function in use.functions], use.required) == (["weather"], required)


def test_calls_and_their_results_become_a_chat() -> None:
    second = {**CALL, "call_id": "c2"}
    items = [
        USER,
        CALL,
        second,
        CALLED,
        {**CALLED, "call_id": "c2", "output": [{"type": "input_text", "text": "s"}]},
    ]
    messages = job({"input": items, "tools": [TOOL]}).messages or []
    assert [message.role for message in messages] == ["user", "assistant", "tool", "tool"]
    assert [call.id for call in messages[1].tool_calls or []] == ["c1", "c2"]
    assert [(m.tool_call_id, m.text()) for m in messages[2:]] == [("c1", "sunny"), ("c2", "s")]


def test_without_truncation_a_job_is_not_shortened() -> None:
    def never(body: JobBody) -> None:
        raise AssertionError

    assert len(chat(job({"input": [USER, ANSWER, USER]}, check=never))) == 3


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 6, 7])
def test_truncation_leaves_out_the_oldest_turns_and_no_more_than_needed(most: int) -> None:
    def check(body: JobBody) -> None:
        if len(body.messages or []) > most:
            raise TooLarge("messages: too long", param="messages")

    system = {"role": "system", "content": "S"}
    turns = [{"role": "user", "content": str(i)} if i % 2 == 0 else ANSWER for i in range(5)]
    body = job({"input": [system, *turns], "truncation": "auto", "instructions": "I"}, check=check)
    kept = [text for _, text in chat(body)]
    assert kept[:2] == ["I", "S"]
    assert kept[-1] == "4"
    assert len(kept) == {1: 3, 2: 3, 3: 3, 4: 3, 5: 5, 6: 5, 7: 7}[most]


def test_what_is_stored_survives_json() -> None:
    stored = response_request({**HELLO, "metadata": {"a": "b"}, "text": {"format": {"type": "text"}}}).stored(
        [ANSWER]
    )
    assert Stored.from_json(json.loads(json.dumps(stored.as_json()))) == stored


def test_a_field_is_either_openais_or_a_jobs() -> None:
    ours = ResponseBody.model_fields.keys() - VALUES.keys() - {"stream"}
    assert ours <= JobBody.model_fields.keys()
