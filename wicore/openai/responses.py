"""Results and events in the forms OpenAI's clients read.

Forms after OpenAI's API reference: `chat.completion`, `chat.completion.chunk`, `text_completion`.
A token's log-probability travels in one form everywhere inside WiCore, the chat one that
`logprob_entry` makes; the completions door folds it into its older, column-wise shape at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wicore.messages import ToolUse
from wicore.request import Event, FinishReason, JobBody, JobKind
from wicore.text.calls import AnswerReader, read_answer

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


def call_id(job_id: str, choice: int, index: int) -> str:
    """Names a call that an answer makes; the same for every attempt and every reader of a job."""
    return f"call_{hashlib.sha256(f'{job_id}/{choice}/{index}'.encode()).hexdigest()[:24]}"


def result_object(
    job_id: str,
    body: JobBody,
    model: str,
    created_s: int,
    choices: Sequence[ChoiceResult],
    usage: Mapping[str, Any],
    *,
    fingerprint: str | None = None,
) -> dict[str, Any]:
    """The response of a call that does not stream; also what is stored as a job's result.

    `model` is the served name, `created_s` Unix time, `usage` as `wicore.request.usage_of` makes it,
    `fingerprint` the `Model`'s.
    """
    if body.kind == "chat":
        may_call = body.tool_use() is not None
        formed = [_chat_choice(job_id, i, choice, may_call) for i, choice in enumerate(choices)]
    else:
        formed = [_text_choice(i, choice) for i, choice in enumerate(choices)]
    return {
        "id": completion_id(job_id, body.kind),
        "object": "chat.completion" if body.kind == "chat" else "text_completion",
        "created": created_s,
        "model": model,
        "choices": formed,
        "usage": dict(usage),
        "system_fingerprint": fingerprint,
    }


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The one response for several prompts: their choices in order, under the first one's id."""
    if len(results) == 1:
        return dict(results[0])
    choices = [choice for result in results for choice in result["choices"]]
    return {
        **results[0],
        "choices": [{**choice, "index": index} for index, choice in enumerate(choices)],
        "usage": summed_usage([result["usage"] for result in results]),
    }


def summed_usage(usages: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The usage of several jobs as one."""
    total: dict[str, Any] = {}
    for usage in usages:
        for name, value in usage.items():
            if isinstance(value, Mapping):
                total[name] = summed_usage([total.get(name, {}), value])
            else:
                total[name] = total.get(name, 0) + value
    return total


def _chat_choice(job_id: str, index: int, choice: ChoiceResult, may_call: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if may_call:
        answer = read_answer(choice.text)
        message["content"] = answer.text or None
        if answer.calls:
            message["tool_calls"] = [
                _call(call_id(job_id, index, i), name, arguments)
                for i, (name, arguments) in enumerate(answer.calls)
            ]
    return {
        "index": index,
        "message": message,
        "logprobs": _chat_logprobs(choice.logprobs),
        "finish_reason": choice.finish_reason,
    }


def _call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


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
    """Turns one job's events into OpenAI's stream chunks, in order. Pure; keeps text offsets, and how far
    each choice is read.

    A stream for several prompts has a writer for each job, with `id` and `created_s` in common.
    """

    job_id: str
    kind: JobKind
    model: str
    created_s: int
    id: str
    """Of the response."""
    include_usage: bool = False
    fingerprint: str | None = None
    service_tier: str | None = None
    first_index: int = 0
    """Of the job's choices among those of the response."""
    echo: str = ""
    """What the text of each choice begins with."""
    use: ToolUse | None = None
    _offsets: dict[int, int] = field(default_factory=dict)
    _readers: dict[int, AnswerReader] = field(default_factory=dict)

    def opening(self, n: int) -> list[dict[str, Any]]:
        """What a stream starts with: of a chat the role, of an echoing completion the prompt, `n` times."""
        if self.kind == "chat":
            content = "" if self.use is None else None
            delta = {"delta": {"role": "assistant", "content": content, "refusal": None}}
            return [self._choice(index, delta) for index in range(n)]
        return [self._choice(index, {"text": self.echo}) for index in range(n)] if self.echo else []

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The chunks of one event: none, text, calls, or an end. Errors are the caller's to send."""
        if event["type"] != "token":
            return []
        text, finish, entries = event["text"], event.get("finish_reason"), event.get("logprobs")
        index = event["index"]
        if self.kind == "completion":
            logprobs = _text_logprobs(entries, self._offset_after(index, entries))
            if not text and finish is None and not entries:
                return []
            return [self._choice(index, {"text": text}, logprobs, finish)]
        deltas = self._deltas(index, text, also_empty=bool(entries))
        parts = [self._choice(index, {"delta": delta}) for delta in deltas]
        if parts:
            parts[0]["choices"][0]["logprobs"] = _chat_logprobs(entries)
        if finish is not None:
            parts.append(self._choice(index, {"delta": {}}, None, finish))
        return parts

    def usage(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream that is to tell the usage."""
        return self._chunk([]) | {"usage": dict(usage)}

    def _deltas(self, index: int, text: str, *, also_empty: bool) -> list[dict[str, Any]]:
        if self.use is None:
            return [{"content": text}] if text or also_empty else []
        said, pieces = self._readers.setdefault(index, AnswerReader()).read(text)
        deltas: list[dict[str, Any]] = [{"content": said}] if said else []
        for piece in pieces:
            if piece.name is None:
                call: dict[str, Any] = {"function": {"arguments": piece.arguments}}
            else:
                call = _call(call_id(self.job_id, index, piece.index), piece.name, "")
            deltas.append({"tool_calls": [{"index": piece.index, **call}]})
        return deltas or ([{}] if also_empty else [])

    def _offset_after(self, index: int, entries: Sequence[LogprobEntry] | None) -> int:
        """Where these entries start; remembers where the next ones will."""
        start = self._offsets.get(index, 0)
        self._offsets[index] = start + sum(len(entry["token"]) for entry in entries or ())
        return start

    def _choice(
        self,
        index: int,
        content: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        index += self.first_index
        return self._chunk([{"index": index, **content, "logprobs": logprobs, "finish_reason": finish}])

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk" if self.kind == "chat" else "text_completion",
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": self.fingerprint,
        }
        if self.service_tier is not None:
            chunk["service_tier"] = self.service_tier
        if self.include_usage:
            chunk["usage"] = None
        return chunk
