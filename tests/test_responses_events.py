"""The Responses API's stream of a job's log, and the response object of its record."""

from __future__ import annotations

from typing import Any

import pytest
from openai._models import construct_type
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from wicore.openai import ChoiceResult, result_object
from wicore.openai.responses_api import EventWriter, Stored, output_items, response_request
from wicore.request import Event, started_event, terminal_event, token_event, usage_of

ENTRY = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
STARTED = started_event("j", 1, 1)


def stored(**fields: Any) -> Stored:
    return response_request({"input": "Hi", **fields}).stored([])


def written(log: list[Event], kept: Stored | None = None) -> list[dict[str, Any]]:
    writer = EventWriter("j", kept or stored(), "tiny", 100)
    return [*writer.opening(), *(told for event in log for told in writer.events(event, 200))]


def ended(kind: Any = "done", reason: str | None = "stop", error: Any = None) -> list[Event]:
    tokens = [token_event("j", 2 + i, 0, text, [i]) for i, text in enumerate(["a", "", "b"])]
    end = terminal_event("j", 5, kind, finish_reason=reason, usage=usage_of(4, 3), error=error)
    return [STARTED, *tokens, end]


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_a_stream_has_openais_events_in_openais_order() -> None:
    events = written(ended())
    assert types(events) == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_the_events_add_up_to_the_response_that_ends_them() -> None:
    events = written(ended())
    response = events[-1]["response"]
    assert "".join(event["delta"] for event in events if "delta" in event) == "ab"
    assert [event["text"] for event in events if "text" in event] == ["ab"]
    (item,) = response["output"]
    assert item == events[-2]["item"]
    assert item["content"][0]["text"] == "ab"
    assert (response["status"], response["completed_at"]) == ("completed", 200)
    assert response["usage"] | {"input_tokens_details": 0, "output_tokens_details": 0} == {
        **{"input_tokens": 4, "output_tokens": 3, "total_tokens": 7},
        **{"input_tokens_details": 0, "output_tokens_details": 0},
    }


@pytest.mark.parametrize("background", [False, True])
def test_the_official_client_knows_every_event(background: bool) -> None:
    for end in (
        ended(),
        ended(reason="length"),
        ended("failed", error={"code": "worker_lost", "message": "m"}),
    ):
        for event in written(end, stored(background=background)):
            TypeAdapter(ResponseStreamEvent).validate_python(event)
    assert construct_type(type_=Response, value=written(ended())[-1]["response"]).output_text == "ab"


def test_a_background_response_says_that_it_is_queued() -> None:
    events = written([STARTED], stored(background=True))
    assert types(events) == ["created", "queued", "in_progress"]
    assert [event["response"]["status"] for event in events] == ["queued", "queued", "in_progress"]


def test_an_answer_that_was_cut_is_incomplete() -> None:
    *_, item, last = written(ended(reason="length"))
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (item["item"]["status"], last["response"]["completed_at"]) == ("incomplete", None)


@pytest.mark.parametrize(
    ("kind", "code", "type_", "status", "told"),
    [
        ("failed", "worker_lost", "response.failed", "failed", "server_error"),
        ("failed", "too_large", "response.failed", "failed", "invalid_prompt"),
        ("expired", "expired", "response.failed", "failed", "server_error"),
        ("cancelled", "cancelled", "response.incomplete", "cancelled", None),
    ],
)
def test_a_job_that_does_not_succeed_ends_the_stream_with_what_there_is(
    kind: Any, code: str, type_: str, status: str, told: str | None
) -> None:
    last = written(ended(kind, None, {"code": code, "message": "why"}))[-1]
    assert (last["type"], last["response"]["status"]) == (type_, status)
    assert last["response"]["error"] == (told and {"code": told, "message": "why"})
    (item,) = last["response"]["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "ab")


def test_a_job_that_never_started_ends_the_stream_without_an_item() -> None:
    events = written([terminal_event("j", 1, "expired", error={"code": "expired", "message": "m"})])
    assert types(events) == ["created", "failed"]
    assert events[-1]["response"]["output"] == []


def test_a_job_without_text_has_an_item_all_the_same() -> None:
    end = terminal_event("j", 2, "done", finish_reason="stop", usage=usage_of(4, 0))
    assert types(written([STARTED, end]))[2:] == [
        *("output_item.added", "content_part.added", "output_text.done", "content_part.done"),
        *("output_item.done", "completed"),
    ]


def test_a_worker_that_takes_over_changes_nothing() -> None:
    log = ended()
    resumed = {**started_event("j", 3, 2)}
    assert written([*log[:2], resumed, *log[2:]]) == written(log)


def test_logprobs_are_in_the_deltas_and_whole_at_the_end() -> None:
    log = [STARTED, token_event("j", 2, 0, "", [1], [ENTRY]), token_event("j", 3, 0, "a", [2], [ENTRY])]
    events = written([*log, terminal_event("j", 4, "done", finish_reason="stop", usage=usage_of(1, 2))])
    assert [event["logprobs"] for event in events if "delta" in event] == [[ENTRY], [ENTRY]]
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == [ENTRY, ENTRY]


TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
ONE, TWO = '{"name": "f", "parameters": {}}', '{"name": "f", "parameters": {"a": "x"}}'


def told(text: str, size: int, reason: str = "tool_calls", **more: Any) -> list[dict[str, Any]]:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    tokens = [token_event("j", 2 + i, 0, piece, [i]) for i, piece in enumerate(pieces)]
    end = terminal_event("j", 2 + len(pieces), "done", finish_reason=reason, usage=usage_of(1, 1))
    return written([STARTED, *tokens, end], stored(tools=[TOOL], **more))


@pytest.mark.parametrize("size", [1, 7, 200])
def test_calls_are_items_with_their_arguments(size: int) -> None:
    events = told(f"[{ONE}, {TWO}]", size)
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event)
    items = events[-1]["response"]["output"]
    assert [(item["type"], item["arguments"]) for item in items] == [
        ("function_call", "{}"),
        ("function_call", '{"a": "x"}'),
    ]
    assert [item["status"] for item in items] == ["completed"] * 2
    assert len({item["call_id"] for item in items} | {item["id"] for item in items}) == 4
    for index, item in enumerate(items):
        own = [event for event in events if event.get("output_index") == index]
        assert (own[0]["type"], own[0]["item"]["arguments"]) == ("response.output_item.added", "")
        deltas = [event["delta"] for event in own[1:-2]]
        assert ("".join(deltas), own[-2]["arguments"]) == (item["arguments"], item["arguments"])
        assert (own[-1]["type"], own[-1]["item"]) == ("response.output_item.done", item)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_the_calls_of_a_stream_are_those_of_the_result() -> None:
    body = response_request({"input": "Hi", "tools": [TOOL]}).job([], lambda body: None)
    both = f"[{ONE}, {TWO}]"
    for text, reason in ((both, "tool_calls"), (ONE, "tool_calls"), (ONE[:-3], "length"), ("Hi", "stop")):
        result = result_object("j", body, "tiny", 1, [ChoiceResult(text, reason)], {})  # type: ignore[arg-type]
        assert told(text, 3, reason)[-1]["response"]["output"] == output_items("j", result)


def test_an_answer_in_text_is_a_message_though_there_are_tools() -> None:
    events = told("Hello", 2, "stop")
    assert types(events)[2:5] == ["output_item.added", "content_part.added", "output_text.delta"]
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Hello"


def test_a_call_that_was_cut_is_incomplete() -> None:
    events = told(TWO[:-4], 5, "length")
    assert events[-1]["type"] == "response.incomplete"
    (item,) = events[-1]["response"]["output"]
    assert (item["status"], item["arguments"]) == ("incomplete", '{"a": "')


def test_where_no_call_is_allowed_what_looks_like_one_is_text() -> None:
    (item,) = told(ONE, 5, "stop", tool_choice="none")[-1]["response"]["output"]
    assert item["content"][0]["text"] == ONE


def test_logprobs_wait_until_it_is_known_what_the_answer_is() -> None:
    log = [STARTED, token_event("j", 2, 0, "", [1], [ENTRY]), token_event("j", 3, 0, "a", [2], [ENTRY])]
    log.append(terminal_event("j", 4, "done", finish_reason="stop", usage=usage_of(1, 2)))
    events = written(log, stored(tools=[TOOL]))
    assert [event["logprobs"] for event in events if "delta" in event] == [[ENTRY, ENTRY]]


def test_a_response_repeats_what_was_asked_for() -> None:
    asked = {"instructions": "I", "metadata": {"a": "b"}, "temperature": 0.5, "prompt_cache_key": "k"}
    response = written([], stored(**asked))[0]["response"]
    assert {name: response[name] for name in asked} == asked
    assert (response["top_p"], response["truncation"], response["tools"]) == (1.0, "disabled", [])
