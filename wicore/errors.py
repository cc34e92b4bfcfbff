"""The one error tree.

Every failure a caller can see is a `WicoreError`. A class fixes the HTTP status, the stable code and
whether repeating the same call can succeed; an instance adds the message, the field at fault
(`param`) and, where it helps, how many seconds to wait (`retry_after`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar


class WicoreError(Exception):
    """Root of the tree.

    Attributes:
        status: HTTP status of the answer.
        kind: OpenAI's `error.type`.
        code: stable machine-readable name of the failure.
        retryable: whether the same call may succeed later.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's `error` object (without the outer `{"error": ...}`)."""
        return {
            "message": self.message,
            "type": self.kind,
            "code": self.code,
            "param": self.param,
        }


class InvalidRequest(WicoreError):
    """A field is bad or unsupported; the message says which and what is allowed."""

    status = 400
    kind = "invalid_request_error"
    code = "invalid_request"


class Unauthenticated(WicoreError):
    """No valid key."""

    status = 401
    kind = "authentication_error"
    code = "unauthenticated"


class Forbidden(WicoreError):
    """The key is valid and may not do this."""

    status = 403
    kind = "permission_error"
    code = "forbidden"


class UnknownJob(WicoreError):
    """No job has this id, or its record has expired."""

    status = 404
    kind = "invalid_request_error"
    code = "unknown_job"


class UnknownDeadLetter(WicoreError):
    """No dead letter has this id: it never was, or it was retried, dropped or pushed out by newer ones."""

    status = 404
    kind = "invalid_request_error"
    code = "unknown_dead_letter"


class UnknownKey(WicoreError):
    """No API key in force has this name or id."""

    status = 404
    kind = "invalid_request_error"
    code = "unknown_key"


class UnknownResponse(WicoreError):
    """No response has this id: it never was, was not stored, was deleted, or has expired."""

    status = 404
    kind = "invalid_request_error"
    code = "unknown_response"


class UnknownFile(WicoreError):
    """No file has this id: it never was, was deleted, or has expired."""

    status = 404
    kind = "invalid_request_error"
    code = "unknown_file"


class UnknownBatch(WicoreError):
    """No batch has this id: it never was, or its record has expired."""

    status = 404
    kind = "invalid_request_error"
    code = "unknown_batch"


class UnknownModel(WicoreError):
    """The model named is not the one being served."""

    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"


class Conflict(WicoreError):
    """An idempotency key was used again with another body."""

    status = 409
    kind = "invalid_request_error"
    code = "conflict"


class TooLarge(WicoreError):
    """The prompt and `max_tokens` exceed the context, or a body exceeds its limit."""

    status = 413
    kind = "invalid_request_error"
    code = "too_large"


class RateLimited(WicoreError):
    """A limit of the key is reached.

    Attributes:
        rates: how full its buckets are, where that is known (wicore/access/rates.py).
    """

    status = 429
    kind = "rate_limit_error"
    code = "rate_limited"
    retryable = True
    rates: tuple[Any, ...] = ()


class QueueFull(WicoreError):
    """The queue is at its bound."""

    status = 429
    kind = "rate_limit_error"
    code = "queue_full"
    retryable = True


class Cancelled(WicoreError):
    """The job was cancelled before it finished."""

    status = 409
    kind = "invalid_request_error"
    code = "cancelled"


class Expired(WicoreError):
    """The job's deadline passed."""

    status = 504
    kind = "timeout_error"
    code = "expired"
    retryable = True


class WorkerLost(WicoreError):
    """Every attempt's worker died; the message is in the dead list."""

    status = 500
    code = "worker_lost"
    retryable = True


class Unavailable(WicoreError):
    """Redis, or every worker, is away."""

    status = 503
    code = "unavailable"
    retryable = True


class ConfigError(WicoreError):
    """A setting is unknown or bad; the message names key, value and what is allowed."""

    code = "config_error"


class CheckpointError(WicoreError):
    """A checkpoint is missing, truncated or foreign; the message says what was expected and found."""

    code = "checkpoint_error"


class EngineError(WicoreError):
    """The engine cannot start or a step failed."""

    code = "engine_error"


def error_from_body(body: Mapping[str, Any]) -> WicoreError:
    """The error whose `body()` this is, e.g. of a failed job; an unknown code gives the root class."""
    classes = {cls.code: cls for cls in _tree(WicoreError)}
    found = classes.get(str(body.get("code")), WicoreError)
    return found(str(body.get("message", "Unknown failure")), param=body.get("param"))


def _tree(cls: type[WicoreError]) -> Iterator[type[WicoreError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _tree(child)
