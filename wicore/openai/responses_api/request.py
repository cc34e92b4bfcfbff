"""The body of `POST /v1/responses`, and the job that it means.

Sampling and queueing fields are a job's own and are validated as such. What is stored with the job, for
`GET /v1/responses/{id}` and for follow-ups, is a `Stored`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from wicore.errors import InvalidRequest, TooLarge
from wicore.fields import JsonSchema
from wicore.messages import MAX_TOOLS, FunctionName
from wicore.openai.responses_api.items import InputItem, Item, as_items, chat_messages
from wicore.request import (
    JobBody,
    PriorityName,
    SamplingParams,
    Seconds,
    Stop,
    Text,
    WebhookURL,
    parse_job,
    parse_model,
)

LOGPROBS = "message.output_text.logprobs"
"""The one thing that `include` can ask for."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background_options": ({"completion_window": "soonest"},),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning": ({}, {"effort": "none"}, {"effort": None, "summary": None}),
    "service_tier": ("auto", "default"),
}
"""OpenAI's fields that change nothing at these values (or null) and are unsupported at any other."""

NAMES = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "logprobs": "top_logprobs",
}
"""What a job's fields are called here."""


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TextFormat(_Form):
    type: Literal["text", "json_object"]


class JSONSchemaFormat(_Form):
    type: Literal["json_schema"]
    name: Annotated[Text, Field(min_length=1, max_length=64)]
    schema_: Annotated[JsonSchema, Field(alias="schema")]
    description: Text | None = None
    strict: bool | None = None


class TextConfig(_Form):
    format: Annotated[TextFormat | JSONSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class FunctionTool(_Form):
    """A function that the model may call; OpenAI's hosted tools are not here."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None

    def as_chat(self) -> dict[str, Any]:
        """As chat completions declare it."""
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class NamedFunction(_Form):
    type: Literal["function"]
    name: FunctionName

    def as_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name}}


class AllowedFunctions(_Form):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS)]

    def as_chat(self) -> dict[str, Any]:
        allowed = {"mode": self.mode, "tools": [tool.as_chat() for tool in self.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}


ToolChoice = Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions


class StreamOptions(_Form):
    include_obfuscation: Literal[False] | None = None


Label = Annotated[Text, Field(max_length=512)]
Items = Annotated[list[InputItem], Field(min_length=1, max_length=4096)]
Metadata = dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]]


class ResponseBody(SamplingParams):
    """OpenAI's fields, and those of a job that OpenAI does not have."""

    input: Annotated[Text, Field(min_length=1)] | Items
    instructions: Text | None = None
    model: Annotated[Text | None, Field(max_length=256)] = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    previous_response_id: Annotated[Text | None, Field(max_length=256)] = None
    store: bool = True
    background: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    text: TextConfig = TextConfig()
    truncation: Literal["disabled", "auto"] = "disabled"
    include: list[Literal["message.output_text.logprobs"]] = Field(default_factory=list)
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    metadata: Metadata = Field(default_factory=dict, max_length=16)
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    stop: Stop = Field(default_factory=list)
    ignore_eos: bool = False
    priority: PriorityName | None = None
    timeout_s: Seconds | None = None
    queue_timeout_s: Seconds | None = None
    webhook_url: WebhookURL | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ResponseBody:
        if self.logprobs is not None:
            raise ValueError(f"logprobs: not a field here; use top_logprobs, or include {LOGPROBS!r}")
        if self.background and not self.store:
            raise ValueError("background: needs store, as its answer is fetched later")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        return self

    def wanted_logprobs(self) -> int | None:
        """As a job's `logprobs`."""
        return self.top_logprobs if self.top_logprobs is not None else 0 if self.include else None


_JOB_FIELDS = (
    *("model", "metadata", "user", "stop", "ignore_eos"),
    *("priority", "timeout_s", "queue_timeout_s", "webhook_url"),
)
_ECHOED = (
    *("instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "previous_response_id"),
    *("prompt_cache_key", "safety_identifier", "store", "temperature", "tool_choice", "tools", "top_p"),
    *("truncation", "user"),
)


@dataclass(frozen=True, slots=True)
class Stored:
    """What a response's record keeps besides the job's own fields."""

    echo: dict[str, Any]
    """The request's fields that the response object repeats, under its names."""
    background: bool
    may_call: bool
    """Whether the answer may be calls of functions."""
    earlier: list[Item]
    """The conversation before: all items of the responses that this one follows, and their outputs."""
    input: list[Item]
    """This request's own items."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Stored:
        return Stored(**data)


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """A validated body."""

    form: ResponseBody
    input: list[Item]

    def job(self, earlier: list[Item], check: Callable[[JobBody], object]) -> JobBody:
        """The job that answers `earlier` items and then these.

        With `truncation` "auto" as few as possible of the oldest turns are left out, so that `check` does not
        raise TooLarge; instructions, leading system messages and the last turn stay. Raises InvalidRequest,
        or what `check` does, in the words of the body.
        """
        items = [*earlier, *self.input]
        with own_words():
            if self.form.truncation == "disabled":
                return self._job(items)
            return self._first_that_fits(_shortened(items), check)

    def _first_that_fits(self, candidates: list[list[Item]], check: Callable[[JobBody], object]) -> JobBody:
        """Of conversations that get shorter and shorter; the last, whether or not it fits."""
        low, high = 0, len(candidates) - 1
        while low < high:
            middle = (low + high) // 2
            try:
                check(self._job(candidates[middle]))
                high = middle
            except TooLarge:
                low = middle + 1
        return self._job(candidates[low])

    def _job(self, items: list[Item]) -> JobBody:
        form = self.form
        same = [*SamplingParams.model_fields, *_JOB_FIELDS]
        given: dict[str, Any] = {
            **{name: getattr(form, name) for name in same if name in form.model_fields_set},
            "kind": "chat",
            "messages": chat_messages(form.instructions, items),
            "max_tokens": form.max_output_tokens,
            "logprobs": form.wanted_logprobs(),
            **_response_format(form.text),
            **_tools(form),
        }
        return parse_job(given)

    def stored(self, earlier: list[Item]) -> Stored:
        """What is kept of it, when it follows `earlier` items."""
        form = self.form
        echo = form.model_dump(mode="json", include=set(_ECHOED))
        echo["top_logprobs"] = form.wanted_logprobs() or 0
        echo["text"] = _text_echo(form.text)
        may_call = bool(form.tools) and form.tool_choice != "none"
        return Stored(echo, form.background, may_call, earlier, self.input)


def response_request(data: Any) -> ResponseRequest:
    """Validate the body of `POST /v1/responses`.

    Raises InvalidRequest naming the first bad or unsupported field and what is allowed.
    """
    if isinstance(data, Mapping):
        for name in NEUTRAL.keys() & data.keys():
            _refuse_unless_neutral(name, data[name])
        known = ResponseBody.model_fields
        # OpenAI's clients send null for an optional field that was not set.
        data = {
            name: value
            for name, value in data.items()
            if name not in NEUTRAL and (value is not None or name not in known)
        }
    form = parse_model(ResponseBody, data)
    return ResponseRequest(form, as_items(form.input))


@contextmanager
def own_words() -> Iterator[None]:
    """Let what is raised of a job's fields name the fields of a response."""
    try:
        yield
    except (InvalidRequest, TooLarge) as err:
        field, _, rest = (err.param or "").partition(".")
        if field not in NAMES:
            raise
        said = err.message.removeprefix(f"{err.param}: ")
        if field == "messages" and rest:
            said = f"as a chat, {err.message}"
        raise type(err)(f"{NAMES[field]}: {said}", param=NAMES[field]) from None


def _shortened(items: list[Item]) -> list[list[Item]]:
    """The conversation whole, then without its first turn, without its first two, ... to its last turn."""
    lead = 0
    while lead < len(items) and items[lead].get("role") in ("system", "developer"):
        lead += 1
    starts = [i for i in range(lead + 1, len(items)) if items[i].get("role") == "user"]
    return [items, *(items[:lead] + items[start:] for start in starts)]


def _refuse_unless_neutral(name: str, value: Any) -> None:
    if value is None or value in NEUTRAL[name]:
        return
    allowed = " or ".join([f"set to {neutral!r}" for neutral in NEUTRAL[name]] + ["left out"])
    raise InvalidRequest(f"{name}: unsupported; it must be {allowed}", param=name)


def _response_format(text: TextConfig) -> dict[str, Any]:
    """`text.format` as chat completions have it; nothing for plain text."""
    if text.format is None or text.format.type == "text":
        return {}
    if isinstance(text.format, TextFormat):
        return {"response_format": {"type": text.format.type}}
    schema = text.format.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"type"})
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _text_echo(text: TextConfig) -> dict[str, Any]:
    chosen = text.format or TextFormat(type="text")
    return {"format": chosen.model_dump(mode="json", by_alias=True), "verbosity": "medium"}


def _tools(form: ResponseBody) -> dict[str, Any]:
    """The fields about tools as chat completions have them; nothing when there are none to call."""
    choice = form.tool_choice
    if not form.tools:
        if choice not in ("auto", "none"):
            raise InvalidRequest(
                "tool_choice: without tools it must be 'auto' or 'none'", param="tool_choice"
            )
        return {}
    return {
        "tools": [tool.as_chat() for tool in form.tools],
        "tool_choice": choice if isinstance(choice, str) else choice.as_chat(),
        "parallel_tool_calls": form.parallel_tool_calls,
    }
