"""What OpenAI's clients read: a stream's chunks, put together, are the answer that is not streamed."""

from __future__ import annotations

from typing import Any

import pytest

from wicore.openai import ChoiceResult, ChunkWriter, completion_id, merged, result_object, summed_usage
from wicore.request import JobBody, parse_job, token_event, usage_of

TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALLS = '[{"name": "f", "parameters": {"x": 1}}, {"name": "f", "parameters": {}}]'
USAGE = usage_of(3, 4)


def chat(**fields: Any) -> JobBody:
    return parse_job({"messages": [{"role": "user", "content": "Hi"}], **fields})


def writer(body: JobBody, job_id: str = "j", **fields: Any) -> ChunkWriter:
    return ChunkWriter(
        job_id, body.kind, "m", 1, completion_id("j", body.kind), use=body.tool_use(), **fields
    )


def streamed(body: JobBody, texts: list[list[str]], finish: str, **fields: Any) -> list[dict[str, Any]]:
    """All chunks of a job whose choices come in these pieces."""
    chunks = writer(body, **fields)
    found = chunks.opening(len(texts))
    for index, pieces in enumerate(texts):
        for i, text in enumerate(pieces):
            reason: Any = finish if i == len(pieces) - 1 else None
            found += chunks.chunks(token_event("j", i, index, text, [7], None, reason))
    return found


def assembled(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What a client makes of a chat's chunks: for each choice its content, calls and end."""
    made: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        into = made.setdefault(choice["index"], {"content": None, "calls": [], "finish": []})
        delta = choice["delta"]
        if delta.get("content"):
            into["content"] = (into["content"] or "") + delta["content"]
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(into["calls"]), "a call begins with its id and name, once"
                into["calls"].append({k: call[k] for k in ("id", "type")} | {"function": call["function"]})
            else:
                function = into["calls"][call["index"]]["function"]
                into["calls"][call["index"]]["function"] = {
                    **function,
                    "arguments": function["arguments"] + call["function"]["arguments"],
                }
        into["finish"] += [choice["finish_reason"]] if choice["finish_reason"] else []
    return made


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("text", "finish"), [(CALLS, "tool_calls"), (CALLS[:45], "length"), ("No.", "stop")])
def test_a_streamed_answer_with_tools_is_the_whole_one(text: str, finish: Any, size: int) -> None:
    body = chat(tools=TOOLS, n=2)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    made = assembled(streamed(body, [pieces, pieces], finish))
    whole = result_object("j", body, "m", 1, [ChoiceResult(text, finish)] * 2, USAGE)
    for choice in whole["choices"]:
        streamed_choice = made[choice["index"]]
        assert streamed_choice["content"] == choice["message"]["content"]
        assert streamed_choice["calls"] == choice["message"].get("tool_calls", [])
        assert streamed_choice["finish"] == [finish]
    ids = [call["id"] for choice in made.values() for call in choice["calls"]]
    assert len(set(ids)) == len(ids)


def test_an_echoing_stream_begins_with_the_prompt() -> None:
    body = parse_job({"kind": "completion", "prompt": "Once", "echo": True, "n": 2})
    chunks = streamed(body, [[" upon"], [" more"]], "length", echo="Once")
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "Once upon", 1: "Once more"}


def test_the_choices_of_several_prompts_are_numbered_through() -> None:
    body = parse_job({"kind": "completion", "prompt": "a", "n": 2})
    results = [
        result_object(job, body, "m", 1, [ChoiceResult(f"{job}{i}", "stop") for i in range(2)], USAGE)
        for job in ("j", "k")
    ]
    whole = merged(results)
    assert [(c["index"], c["text"]) for c in whole["choices"]] == [(0, "j0"), (1, "j1"), (2, "k0"), (3, "k1")]
    assert whole["id"] == "cmpl-j"
    assert whole["usage"]["total_tokens"] == 14
    second = writer(body, "k", first_index=2).chunks(token_event("k", 1, 1, "k1", [7]))
    assert (second[0]["id"], second[0]["choices"][0]["index"]) == ("cmpl-j", 3)


def test_usages_are_summed_with_their_details() -> None:
    one = {"total_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    assert summed_usage([one, one]) == {"total_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}


def test_every_chunk_carries_what_all_have_in_common() -> None:
    body = chat()
    fields = {"include_usage": True, "fingerprint": "fp_1", "service_tier": "default"}
    chunks = streamed(body, [["Hi", "!"]], "stop", **fields)
    last = writer(body, **fields).usage(USAGE)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], USAGE)
    for chunk in [*chunks, last]:
        assert (chunk["id"], chunk["system_fingerprint"], chunk["service_tier"]) == (
            "chatcmpl-j",
            "fp_1",
            "default",
        )
