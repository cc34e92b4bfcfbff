"""Conversation items of OpenAI's Responses API: what is taken as input, and the chat messages they mean.

Forms after OpenAI's API reference, "Responses", input items. An item travels as JSON: as it came, with an
id of its own. Items that ask for what is not here (files, reasoning, hosted tools) are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from wicore.messages import DataURL, Detail
from wicore.request import Text

Item = dict[str, Any]
"""One item, in JSON."""

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ItemId = Annotated[Text, Field(min_length=1, max_length=256)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InputText(_Form):
    type: Literal["input_text"]
    text: Text


class OutputText(_Form):
    """An answer sent back; what was told about its text says nothing to the model."""

    type: Literal["output_text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Refusal(_Form):
    type: Literal["refusal"]
    refusal: Text


class InputImage(_Form):
    """An image of a user; uploaded files are for batches."""

    type: Literal["input_image"]
    image_url: DataURL
    detail: Detail | None = None
    file_id: None = None


def _part_tag(part: Any) -> Any:
    return f"{part.get('type') if isinstance(part, dict) else getattr(part, 'type', None)} part"


Part = Annotated[
    Annotated[InputText, Tag("input_text part")]
    | Annotated[InputImage, Tag("input_image part")]
    | Annotated[OutputText, Tag("output_text part")]
    | Annotated[Refusal, Tag("refusal part")],
    Discriminator(
        _part_tag,
        custom_error_type="unsupported_part",
        custom_error_message="type: must be input_text, input_image, output_text or refusal",
    ),
]
Output = Annotated[list[InputText], Field(fail_fast=True)]


class MessageItem(_Form):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)]
    id: ItemId | None = None
    status: ItemStatus | None = None
    phase: None = None

    @model_validator(mode="after")
    def _images_of_users(self) -> MessageItem:
        if self.role != "user" and any(isinstance(part, InputImage) for part in self.content):
            raise ValueError("content: only users have parts of type 'input_image'")
        return self


class FunctionCallItem(_Form):
    type: Literal["function_call"]
    call_id: ItemId
    name: Annotated[Text, Field(min_length=1, max_length=256)]
    arguments: Text
    id: ItemId | None = None
    status: ItemStatus | None = None


class FunctionCallOutputItem(_Form):
    type: Literal["function_call_output"]
    call_id: ItemId
    output: Text | Output
    id: ItemId | None = None
    status: ItemStatus | None = None


def _tag(item: Any) -> Any:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return f"{kind} item"


InputItem = Annotated[
    Annotated[MessageItem, Tag("message item")]
    | Annotated[FunctionCallItem, Tag("function_call item")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output item")],
    Discriminator(
        _tag,
        custom_error_type="unsupported_item",
        custom_error_message="type: must be message, function_call or function_call_output",
    ),
]


def as_items(given: str | Sequence[MessageItem | FunctionCallItem | FunctionCallOutputItem]) -> list[Item]:
    """A request's input as items without ids where it gave none: a text is one user message."""
    if isinstance(given, str):
        return [_message("user", [{"type": "input_text", "text": given}])]
    return [_as_item(item) for item in given]


def _as_item(item: MessageItem | FunctionCallItem | FunctionCallOutputItem) -> Item:
    data = item.model_dump(mode="json", exclude_none=True)
    data.setdefault("type", "message")
    if data["type"] == "message" and isinstance(data["content"], str):
        part = "output_text" if data["role"] == "assistant" else "input_text"
        data["content"] = [{"type": part, "text": data["content"]}]
    for part in data["content"] if data["type"] == "message" else ():
        if part["type"] == "output_text":
            part.setdefault("annotations", [])
    data.setdefault("status", "completed")
    return data


def _message(role: str, content: list[dict[str, Any]]) -> Item:
    return {"type": "message", "role": role, "content": content, "status": "completed"}


def numbered(items: Sequence[Item], job_id: str) -> list[Item]:
    """The items, each with an id; those that had none get one from the job's and their place."""
    return [{"id": f"{_PREFIX[item['type']]}_{job_id}_{i}", **item} for i, item in enumerate(items)]


_PREFIX = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}


def chat_messages(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """A conversation as `JobBody.messages` takes it: instructions first, then its items."""
    lead = [] if instructions is None else [{"role": "developer", "content": instructions}]
    return [*lead, *_turns(items)]


def _turns(items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    """One message an item, but the calls of one turn, and the text before them, are one message."""
    turn: dict[str, Any] | None = None
    for item in items:
        if item["type"] == "function_call":
            turn = turn or {"role": "assistant", "content": None}
            turn.setdefault("tool_calls", []).append(_call(item))
            continue
        if turn is not None:
            yield turn
            turn = None
        if item["type"] == "function_call_output":
            yield {"role": "tool", "tool_call_id": item["call_id"], "content": _output(item["output"])}
        elif item["role"] == "assistant":
            turn = {"role": "assistant", "content": _text(item)}
        else:
            yield {"role": item["role"], "content": _content(item)}
    if turn is not None:
        yield turn


def _call(item: Item) -> dict[str, Any]:
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}


def _output(output: Any) -> str:
    return output if isinstance(output, str) else "".join(part["text"] for part in output)


def _content(item: Item) -> str | list[dict[str, Any]]:
    """Text, or the parts if there is an image."""
    if all(part["type"] != "input_image" for part in item["content"]):
        return _text(item)
    return [_part(part) for part in item["content"]]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "input_image":
        return {"type": "text", "text": _said(part)}
    detail = {"detail": part["detail"]} if "detail" in part else {}
    return {"type": "image_url", "image_url": {"url": part["image_url"], **detail}}


def _text(item: Item) -> str:
    return "".join(map(_said, item["content"]))


def _said(part: dict[str, Any]) -> str:
    said: str = part["refusal" if part["type"] == "refusal" else "text"]
    return said
