"""The response object, of a job's record and what is stored with it. Form after OpenAI's API reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from wicore.openai.responses import call_id
from wicore.openai.responses_api.items import Item
from wicore.openai.responses_api.request import Stored
from wicore.queue.producer import JobRecord
from wicore.request import JobStatus

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]

PREFIX = "resp_"
_STATUS: dict[JobStatus, Status] = {
    "queued": "queued",
    "running": "in_progress",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
    "expired": "failed",
}
_CODES = {
    "invalid_request": "invalid_prompt",
    "too_large": "invalid_prompt",
    "rate_limited": "rate_limit_exceeded",
    "queue_full": "rate_limit_exceeded",
}
"""OpenAI's codes of a failed response, by WiCore's; `server_error` for the rest."""


def response_id(job_id: str) -> str:
    return PREFIX + job_id


def response_object(
    job_id: str,
    stored: Stored,
    model: str,
    created_s: int,
    status: Status,
    *,
    output: Sequence[Item] = (),
    usage: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
    completed_s: int | None = None,
) -> dict[str, Any]:
    """`model` is the served name, `usage` and `error` are a job's; times are Unix seconds."""
    return {
        "id": response_id(job_id),
        "object": "response",
        "created_at": created_s,
        "status": status,
        "background": stored.background,
        "completed_at": completed_s if status == "completed" else None,
        "error": _error(error) if status == "failed" else None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": model,
        "output": list(output),
        "usage": None if usage is None else response_usage(usage),
        "max_tool_calls": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        **stored.echo,
    }


def response_of(
    record: JobRecord, stored: Stored, model: str, partial: Sequence[Item] = ()
) -> dict[str, Any]:
    """The response as it is now; `partial` is the output of a job that ended without a result."""
    status = _STATUS[record.status]
    if status == "completed" and record.finish_reason == "length":
        status = "incomplete"
    output = partial if record.result is None else output_items(record.id, record.result)
    finished_s = None if record.finished_ms is None else record.finished_ms // 1000
    return response_object(
        record.id,
        stored,
        model,
        record.created_ms // 1000,
        status,
        output=output,
        usage=record.usage,
        error=record.error,
        completed_s=finished_s,
    )


def output_items(job_id: str, result: Mapping[str, Any]) -> list[Item]:
    """What a finished job put out, from its result in the form of a chat completion: a message, or calls."""
    choice = result["choices"][0]
    message = choice["message"]
    status = "incomplete" if choice["finish_reason"] == "length" else "completed"
    if calls := message.get("tool_calls"):
        made = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        last = len(made) - 1
        return [
            call_item(job_id, i, status if i == last else "completed", *one) for i, one in enumerate(made)
        ]
    logprobs = (choice.get("logprobs") or {}).get("content")
    return [message_item(job_id, status, message["content"] or "", logprobs or [])]


def call_item(job_id: str, index: int, status: str, name: str, arguments: str) -> Item:
    """A call of a function; `arguments` is JSON as the model wrote it."""
    return {
        "id": f"fc_{job_id}_{index}",
        "type": "function_call",
        "status": status,
        "call_id": call_id(job_id, 0, index),
        "name": name,
        "arguments": arguments,
    }


def message_item(job_id: str, status: str, text: str | None, logprobs: Sequence[Any] = ()) -> Item:
    """The answer; `text` is None while there is no part for it yet."""
    content = [] if text is None else [text_part(text, logprobs)]
    return {
        "id": f"msg_{job_id}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def text_part(text: str, logprobs: Sequence[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def response_usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """A job's usage in the names of the Responses API."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


def _error(error: Mapping[str, Any] | None) -> dict[str, Any]:
    error = error or {"code": "internal_error", "message": "The job failed."}
    return {"code": _CODES.get(str(error.get("code")), "server_error"), "message": str(error.get("message"))}
