"""Gemma's chat template, built of ids so that only the template speaks in control tokens.

    <bos><start_of_turn>user\\n{system}\\n\\n{user}<end_of_turn>\\n<start_of_turn>model\\n...

The same ids as the official Jinja template of the Gemma 3 checkpoints (tokenizer_config.json) gives
for text without control pieces, and for images those of transformers' Gemma3Processor, but that an image's
tokens name its content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from wicore.errors import InvalidRequest
from wicore.gemma3.config import VisionConfig
from wicore.messages import Message, ToolCall
from wicore.text.calls import spelt_calls, spelt_results
from wicore.text.images import Shown
from wicore.text.tokenizer import Tokenizer
from wicore.vision.identity import content_ids
from wicore.vision.pixels import Picture

TEMPLATE = "gemma3-1"
"""Names how chats become ids: change it with the template."""

_SYSTEM_ROLES = ("system", "developer")


Pieces: TypeAlias = "list[str | Shown]"
"""Texts and images in order."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn as the model sees it, without the control tokens around it."""

    speaker: Literal["user", "model"]
    pieces: Pieces

    @property
    def text(self) -> str:
        """Its words."""
        return "".join(piece for piece in self.pieces if isinstance(piece, str))

    @property
    def images(self) -> list[Shown]:
        return [piece for piece in self.pieces if isinstance(piece, Shown)]


@dataclass(frozen=True, slots=True)
class PromptImage:
    """A picture in a prompt."""

    start: int
    """Position of its first token, the first of VisionConfig.tokens."""
    picture: Picture
    field: str
    """Where it is in the body, for messages."""


def chat_turns(
    messages: Sequence[Message], preamble: str = "", images: Mapping[tuple[int, int], Shown] | None = None
) -> list[Turn]:
    """The turns of a chat, `images` being those of its messages by number of message and part. Pure.

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
    images = images or {}
    turns: list[Turn] = []
    at = lead
    while at < len(messages):
        calls = messages[at - 1].tool_calls if turns and turns[-1].speaker == "model" else None
        if calls:
            said: Pieces = [spelt_results(_results(messages, at, calls))]
            at += len(calls)
            if at < len(messages) and messages[at].role == "user":
                said += ["\n\n", *_said(messages[at], at, images)]
                at += 1
            turns.append(Turn("user", said))
            continue
        speaker: Literal["user", "model"] = "model" if turns and turns[-1].speaker == "user" else "user"
        _check_role(messages[at], at, expected="assistant" if speaker == "model" else "user")
        turns.append(Turn(speaker, [prefix, *_said(messages[at], at, images)]))
        prefix = ""
        at += 1
    if messages[-1].tool_calls:
        _results(messages, at, messages[-1].tool_calls)
    return turns


def render(
    turns: Sequence[Turn], tokenizer: Tokenizer, vision: VisionConfig | None = None
) -> tuple[list[int], list[PromptImage]]:
    """Prompt ids of a chat, ending where the model's next turn begins, and its pictures by position.

    Needs `vision` if there are images.
    """
    prompt = _Prompt(tokenizer)
    prompt.control(tokenizer.bos)
    for turn in turns:
        prompt.control(tokenizer.start_of_turn)
        prompt.text(f"{turn.speaker}\n")
        for piece in turn.pieces:
            if isinstance(piece, str):
                prompt.text(piece)
            else:
                assert vision is not None
                prompt.image(piece, vision)
        prompt.control(tokenizer.end_of_turn)
        prompt.text("\n")
    prompt.control(tokenizer.start_of_turn)
    prompt.text("model\n")
    prompt.control()
    return prompt.ids, prompt.images


class _Prompt:
    """Ids of texts and control tokens in order; text between two of these is tokenised in one go."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: list[str] = []
        self.ids: list[int] = []
        self.images: list[PromptImage] = []

    def text(self, text: str) -> None:
        self._texts.append(text)

    def control(self, *ids: int) -> None:
        self.ids += [*self._tokenizer.encode("".join(self._texts), bos=False), *ids]
        self._texts.clear()

    def image(self, image: Shown, vision: VisionConfig) -> None:
        whole, *crops = image.views
        if not crops:
            self._picture(whole, image.field, vision)
            return
        # What Gemma's processor says around them.
        self.text("Here is the original image ")
        self._picture(whole, image.field, vision)
        self.text(" and here are some crops to help you see better ")
        for at, crop in enumerate(crops):
            self.text(" " if at else "")
            self._picture(crop, image.field, vision)

    def _picture(self, picture: Picture, field: str, vision: VisionConfig) -> None:
        self.text("\n\n")
        self.control(vision.start_token_id)
        self.images.append(PromptImage(len(self.ids), picture, field))
        self.ids += content_ids(picture.digest, vision.tokens)
        self.control(vision.end_token_id)
        self.text("\n\n")


def _said(message: Message, at: int, images: Mapping[tuple[int, int], Shown]) -> Pieces:
    # The official template strips each part of a message, not their concatenation.
    pieces: Pieces = [
        said.strip() if isinstance(said, str) else images[at, part]
        for part, said in enumerate(message.said())
    ]
    if message.name is not None:
        pieces.insert(0, f"{message.name}: ")
    if message.tool_calls:
        calls = spelt_calls(message.tool_calls)
        pieces.append(f"\n{calls}" if any(pieces) else calls)
    return pieces


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
