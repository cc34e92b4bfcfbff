"""Results and events in the forms OpenAI's clients read.

Forms after OpenAI's API reference: `chat.completion`, `chat.completion.chunk`, `text_completion`.
A token's log-probability travels in one form everywhere inside WiCore, the chat one that
`logprob_entry` makes; the completions door folds it into its older, column-wise shape at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wicore.request import Event, FinishReason, JobBody, JobKind

LogprobEntry = Mapping[str, Any]
"""{"token", "logprob", "bytes", "top_logprobs": [{"token", "logprob", "bytes"}, ...]}."""

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no number for; OpenAI's own convention."""


@dataclass(frozen=True, slots=True)
class ChoiceResult:
    """One finished choice; its index is its place in the sequence given to `result_object`."""

    text: str
    finish_reason: FinishReason | None
    logprobs: Sequence[LogprobEntry] | None = None
    """One entry a token, when the body asked for them."""


def completion_id(job_id: str, kind: JobKind) -> str:
    return f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{job_id}"


def logprob_entry(token: bytes, logprob: float, top: Sequence[tuple[bytes, float]]) -> dict[str, Any]:
    """One token's log-probability and its alternatives, likeliest first.

    `token` is the token's bytes: a token may be part of a character, so `token` in the entry is
    readable and `bytes` is exact.
    """
    return {**_scored(token, logprob), "top_logprobs": [_scored(other, value) for other, value in top]}


def _scored(token: bytes, logprob: float) -> dict[str, Any]:
    return {
        "token": token.decode("utf-8", "replace"),
        "logprob": max(logprob, LOWEST_LOGPROB),
        "bytes": list(token),
    }


def result_object(
    job_id: str,
    body: JobBody,
    model: str,
    created_s: int,
    choices: Sequence[ChoiceResult],
    usage: Mapping[str, int],
) -> dict[str, Any]:
    """The response of a call that does not stream; also what is stored as a job's result.

    `model` is the served name, `created_s` Unix time, `usage` as `wicore.request.usage_of` makes it.
    """
    chat = body.kind == "chat"
    return {
        "id": completion_id(job_id, body.kind),
        "object": "chat.completion" if chat else "text_completion",
        "created": created_s,
        "model": model,
        "choices": [(_chat_choice if chat else _text_choice)(i, choice) for i, choice in enumerate(choices)],
        "usage": dict(usage),
    }


def _chat_choice(index: int, choice: ChoiceResult) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": _chat_logprobs(choice.logprobs),
        "finish_reason": choice.finish_reason,
    }


def _text_choice(index: int, choice: ChoiceResult) -> dict[str, Any]:
    return {
        "index": index,
        "text": choice.text,
        "logprobs": _text_logprobs(choice.logprobs, 0),
        "finish_reason": choice.finish_reason,
    }


def _chat_logprobs(entries: Sequence[LogprobEntry] | None) -> dict[str, Any] | None:
    return None if entries is None else {"content": list(entries), "refusal": None}


def _text_logprobs(entries: Sequence[LogprobEntry] | None, offset: int) -> dict[str, Any] | None:
    """Column-wise; `offset` is the number of characters of the choice that precede these tokens.

    As OpenAI does, each `top_logprobs` holds the sampled token too, even if it is not among the top.
    """
    if entries is None:
        return None
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in [*entry["top_logprobs"], entry]} for entry in entries
        ],
        "text_offset": offsets,
    }


@dataclass(slots=True)
class ChunkWriter:
    """Turns one job's events into OpenAI's stream chunks, in order. Pure; keeps only text offsets."""

    job_id: str
    kind: JobKind
    model: str
    created_s: int
    include_usage: bool = False
    _offsets: dict[int, int] = field(default_factory=dict)

    def opening(self, n: int) -> list[dict[str, Any]]:
        """What a stream starts with: for chat, a chunk for each of `n` choices that names the role."""
        if self.kind != "chat":
            return []
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk([_chunk_choice(index, {"delta": delta}, None, None)]) for index in range(n)]

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The chunks of one event: none, text, an end, or the usage. Errors are the caller's to send."""
        if event["type"] == "token":
            return self._token(event)
        if event["type"] == "done" and self.include_usage:
            return [self._chunk([]) | {"usage": event["usage"]}]
        return []

    def _token(self, event: Event) -> list[dict[str, Any]]:
        text, finish, entries = event["text"], event.get("finish_reason"), event.get("logprobs")
        index = event["index"]
        if self.kind == "completion":
            logprobs = _text_logprobs(entries, self._offset_after(index, entries))
            if not text and finish is None and not entries:
                return []
            return [self._chunk([_chunk_choice(index, {"text": text}, logprobs, finish)])]
        parts = []
        if text or entries:
            delta = {"delta": {"content": text}}
            parts.append(self._chunk([_chunk_choice(index, delta, _chat_logprobs(entries), None)]))
        if finish is not None:
            parts.append(self._chunk([_chunk_choice(index, {"delta": {}}, None, finish)]))
        return parts

    def _offset_after(self, index: int, entries: Sequence[LogprobEntry] | None) -> int:
        """Where these entries start; remembers where the next ones will."""
        start = self._offsets.get(index, 0)
        self._offsets[index] = start + sum(len(entry["token"]) for entry in entries or ())
        return start

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": completion_id(self.job_id, self.kind),
            "object": "chat.completion.chunk" if self.kind == "chat" else "text_completion",
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }
        if self.include_usage:
            chunk["usage"] = None
        return chunk


def _chunk_choice(
    index: int, content: dict[str, Any], logprobs: dict[str, Any] | None, finish: str | None
) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
