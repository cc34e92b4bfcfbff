"""OpenAI's request bodies reduced to a job.

Most fields are a job's own and are validated there, once. What this module adds is what OpenAI's
bodies have beyond a job: streaming options, other names and shapes of the same thing, and fields
that WiCore supports only at the value that asks for nothing. Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from wicore.errors import InvalidRequest
from wicore.request import JobBody, JobKind, parse_job, parse_model

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (),
    "prediction": (),
    "prompt_cache_key": (),
    "reasoning_effort": (),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""OpenAI's fields that change nothing at these values (or null) and are unsupported at any other."""

MAX_PROMPTS = 1
"""A job has one."""
ALIASES = frozenset(
    {"stream", "stream_options", "max_completion_tokens", "logprobs", "top_logprobs", "best_of"}
)
"""Fields of OpenAI's bodies that are not, or not in this shape, a job's."""


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """What a call asks for: the job, and how its answer is to be delivered."""

    body: JobBody
    stream: bool
    include_usage: bool
    """Whether a stream ends with a chunk that carries the usage."""


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _StreamOptions(_Form):
    include_usage: bool = False


class ChatForm(_Form):
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None


class CompletionForm(_Form):
    stream: bool = False
    stream_options: _StreamOptions | None = None
    best_of: Annotated[int | None, Field(ge=1)] = None


def chat_request(data: Any) -> OpenAIRequest:
    """Validate the body of `POST /v1/chat/completions`.

    Raises InvalidRequest naming the first bad or unsupported field and what is allowed.
    """
    given = _supported(data, ALIASES - {"best_of"})
    form = parse_model(ChatForm, _take(given, ChatForm))
    if form.top_logprobs is not None and not form.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
    if form.logprobs:
        given["logprobs"] = form.top_logprobs or 0
    if form.max_completion_tokens is not None:
        if "max_tokens" in given:
            raise InvalidRequest(
                "max_completion_tokens: means the same as max_tokens; send one of them",
                param="max_completion_tokens",
            )
        given["max_tokens"] = form.max_completion_tokens
    return _request("chat", given, form)


def completion_request(data: Any) -> OpenAIRequest:
    """Validate the body of `POST /v1/completions`.

    Raises InvalidRequest naming the first bad or unsupported field and what is allowed.
    """
    given = _supported(data, ALIASES - {"max_completion_tokens", "top_logprobs"})
    form = parse_model(CompletionForm, _take(given, CompletionForm))
    if "prompt" in given:
        given["prompt"] = _single_prompt(given["prompt"])
    request = _request("completion", given, form)
    if form.best_of not in (None, request.body.n):
        raise InvalidRequest(
            f"best_of: unsupported unless equal to n, which is {request.body.n} (got {form.best_of})",
            param="best_of",
        )
    return request


def _request(kind: JobKind, given: dict[str, Any], form: ChatForm | CompletionForm) -> OpenAIRequest:
    if form.stream_options is not None and not form.stream:
        raise InvalidRequest("stream_options: only allowed when stream is true", param="stream_options")
    body = parse_job({**given, "kind": kind})
    usage = form.stream_options is not None and form.stream_options.include_usage
    return OpenAIRequest(body, form.stream, usage)


def _supported(data: Any, aliases: frozenset[str]) -> dict[str, Any]:
    """The fields that are left to validate: known ones that are not null, and unknown ones.

    OpenAI's clients send null for an optional field that was not set.
    """
    if not isinstance(data, Mapping):
        parse_job(data)
    left = {}
    for name, value in data.items():
        if name in NEUTRAL:
            _refuse_unless_neutral(name, value)
        elif name == "kind":
            raise InvalidRequest("kind: unknown or unsupported field; remove it", param="kind")
        elif value is not None or not (name in aliases or name in JobBody.model_fields):
            left[name] = value
    return left


def _refuse_unless_neutral(name: str, value: Any) -> None:
    if value is None or any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]):
        return
    allowed = " or ".join([f"set to {neutral!r}" for neutral in NEUTRAL[name]] + ["left out"])
    raise InvalidRequest(f"{name}: unsupported; it must be {allowed}", param=name)


def _take(given: dict[str, Any], form: type[_Form]) -> dict[str, Any]:
    """Move the form's own fields out of `given`."""
    return {name: given.pop(name) for name in form.model_fields if name in given}


def _single_prompt(prompt: Any) -> Any:
    """OpenAI also takes a list of prompts; a job has one."""
    if not isinstance(prompt, list) or not prompt or not isinstance(prompt[0], str | list):
        return prompt
    if len(prompt) > 1:
        raise InvalidRequest(
            f"prompt: one prompt a request is supported (got {len(prompt)}); send a request for each",
            param="prompt",
        )
    return prompt[0]
