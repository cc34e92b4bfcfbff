"""Gemma's chat template, built of ids so that only the template speaks in control tokens.

    <bos><start_of_turn>user\\n{system}\\n\\n{user}<end_of_turn>\\n<start_of_turn>model\\n...

The same ids as the official Jinja template of the Gemma 3 checkpoints (tokenizer_config.json) gives
for text without control pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

from wicore.errors import InvalidRequest
from wicore.request import Message
from wicore.text.tokenizer import Tokenizer

TEMPLATE = "gemma3-1"
"""Names how chats become ids: change it with the template."""

_SYSTEM_ROLES = ("system", "developer")


def render_chat(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Prompt ids of a chat, ending where the model's next turn begins.

    Leading system and developer messages go before the first user turn, each followed by a blank
    line; the text of turns is stripped, theirs is not. Raises InvalidRequest naming the message whose
    role breaks the alternation of user and assistant.
    """
    lead = 0
    while lead < len(messages) and messages[lead].role in _SYSTEM_ROLES:
        lead += 1
    prefix = "".join(f"{message.text()}\n\n" for message in messages[:lead])
    turns = messages[lead:]
    if not turns:
        raise InvalidRequest(
            "messages: must have a user message; there are only system messages", param="messages"
        )
    ids = [tokenizer.bos]
    for i, message in enumerate(turns):
        _check_role(message, lead + i, expected="assistant" if i % 2 else "user")
        role = "model" if message.role == "assistant" else "user"
        ids += _turn(f"{role}\n{prefix}{_stripped(message)}", tokenizer)
        prefix = ""
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
    if isinstance(message.content, str):
        return message.content.strip()
    return "".join(part.text.strip() for part in message.content)


def _check_role(message: Message, index: int, *, expected: str) -> None:
    if message.role != expected:
        raise InvalidRequest(
            f"messages.{index}.role: must be {expected!r} here, found {message.role!r}; after leading "
            "system messages, user and assistant must alternate, user first",
            param=f"messages.{index}.role",
        )
