"""OpenAI's request bodies reduced to jobs.

Most fields are a job's own and are validated there, once. What this module adds is what OpenAI's
bodies have beyond a job: streaming options, several prompts, other names and shapes of the same thing, hints,
and fields that WiCore supports only at the value that asks for nothing. Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from wicore.errors import InvalidRequest
from wicore.fields import Strict, Text
from wicore.openai.responses import merged
from wicore.request import JobBody, JobKind, Priority, parse_job, parse_model

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "store": (False,),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""OpenAI's fields that change nothing at these values (or null) and are unsupported at any other."""

INSTEAD: Mapping[str, str] = {
    "function_call": "send tool_choice",
    "functions": "send tools",
    "suffix": "Gemma 3 does not fill in between texts",
}
"""What to say beside, of some of them."""

HINTS = ("prompt_cache_key", "safety_identifier")
"""Texts that promise nothing and change nothing: prompts share their cached prefixes whatever the key."""

MAX_PROMPTS = 128

ServiceTier = Literal["auto", "default", "flex", "priority", "fast"]
_TIERS: Mapping[ServiceTier, tuple[Priority | None, str]] = {
    "auto": (None, "default"),
    "default": (None, "default"),
    "flex": (Priority.BATCH, "flex"),
    "priority": (Priority.INTERACTIVE, "priority"),
    "fast": (Priority.INTERACTIVE, "priority"),
}
NO_PRIORITY = tuple(tier for tier, (priority, _) in _TIERS.items() if priority is None)
"""Tiers that may be sent beside a priority."""
"""The priority that a tier means, and what the response calls it, which is OpenAI's way, too."""


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """What a call asks for: jobs, one for each prompt, and how their answer is to be delivered."""

    bodies: Sequence[JobBody]
    stream: bool
    include_usage: bool
    """Whether a stream ends with a chunk that carries the usage."""
    service_tier: str | None = None
    """What the response is to say, if the request named one."""

    @property
    def body(self) -> JobBody:
        """The job. Raises InvalidRequest when there are several."""
        if len(self.bodies) > 1:
            raise InvalidRequest("prompt: must be one prompt here; send a request for each", param="prompt")
        return self.bodies[0]

    def answer(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The response of a call that does not stream, of the jobs' results in order."""
        tier = {} if self.service_tier is None else {"service_tier": self.service_tier}
        return merged(results) | tier


class _StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    """OpenAI pads its chunks to one size unless told not to; WiCore never does."""


class ChatForm(Strict):
    """What the body of `POST /v1/chat/completions` has beyond a job, or in another shape."""

    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    service_tier: ServiceTier | None = None
    prompt_cache_key: Text | None = None
    safety_identifier: Text | None = None


class CompletionForm(Strict):
    """What the body of `POST /v1/completions` has beyond a job, or in another shape."""

    stream: bool = False
    stream_options: _StreamOptions | None = None


def chat_request(data: Any) -> OpenAIRequest:
    """Validate the body of `POST /v1/chat/completions`.

    Raises InvalidRequest naming the first bad or unsupported field and what is allowed.
    """
    given = _supported(data, ChatForm)
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
    tier = None
    if form.service_tier is not None:
        priority, tier = _TIERS[form.service_tier]
        if priority is not None:
            if "priority" in given:
                raise InvalidRequest("service_tier: means a priority; send one of them", param="service_tier")
            given["priority"] = priority
    return _request([_job("chat", given)], form, tier)


def completion_request(data: Any) -> OpenAIRequest:
    """Validate the body of `POST /v1/completions`.

    Raises InvalidRequest naming the first bad or unsupported field and what is allowed.
    """
    given = _supported(data, CompletionForm)
    form = parse_model(CompletionForm, _take(given, CompletionForm))
    prompts = _prompts(given.pop("prompt", None))
    bodies = [_completion(given, prompt, i, len(prompts)) for i, prompt in enumerate(prompts)]
    if form.stream and bodies[0].sequences > bodies[0].n:
        raise InvalidRequest(
            "best_of: unsupported together with stream: which choices are best is known at the end",
            param="best_of",
        )
    return _request(bodies, form)


def _completion(given: Mapping[str, Any], prompt: Any, index: int, count: int) -> JobBody:
    try:
        return _job("completion", {**given, "prompt": prompt})
    except InvalidRequest as err:
        if count == 1 or not (err.param or "").startswith("prompt"):
            raise
        # Which of them it was.
        field = f"prompt.{index}"
        raise InvalidRequest(
            err.message.replace("prompt", field, 1), param=str(err.param).replace("prompt", field, 1)
        ) from None


def _prompts(prompt: Any) -> list[Any]:
    """The prompts of a request; token ids alone are one."""
    if not isinstance(prompt, list) or not prompt or not isinstance(prompt[0], str | list):
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(
            f"prompt: must be at most {MAX_PROMPTS} prompts (got {len(prompt)}); send the others apart",
            param="prompt",
        )
    return prompt


def _job(kind: JobKind, given: Mapping[str, Any]) -> JobBody:
    return parse_job({**given, "kind": kind})


def _request(
    bodies: Sequence[JobBody], form: ChatForm | CompletionForm, tier: str | None = None
) -> OpenAIRequest:
    if form.stream_options is not None and not form.stream:
        raise InvalidRequest("stream_options: only allowed when stream is true", param="stream_options")
    usage = form.stream_options is not None and form.stream_options.include_usage is True
    return OpenAIRequest(bodies, form.stream, usage, tier)


def _supported(data: Any, form: type[Strict]) -> dict[str, Any]:
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
        elif value is not None or not (name in form.model_fields or name in JobBody.model_fields):
            left[name] = value
    return left


def _refuse_unless_neutral(name: str, value: Any) -> None:
    if value is None or any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]):
        return
    allowed = " or ".join([f"set to {neutral!r}" for neutral in NEUTRAL[name]] + ["left out"])
    instead = f"; {INSTEAD[name]}" if name in INSTEAD else ""
    raise InvalidRequest(f"{name}: unsupported; it must be {allowed}{instead}", param=name)


def _take(given: dict[str, Any], form: type[Strict]) -> dict[str, Any]:
    """Move the form's own fields out of `given`."""
    return {name: given.pop(name) for name in form.model_fields if name in given}
