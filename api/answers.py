"""What the doors answer, as models: they describe the answers for `/openapi.json`, and check nothing.

That the doors keep to them is shown by tests/test_openapi.py and, at random, by tests/fuzz.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from wicore.request import FinishReason, JobKind, JobStatus

Level = Literal["interactive", "normal", "batch", "background"]
Webhook = Literal["pending", "delivered", "failed"]


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Loose(BaseModel):
    """What may have more fields than are named here."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)


class ErrorBody(Answer):
    message: str
    type: str
    code: str
    """Stable; what programs should look at."""
    param: str | None
    """The field at fault."""


class Error(Answer):
    """Every error, of any door."""

    error: ErrorBody


# --- jobs -----------------------------------------------------------------------------------------


class Links(Answer):
    self: str
    events: str
    """Its events, as server-sent events."""
    stream: str
    """Its events, over a websocket."""


class JobAccepted(Answer):
    id: str
    object: Literal["job"]
    status: JobStatus
    position: int
    """Jobs ahead when it was accepted."""
    estimated_wait_s: float | None
    """Null: nothing is known of the pace yet."""
    links: Links


class Usage(Loose):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Job(Answer):
    """A job's record. Times are milliseconds since 1970; what is not known yet is null."""

    id: str
    object: Literal["job"]
    status: JobStatus
    kind: JobKind | None
    model: str | None
    priority: Level
    attempts: int
    position: int | None
    estimated_wait_s: float | None
    prompt_tokens: int | None
    worker: str | None
    created_ms: int
    deadline_ms: int | None
    started_ms: int | None
    first_token_ms: int | None
    finished_ms: int | None
    seq: int
    """Sequence number of its last event."""
    cancel_requested: bool
    finish_reason: FinishReason | None
    usage: Usage | None
    result: dict[str, JsonValue] | None
    """What a completion door would have answered."""
    error: ErrorBody | None
    metadata: dict[str, str]
    retry_of: str | None
    """The dead letter that it tries again."""
    webhook_url: str | None
    webhook_status: Webhook | None
    webhook_error: str | None
    links: Links


class Page(Answer):
    object: Literal["list"]
    has_more: bool


class Jobs(Page):
    """Newest first."""

    data: list[Job]


# --- dead letters ---------------------------------------------------------------------------------


class DeadLetterView(Answer):
    object: Literal["dead_letter"]
    id: str
    at_ms: int
    job: str | None
    priority: Level
    client: str
    reason: str
    message: str
    truncated: bool
    """Whether `message` is only its beginning: in listings."""


class DeadLetters(Page):
    """Newest first."""

    data: list[DeadLetterView]


class DeadLetterDropped(Answer):
    object: Literal["dead_letter"]
    id: str
    dropped: Literal[True]


class AllDropped(Answer):
    object: Literal["list"]
    dropped: int


# --- OpenAI's -------------------------------------------------------------------------------------


class ImageLimits(Answer):
    """What a request may hold, at most."""

    images: int
    bytes: int
    """Of one image, before it is written in base64."""
    pixels: int
    """Of one image."""


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_context: int
    """The most tokens of prompt and answer together."""
    input_modalities: list[Literal["text", "image"]]
    """What a message may hold."""
    image_limits: ImageLimits | None
    """Null: the model takes no images."""


class Models(Answer):
    object: Literal["list"]
    data: list[Model]


class AssistantMessage(Loose):
    role: Literal["assistant"]
    content: str | None
    refusal: None


class ChatChoice(Loose):
    index: int
    message: AssistantMessage
    logprobs: dict[str, JsonValue] | None
    finish_reason: FinishReason


class ChatCompletion(Loose):
    """OpenAI's `chat.completion`; a stream is of `chat.completion.chunk`s, and ends with `[DONE]`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(Loose):
    index: int
    text: str
    logprobs: dict[str, JsonValue] | None
    finish_reason: FinishReason


class TextCompletion(Loose):
    """OpenAI's `text_completion`; a stream is of the same with parts of the text, and ends with `[DONE]`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ResponseView(Loose):
    """OpenAI's `response`; a stream is of its events, with `event:` and `data:` lines."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    completed_at: int | None
    model: str
    output: list[dict[str, JsonValue]]
    usage: dict[str, JsonValue] | None


class ResponseDeleted(Answer):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class OpenAIPage(Answer):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Items(OpenAIPage):
    data: list[dict[str, JsonValue]]


class File(Answer):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch"]
    status: Literal["processed"]
    status_details: None


class Files(OpenAIPage):
    data: list[File]


class FileDeleted(Answer):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class Batch(Loose):
    """OpenAI's `batch`."""

    id: str
    object: Literal["batch"]
    endpoint: str
    input_file_id: str
    status: str
    created_at: int


class Batches(OpenAIPage):
    data: list[Batch]


# --- the service ----------------------------------------------------------------------------------


class Tokens(Answer):
    tokens: list[int]
    count: int


class Health(Answer):
    status: Literal["ok"]


class Readiness(Answer):
    ready: bool
    workers: int
    missing: list[str]
    """What there must be first."""


class Versions(Answer):
    wicore: str
    python: str
    redis: str


class Queue(Answer):
    """Jobs that wait."""

    interactive: int
    normal: int
    batch: int
    background: int
    suspect: int
    """Their worker died, and they wait for the next."""


class WorkerView(Loose):
    """A worker's last heartbeat."""

    id: str
    age_s: float
    model: str


class Status(Answer):
    version: str
    versions: Versions
    queue: Queue
    rates: dict[str, float]
    """A second, over about the last ten, all workers together."""
    workers: list[WorkerView]
    kv: dict[str, JsonValue] = Field(default_factory=dict)
    """The sum of the workers' KV caches."""
