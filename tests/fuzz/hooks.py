"""What schemathesis cannot know: rules that JSON Schema has no words for, and requests that say nothing.

Valid requests are brought in line with each rule that the description leaves to words; whatever else they
hold stays as it was drawn. Invalid ones are sent as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import schemathesis
from schemathesis.generation import GenerationMode

from tests.images import data_url, png

VOCABULARY = 512
"""Of the tiny checkpoint."""
FILE = "WICORE_FUZZ_FILE"
"""The variable that names a file of the service under test."""
IMAGE = data_url(png())
Body = dict[str, Any]


def _turns(messages: list[Body]) -> list[Body]:
    """System messages first, then user and assistant in turn, the user first: an order over a whole list."""
    lead = next((i for i, one in enumerate(messages) if one["role"] not in ("system", "developer")), None)
    lead = max(0, len(messages) - 1) if lead is None else lead
    roles = ("user", "assistant")
    told = [one | {"role": roles[(i - lead) % 2]} if i >= lead else one for i, one in enumerate(messages)]
    return [{"role": one["role"], "content": _content(one.get("content"), one["role"])} for one in told]


def _content(content: Any, role: str) -> Any:
    """Text, and images of a user: refusals, and calls that stand for a content, are for some roles only."""
    if isinstance(content, list) and all(_told(part, role) for part in content):
        return [_part(part) for part in content]
    return content if isinstance(content, str) else "Hello"


def _told(part: Body, role: str) -> bool:
    return part.get("text") is not None or ("image" in part["type"] and role == "user")


def _part(part: Body) -> Body:
    """What is drawn as an image's file is none; its other fields stay."""
    if part.get("text") is not None:
        kind = part["type"] if part["type"].endswith("_text") else "text"
        return {"type": kind, "text": part["text"]}
    url = part["image_url"]
    return part | {"image_url": url | {"url": IMAGE} if isinstance(url, dict) else IMAGE}


def _ids(prompt: Any) -> Any:
    """Token ids of this vocabulary, whose size is the checkpoint's."""
    if isinstance(prompt, list):
        return [one if isinstance(one, str) else _ids(one) for one in prompt]
    return prompt if isinstance(prompt, str) else int(prompt) % VOCABULARY


def _conversation(items: Any) -> Any:
    """Its messages, in turn; calls of tools must each be made and answered, in order."""
    if isinstance(items, str):
        return items
    messages = [one for one in items if one.get("type", "message") == "message"]
    return _turns(messages) if messages else "Hello"


SETTLED: Mapping[str, Callable[[Any], Any]] = {
    "messages": _turns,
    "input": _conversation,
    # Their names must be unique, and those of the choice among them.
    "tools": lambda tools: [],
    "tool_choice": lambda choice: None,
    "parallel_tool_calls": lambda parallel: None,
    # Whether an output can be held to a schema is found out by compiling it.
    "response_format": lambda form: {"type": "json_object"} if form["type"] == "json_schema" else form,
    "text": lambda config: None,
    # The id of a response that is there and complete.
    "previous_response_id": lambda name: None,
    "input_file_id": lambda name: os.environ[FILE],
    "prompt": _ids,
    "logit_bias": lambda biases: {str(int(name) % VOCABULARY): bias for name, bias in biases.items()},
    # The one that is served; any other is a 404, and all that is behind it would stay untried.
    "model": lambda name: "tiny",
    # Refused, as the service under test has no webhooks.secret: webhooks go out to others.
    "webhook_url": lambda url: None,
    # 504 is right for a job that may not take its time, and tells nothing.
    "timeout_s": lambda seconds: max(seconds, 100),
    "queue_timeout_s": lambda seconds: max(seconds, 100),
    # At most the context, less the prompt.
    "max_tokens": lambda tokens: 1 + tokens % 64,
    "max_completion_tokens": lambda tokens: 1 + tokens % 64,
    "max_output_tokens": lambda tokens: 1 + tokens % 64,
}
"""Fields that are not null, to what obeys the rule."""


def settle(body: Body) -> Body:
    """A valid body that the service can serve."""
    settled = {
        name: SETTLED[name](value) if name in SETTLED and value is not None else value
        for name, value in body.items()
    }
    # Relations of several fields.
    if settled.get("best_of") is not None:
        settled["best_of"] = settled.get("n") or 1
    if settled.get("echo"):
        settled["logprobs"] = None
    if (settled.get("response_format") or {}).get("type", "text") != "text":
        settled["ignore_eos"] = False
    return settled


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """The last moment before a request is sent, in every phase."""
    if case.method == "DELETE" and case.path_parameters.get("file_id") == os.environ[FILE]:
        case.path_parameters["file_id"] = "spared"
    valid = case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE
    # A body that is set is judged anew, and a file's bytes, as no JSON, then count as a fault.
    if valid and isinstance(case.body, dict) and (settled := settle(case.body)) != case.body:
        case.body = settled


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """No headers or parameters of other names as the only fault: HTTP lets any be sent, and so do we."""
    return not any(name.startswith("x-schemathesis") for name in (*case.headers, *case.query))
