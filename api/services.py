"""What the doors work with: one set of connections and one model description a process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from flask import current_app

from api.slots import Slots
from wicore.config import Settings
from wicore.errors import UnknownModel
from wicore.request import JobBody, Message, Priority

EXTENSION = "wicore"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model that this service serves."""

    name: str
    created_s: int
    """Unix time of its checkpoint, as `GET /v1/models` reports it."""
    max_context: int


@dataclass(frozen=True, slots=True)
class Services:
    """Everything a door needs; built once, shared by all greenlets of a process."""

    settings: Settings
    model: ServedModel
    producer: Any
    relay: Any
    count_prompt: Callable[[JobBody], int]
    """Tokens of a body's prompt. Raises TooLarge or InvalidRequest for a body that cannot be served."""
    tokenize: Callable[[str | Sequence[Message]], list[int]]
    """Token ids of a text, or of a chat in the model's template."""
    workers: Callable[[], Sequence[Any]]
    """Live workers. Raises a Redis error when Redis is away."""
    slots: Slots
    """Open websockets and event streams, bounded by `api.max_sockets`."""

    def accept(self, body: JobBody, default: Priority, idempotency_key: str | None = None) -> Any:
        """Check what the form of a body cannot show, then put the job on the queue.

        Raises UnknownModel, TooLarge, InvalidRequest, QueueFull, Conflict or a Redis error; then no
        job was accepted.
        """
        self.check_model(body.model)
        tokens = self.count_prompt(body)
        priority = default if body.priority is None else body.priority
        return self.producer.submit(body, priority, idempotency_key=idempotency_key, prompt_tokens=tokens)

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModel unless `name` is the served model's or left out."""
        if name not in (None, self.model.name):
            raise UnknownModel(
                f"model: {name!r} is not served here; the model is {self.model.name!r}", param="model"
            )


class LazyServices:
    """Builds the services on first use, once a process, so that importing and forking need no IO."""

    def __init__(self, settings: Settings, services: Services | None = None) -> None:
        self._settings = settings
        self._services = services
        self._lock = threading.Lock()
        self.stopping: Callable[[], bool] = lambda: False
        """Whether this process was told to stop; streams that can be resumed elsewhere then end."""

    def get(self) -> Services:
        """Raises CheckpointError or ConfigError when the model cannot be described."""
        if self._services is None:
            with self._lock:
                if self._services is None:
                    self._services = build(self._settings)
        return self._services


def current() -> Services:
    """The services of the current app."""
    return lazy().get()


def stopping() -> Callable[[], bool]:
    """Tells, also outside of a request, whether this process was told to stop."""
    return lambda extension=lazy(): extension.stopping()


def lazy() -> LazyServices:
    return cast(LazyServices, current_app.extensions[EXTENSION])
