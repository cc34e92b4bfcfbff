"""Jobs and events: what every door accepts, and the form it travels in.

Pure: validation and wire forms only. `JobBody` is the body of `POST /v1/jobs` and, unchanged, the
kwargs of a Celery or plain Redis message. The OpenAI doors reduce to it. Sampling semantics follow
OpenAI's API reference; `top_k`, `min_p` and `repetition_penalty` follow Hugging Face transformers.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from enum import IntEnum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AnyHttpUrl,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.config import JsonDict

from wicore.errors import InvalidRequest
from wicore.fields import MAX_SCHEMA_BYTES as MAX_SCHEMA_BYTES
from wicore.fields import MAX_SCHEMA_DEPTH as MAX_SCHEMA_DEPTH
from wicore.fields import JsonSchema, Number, Strict
from wicore.fields import Text as Text
from wicore.messages import MAX_TOOLS, Tool, ToolChoice, ToolUse, tool_use
from wicore.messages import ContentPart as ContentPart
from wicore.messages import Message as Message

JobKind = Literal["chat", "completion"]
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled", "expired"]
FinishReason = Literal["stop", "length", "tool_calls"]
TerminalType = Literal["done", "failed", "cancelled", "expired"]
Model = TypeVar("Model", bound=BaseModel)

TERMINAL_TYPES: frozenset[str] = frozenset({"done", "failed", "cancelled", "expired"})
STATUS_OF_TERMINAL: dict[str, JobStatus] = {
    "done": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
    "expired": "expired",
}
MAX_CHOICES = 16
JOB_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
"""What a job id may be; ids from other systems (Celery's UUIDs) are kept as they come."""


class Priority(IntEnum):
    """Queue levels in Kombu's layout; a lower number is served first."""

    INTERACTIVE = 0
    NORMAL = 3
    BATCH = 6
    BACKGROUND = 9


def new_job_id() -> str:
    return str(uuid.uuid4())


# --- fields -------------------------------------------------------------------------------------


def _as_list(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _priority_name(value: Any) -> Any:
    names = {level.name.lower(): level for level in Priority}
    if isinstance(value, str) and value in names:
        return names[value]
    if isinstance(value, Priority):
        return value
    raise ValueError(f"must be one of {', '.join(names)}")


DIGITS = "^[0-9]{1,10}$"


def _token_id(value: Any) -> Any:
    if isinstance(value, str):
        if not re.fullmatch(DIGITS, value, re.ASCII):
            raise ValueError("must be a token id, in digits")
        return int(value)
    return value


def _webhook_url(value: str) -> str:
    """The URL in ASCII, with its host in IDNA."""
    try:
        url = _HTTP_URL.validate_python(value)
    except ValidationError:
        raise ValueError("must be an http or https URL") from None
    if url.username is not None or url.password is not None:
        raise ValueError("must not hold a user or password; sign in by the webhook's signature")
    if len(text := str(url)) > MAX_WEBHOOK_URL:
        raise ValueError(f"must have at most {MAX_WEBHOOK_URL} characters")
    return text


MAX_WEBHOOK_URL = 2048
_HTTP_URL = TypeAdapter(AnyHttpUrl)

WebhookURL = Annotated[Text, AfterValidator(_webhook_url)]
Seconds = Annotated[Number, Field(gt=0, le=7 * 86400)]
_StopText = Annotated[Text, Field(min_length=1, max_length=256)]
_StopTexts = Annotated[list[_StopText], Field(max_length=16)]
Stop = Annotated[_StopTexts, BeforeValidator(_as_list, json_schema_input_type=_StopTexts | _StopText | None)]
PriorityName = Annotated[
    Priority,
    BeforeValidator(
        _priority_name, json_schema_input_type=Literal["interactive", "normal", "batch", "background"]
    ),
]
TokenId = Annotated[int, BeforeValidator(_token_id), Field(ge=0)]
"""As the name of a field, where JSON has only text."""


class SamplingParams(Strict):
    """How tokens are drawn. Defaults are OpenAI's; 0 or 1 switches a filter off as noted."""

    temperature: Annotated[Number, Field(ge=0, le=2)] = 1.0
    """0 is greedy."""
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Smallest set of tokens with at least this probability; 1 is off."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 is off."""
    min_p: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """Drop tokens less likely than this share of the likeliest; 0 is off."""
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=10)] = 1.0
    """Divides (multiplies, if negative) the logit of every token in prompt or output; 1 is off."""
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[TokenId, Annotated[Number, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=1024, json_schema_extra={"propertyNames": {"pattern": DIGITS}}
    )
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    """The same seed and request give the same text; null: each job has its own."""
    # Derived from the job id, so that a resumed job continues alike.
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    """How many alternatives to report with each token; 0 reports the token alone; null nothing."""


class JsonSchemaFormat(Strict):
    """OpenAI's `json_schema`. Output is always held to the schema, whatever `strict` says."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Annotated[Text | None, Field(max_length=4096)] = None
    schema_: Annotated[JsonSchema, Field(alias="schema")]
    strict: bool | None = None


_SCHEMA_WHEN_ASKED_FOR: JsonDict = {
    "oneOf": [
        {
            "properties": {"type": {"const": "json_schema"}, "json_schema": {"type": "object"}},
            "required": ["json_schema"],
        },
        {"properties": {"type": {"enum": ["text", "json_object"]}, "json_schema": {"type": "null"}}},
    ]
}
"""What `ResponseFormat._schema_when_asked_for` checks, as JSON Schema says it."""


class ResponseFormat(Strict):
    """OpenAI's `response_format`."""

    model_config = ConfigDict(json_schema_extra=_SCHEMA_WHEN_ASKED_FOR)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_when_asked_for(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            must = "is required" if self.json_schema is None else "is not allowed"
            raise ValueError(f"json_schema {must} when type is {self.type!r}")
        return self


_BY_KIND: JsonDict = {
    "oneOf": [
        {
            "title": "chat",
            "properties": {
                "kind": {"const": "chat"},
                "messages": {"type": "array", "minItems": 1},
                "prompt": {"type": "null"},
                "best_of": {"type": "null"},
                "echo": {"const": False},
            },
            "required": ["messages"],
        },
        {
            "title": "completion",
            "properties": {
                "kind": {"const": "completion"},
                "prompt": {"type": ["string", "array"], "minLength": 1},
                "messages": {"type": "null"},
                "tools": {"maxItems": 0},
                "tool_choice": {"type": "null"},
                "parallel_tool_calls": {"type": "null"},
            },
            "required": ["kind", "prompt"],
        },
    ]
}
"""What a job's fields may be by its kind, as JSON Schema says it; see the validators of `JobBody`."""


class JobBody(SamplingParams):
    """The body of `POST /v1/jobs`: one request, flat, as OpenAI names the fields."""

    model_config = ConfigDict(json_schema_extra=_BY_KIND)

    kind: JobKind = "chat"
    model: Annotated[Text | None, Field(max_length=256)] = None
    messages: Annotated[list[Message], Field(fail_fast=True, max_length=4096)] | None = None
    prompt: (
        Text | Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, min_length=1)] | None
    ) = None
    """Text or token ids."""
    # Lists that may be long fail at the first fault: 20 MB of faults, each with its report, would take half a
    # minute and gigabytes.
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    """Null: 16 for completions (OpenAI's default), the rest of the context for chat."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    best_of: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None
    """Of completions: choices that are generated; the result has the `n` likeliest of them."""
    echo: bool = False
    """Of completions: the text of each choice in the result begins with the prompt."""
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    """Null: `auto` if there are tools."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may be several calls; null: it may."""
    stop: Stop = Field(default_factory=list)
    ignore_eos: bool = False
    """Go on to `max_tokens` whatever the model says; for benchmarks."""
    response_format: ResponseFormat | None = None
    """What the output must be; null: any text."""
    priority: PriorityName | None = None
    timeout_s: Seconds | None = None
    """Seconds from acceptance until the job expires, wherever it is by then."""
    queue_timeout_s: Seconds | None = None
    """Seconds from acceptance until the job expires unless it has started; null: `queue.max_wait_s`."""
    user: Annotated[Text | None, Field(max_length=512)] = None
    metadata: dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]] = Field(
        default_factory=dict, max_length=16
    )
    webhook_url: WebhookURL | None = None
    """Where the record is posted when the job has ended."""

    @model_validator(mode="after")
    def _one_prompt(self) -> JobBody:
        want, other = ("messages", "prompt") if self.kind == "chat" else ("prompt", "messages")
        if getattr(self, other) is not None:
            raise ValueError(f"{other}: not allowed when kind is {self.kind!r}; use {want}")
        if not getattr(self, want):
            raise ValueError(f"{want}: required and not empty when kind is {self.kind!r}")
        return self

    @model_validator(mode="after")
    def _completion_fields(self) -> JobBody:
        for field in ("best_of", "echo"):
            if self.kind == "chat" and getattr(self, field):
                raise ValueError(f"{field}: not allowed when kind is 'chat'")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of: must be at least n, which is {self.n} (got {self.best_of})")
        if self.echo and self.logprobs is not None:
            raise ValueError(
                "echo: unsupported together with logprobs, as those of the prompt are not computed; send one"
            )
        return self

    @model_validator(mode="after")
    def _tool_fields(self) -> JobBody:
        for field in ("tools", "tool_choice", "parallel_tool_calls"):
            value = getattr(self, field)
            if self.kind == "completion" and value not in (None, []):
                raise ValueError(f"{field}: not allowed when kind is 'completion'")
            if not self.tools and value not in (None, [], "none"):
                raise ValueError(f"{field}: only allowed together with tools")
        if self.tool_use() is not None:
            if self.ignore_eos:
                raise ValueError("ignore_eos: not allowed together with tools: a call ends")
            if self.response_format is not None and self.response_format.type != "text":
                raise ValueError(
                    "response_format: not allowed together with tools, whose calls have a form of their own; "
                    "send one of them, or tool_choice 'none'"
                )
        return self

    @model_validator(mode="after")
    def _an_end(self) -> JobBody:
        if self.ignore_eos and self.response_format is not None and self.response_format.type != "text":
            raise ValueError(
                f"ignore_eos: not allowed with response_format {self.response_format.type!r}:"
                " its output ends where it is complete"
            )
        return self

    @property
    def sequences(self) -> int:
        """Choices that are generated."""
        return self.best_of or self.n

    def tool_use(self) -> ToolUse | None:
        """What the answer may call; None: nothing, it is text."""
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls is not False)

    def sampling(self) -> SamplingParams:
        params = SamplingParams(**{name: getattr(self, name) for name in SamplingParams.model_fields})
        if self.sequences > self.n and params.logprobs is None:
            return params.model_copy(update={"logprobs": 0})  # to tell which are the likeliest
        return params

    def wire(self) -> dict[str, Any]:
        """JSON form that `parse_job` reads back to an equal body; defaults are left out."""
        data = self.model_dump(mode="json", exclude_defaults=True, by_alias=True)
        data["kind"] = self.kind
        if self.priority is not None:
            data["priority"] = self.priority.name.lower()
        return data


def parse_job(data: Any) -> JobBody:
    """Validate the body of a job.

    Raises InvalidRequest naming the first bad field, its value and what is allowed.
    """
    return parse_model(JobBody, data)


def parse_model(model: type[Model], data: Any) -> Model:
    """Validate any JSON object, with errors as in `parse_job`."""
    if not isinstance(data, Mapping):
        raise InvalidRequest(f"body: must be a JSON object, not {_kind_of(data)}")
    try:
        return model.model_validate(data)
    except ValidationError as err:
        raise _invalid(err) from None


def _kind_of(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _invalid(err: ValidationError) -> InvalidRequest:
    errors = err.errors(include_url=False)
    # Every branch of a union reports; the branch that got furthest is the one that was meant.
    same_field = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    first = max(same_field, key=lambda error: len(error["loc"]))
    # Union branches and validator names appear in `loc`; what a caller knows are keys and indexes.
    *path, last = first["loc"] or ("",)
    known = [str(part) for part in path if isinstance(part, int) or _is_key(part)]
    if first["type"] == "extra_forbidden":
        param = _cut(".".join([*known, str(last)]), 100)
        return InvalidRequest(f"{param}: unknown or unsupported field; remove it", param=param)
    known += [str(last)] if isinstance(last, int) or _is_key(last) else []
    message = first["msg"].removeprefix("Value error, ")
    # What is wrong between fields is said of the model that has them, beginning with the field's name.
    if named := re.match(r"([a-z_]+): ", message):
        known.append(named[1])
        message = message[named.end() :]
    param = ".".join(known)
    value = first.get("input")
    hidden = isinstance(value, Mapping | list) or first["type"] == "missing"
    shown = "" if hidden else f" (got {_short(value)})"
    return InvalidRequest(f"{param}: {message}{shown}", param=param)


def _is_key(part: str) -> bool:
    return re.fullmatch(r"[a-z_]+", part) is not None and part not in {"str", "int", "float"}


def _short(value: Any) -> str:
    return _cut(ascii(value), 60)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


# --- events -------------------------------------------------------------------------------------

Event = dict[str, Any]
"""{"job", "seq", "type", ...}: started, resumed, token, then once done, failed, cancelled or expired."""


def token_event(
    job: str,
    seq: int,
    index: int,
    text: str,
    token_ids: list[int],
    logprobs: list[dict[str, Any]] | None = None,
    finish_reason: FinishReason | None = None,
) -> Event:
    """Text and ids that one or more steps added to choice `index`.

    `text` may be empty while a character or a possible stop string is incomplete, and the ids of an
    event need not spell exactly its text; the concatenations over a choice do match. `finish_reason`
    is set on the event that ends the choice.
    """
    event: Event = {
        "job": job,
        "seq": seq,
        "type": "token",
        "index": index,
        "text": text,
        "token_ids": token_ids,
    }
    if logprobs is not None:
        event["logprobs"] = logprobs
    if finish_reason is not None:
        event["finish_reason"] = finish_reason
    return event


def started_event(job: str, seq: int, attempt: int) -> Event:
    """First of an attempt: `started`, or `resumed` when an earlier attempt left events."""
    return {"job": job, "seq": seq, "type": "started" if seq == 1 else "resumed", "attempt": attempt}


def terminal_event(
    job: str,
    seq: int,
    type: TerminalType,
    *,
    finish_reason: str | None = None,
    usage: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
) -> Event:
    """The last event of a job, once."""
    event: Event = {"job": job, "seq": seq, "type": type}
    if finish_reason is not None:
        event["finish_reason"] = finish_reason
    if usage is not None:
        event["usage"] = dict(usage)
    if error is not None:
        event["error"] = dict(error)
    return event


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> dict[str, Any]:
    """`cached_tokens` of the prompt had not to be computed; it depends on what ran before. None: unknown."""
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if cached_tokens is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return usage | {"completion_tokens_details": {"reasoning_tokens": 0}}
