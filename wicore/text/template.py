"""Gemma's chat template, built of ids so that only the template speaks in control tokens.

    <bos><start_of_turn>user\\n{system}\\n\\n{user}<end_of_turn>\\n<start_of_turn>model\\n...

The same ids as the official Jinja template of the Gemma 3 checkpoints (tokenizer_config.json) gives
for text without control pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from wicore.errors import InvalidRequest
from wicore.messages import Message, ToolCall
from wicore.text.calls import spelt_calls, spelt_results
from wicore.text.tokenizer import Tokenizer

TEMPLATE = "gemma3-1"
"""Names how chats become ids: change it with the template."""

_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn as the model sees it, without the control tokens around it."""

    speaker: Literal["user", "model"]
    text: str


def chat_turns(messages: Sequence[Message], preamble: str = "") -> list[Turn]:
    """The turns of a chat. Pure.

    Leading system and developer messages, and then `preamble`, go before the first user turn, each message
    followed by a blank line; the text of turns is stripped, theirs is not. The results of an assistant's
    calls are a user turn, in the order of the calls, and what the user says next belongs to it.

    Raises InvalidRequest naming the message whose role breaks the alternation of user and assistant, or
    the call that has no result.
    """
    lead = 0
    while lead < len(messages) and messages[lead].role in _SYSTEM_ROLES:
        lead += 1
    prefix = "".join(f"{_named(message, message.text())}\n\n" for message in messages[:lead]) + preamble
    if lead == len(messages):
        raise InvalidRequest(
            "messages: must have a user message; there are only system messages", param="messages"
        )
    turns: list[Turn] = []
    at = lead
    while at < len(messages):
        calls = messages[at - 1].tool_calls if turns and turns[-1].speaker == "model" else None
        if calls:
            said = [spelt_results(_results(messages, at, calls))]
            at += len(calls)
            if at < len(messages) and messages[at].role == "user":
                said.append(_stripped(messages[at]))
                at += 1
            turns.append(Turn("user", "\n\n".join(said)))
            continue
        speaker: Literal["user", "model"] = "model" if turns and turns[-1].speaker == "user" else "user"
        _check_role(messages[at], at, expected="assistant" if speaker == "model" else "user")
        turns.append(Turn(speaker, prefix + _stripped(messages[at])))
        prefix = ""
        at += 1
    if messages[-1].tool_calls:
        _results(messages, at, messages[-1].tool_calls)
    return turns


def render(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """Prompt ids of a chat, ending where the model's next turn begins."""
    ids = [tokenizer.bos]
    for turn in turns:
        ids += _turn(f"{turn.speaker}\n{turn.text}", tokenizer)
    return [*ids, tokenizer.start_of_turn, *tokenizer.encode("model\n", bos=False)]


def _turn(text: str, tokenizer: Tokenizer) -> list[int]:
    return [
        tokenizer.start_of_turn,
        *tokenizer.encode(text, bos=False),
        tokenizer.end_of_turn,
        *tokenizer.encode("\n", bos=False),
    ]


def _stripped(message: Message) -> str:
    # The official template strips each part of a message, not their concatenation.
    said = _named(message, "".join(text.strip() for text in message.texts()))
    if not message.tool_calls:
        return said
    return "\n".join(filter(None, [said, spelt_calls(message.tool_calls)]))


def _named(message: Message, text: str) -> str:
    return text if message.name is None else f"{message.name}: {text}"


def _results(messages: Sequence[Message], at: int, calls: Sequence[ToolCall]) -> list[str]:
    """What the tool messages from `at` on say of each call, in the order of the calls."""
    waiting = {call.id: call.function.name for call in calls}
    found: dict[str, str] = {}
    for index in range(at, at + len(calls)):
        missing = ", ".join(map(repr, waiting))
        if index >= len(messages):
            raise _fault(f"messages.{at - 1}.tool_calls", f"no message of role 'tool' answers {missing}")
        message = messages[index]
        if message.role != "tool":
            what = f"must be 'tool' here, found {message.role!r}: no message answers {missing} yet"
            raise _fault(f"messages.{index}.role", what)
        if message.tool_call_id not in waiting:
            what = f"must be of a call that waits: {missing} (got {message.tool_call_id!r:.60})"
            raise _fault(f"messages.{index}.tool_call_id", what)
        name = waiting.pop(message.tool_call_id)
        if message.name not in (None, name):
            raise _fault(f"messages.{index}.name", f"must be that of the function called, {name!r}")
        found[message.tool_call_id] = message.text()
    return [found[call.id] for call in calls]


def _check_role(message: Message, index: int, *, expected: str) -> None:
    if message.role != expected:
        what = (
            f"must be {expected!r} here, found {message.role!r}; after leading system messages, user and "
            "assistant must alternate, user first"
        )
        raise _fault(f"messages.{index}.role", what)


def _fault(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {what}", param=field)
