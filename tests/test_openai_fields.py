"""The table of OpenAI's request fields: each one of the official client's is honoured, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from wicore.errors import InvalidRequest
from wicore.openai import OpenAIRequest, chat_request, completion_request

DOCS = Path(__file__).parent.parent / "docs" / "api.md"
HELLO = [{"role": "user", "content": "Hello"}]
FUNCTION = {"name": "f"}
TOOLS = [{"type": "function", "function": FUNCTION}]

HONOURED, HINT, REFUSED = "honoured", "hint", "refused"

SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "frequency_penalty": (HONOURED, {"frequency_penalty": 0.5}),
    "logit_bias": (HONOURED, {"logit_bias": {"7": 1}}),
    "max_tokens": (HONOURED, {"max_tokens": 5}),
    "model": (HONOURED, {"model": "tiny"}),
    "n": (HONOURED, {"n": 2}),
    "presence_penalty": (HONOURED, {"presence_penalty": 0.5}),
    "seed": (HONOURED, {"seed": 7}),
    "stop": (HONOURED, {"stop": [str(i) for i in range(16)]}),
    "stream": (HONOURED, {"stream": True}),
    "stream_options": (HONOURED, {"stream": True, "stream_options": {"include_usage": True}}),
    "temperature": (HONOURED, {"temperature": 0.5}),
    "top_p": (HONOURED, {"top_p": 0.5}),
    "user": (HONOURED, {"user": "ann"}),
}
CHAT = SHARED | {
    "audio": (REFUSED, {"audio": {"voice": "ash", "format": "wav"}}),
    "function_call": (REFUSED, {"function_call": "auto"}),
    "functions": (REFUSED, {"functions": [FUNCTION]}),
    "logprobs": (HONOURED, {"logprobs": True}),
    "max_completion_tokens": (HONOURED, {"max_completion_tokens": 5}),
    "messages": (HONOURED, {"messages": [{"role": "developer", "content": "Be brief."}, *HELLO]}),
    "metadata": (HONOURED, {"metadata": {"order": "17"}}),
    "modalities": (REFUSED, {"modalities": ["text", "audio"]}),
    "moderation": (REFUSED, {"moderation": {"model": "omni-moderation-latest"}}),
    "parallel_tool_calls": (HONOURED, {"tools": TOOLS, "parallel_tool_calls": False}),
    "prediction": (REFUSED, {"prediction": {"type": "content", "content": "Hi"}}),
    "prompt_cache_key": (HINT, {"prompt_cache_key": "ann"}),
    "prompt_cache_options": (REFUSED, {"prompt_cache_options": {"mode": "explicit"}}),
    "prompt_cache_retention": (REFUSED, {"prompt_cache_retention": "24h"}),
    "reasoning_effort": (REFUSED, {"reasoning_effort": "low"}),
    "response_format": (HONOURED, {"response_format": {"type": "json_object"}}),
    "safety_identifier": (HINT, {"safety_identifier": "ann"}),
    "service_tier": (HONOURED, {"service_tier": "flex"}),
    "store": (REFUSED, {"store": True}),
    "tool_choice": (HONOURED, {"tools": TOOLS, "tool_choice": "required"}),
    "tools": (HONOURED, {"tools": TOOLS}),
    "top_logprobs": (HONOURED, {"logprobs": True, "top_logprobs": 2}),
    "verbosity": (REFUSED, {"verbosity": "high"}),
    "web_search_options": (REFUSED, {"web_search_options": {}}),
}
COMPLETION = SHARED | {
    "best_of": (HONOURED, {"best_of": 2}),
    "echo": (HONOURED, {"echo": True}),
    "logprobs": (HONOURED, {"logprobs": 5}),
    "prompt": (HONOURED, {"prompt": ["one", "two"]}),
    "suffix": (REFUSED, {"suffix": "the end"}),
}


def fields_of(params: Any) -> set[str]:
    """Every field of the client's call, streaming or not."""
    kinds = (params.CompletionCreateParamsNonStreaming, params.CompletionCreateParamsStreaming)
    return {name for kind in kinds for name in get_type_hints(kind)}


def test_every_field_of_the_official_client_is_in_the_table() -> None:
    assert fields_of(chat_params) == set(CHAT)
    assert fields_of(completion_params) == set(COMPLETION)


@pytest.mark.parametrize(
    ("parse", "base", "field", "fate", "sample"),
    [(chat_request, {"messages": HELLO}, name, *entry) for name, entry in CHAT.items()]
    + [(completion_request, {"prompt": "a"}, name, *entry) for name, entry in COMPLETION.items()],
)
def test_each_field_is_honoured_or_refused_by_name(
    parse: Callable[[Any], OpenAIRequest],
    base: dict[str, Any],
    field: str,
    fate: str,
    sample: dict[str, Any],
) -> None:
    without = parse(base | {name: value for name, value in sample.items() if name != field})
    if field not in base:
        assert parse(base | sample | {field: None}) == without, "null means the same as leaving it out"
    if fate == REFUSED:
        with pytest.raises(InvalidRequest, match=f"^{field}: unsupported") as caught:
            parse(base | sample)
        assert caught.value.param == field
    else:
        assert (parse(base | sample) != without) == (fate == HONOURED)


def documented(table: str) -> set[str]:
    """The fields in the first column of the table that follows a heading of docs/api.md."""
    section = DOCS.read_text().partition(f"\n{table}\n")[2].partition("\n#")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([a-z_]+)[`.]", row)}


def test_the_documentation_names_every_field_where_it_belongs() -> None:
    supported, unsupported = documented("### Fields"), documented("### Fields that are not supported")
    for name, (fate, _) in [*CHAT.items(), *COMPLETION.items()]:
        assert name in (unsupported if fate == REFUSED else supported), name
    assert not supported & unsupported
