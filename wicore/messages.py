"""Chats as OpenAI's API has them: messages, tools, and which tools an answer may call. Pure.

Null means the same as leaving a field out. What depends on the order of messages, such as whose turn it is
and which call a result answers, the chat template checks (`wicore.text.template`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict, JsonValue

from wicore.fields import JsonSchema, Strict, Text

MAX_TOOLS = 128
_DATA_URL = r"^data:image/[A-Za-z0-9.+-]{1,64};base64,"
"""How the URL of an image begins: it holds the image."""

FunctionName = Annotated[Text, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


def _served_part(value: Any) -> Any:
    if value in ("input_audio", "file"):
        raise ValueError("not served; send parts of type 'text' or 'image_url'")
    return value


def _data_url(value: str) -> str:
    """Its form alone: what the bytes are is found out where they are used (`wicore.text.images`)."""
    if re.match("https?:", value, re.IGNORECASE):
        raise ValueError("nothing is fetched from other hosts; send the image's bytes as a data: URL")
    if not (value.isascii() and re.match(_DATA_URL, value)):
        raise ValueError("must be a data: URL of an image in base64, as data:image/png;base64,iVBORw0...")
    return value


def _function_alone(value: Any) -> Any:
    if value == "custom":
        raise ValueError("custom tools are not supported; declare a tool of type 'function'")
    return value


FunctionType = Annotated[Literal["function"], BeforeValidator(_function_alone)]


_NULL: JsonDict = {"type": "null"}
_EMPTY: JsonDict = {"enum": [None, ""]}
_PARTS = {"text": "string", "refusal": "string", "image_url": "object"}


def _alone(kind: str) -> JsonDict:
    properties: JsonDict = dict.fromkeys(_PARTS, _NULL)
    properties |= {"type": {"const": kind}, kind: {"type": _PARTS[kind]}}
    return {"properties": properties, "required": [kind]}


_ONE_KIND: JsonDict = {"oneOf": [_alone(kind) for kind in _PARTS]}
"""What `ContentPart._of_its_type` checks, as JSON Schema says it."""


DataURL = Annotated[
    str,
    AfterValidator(_data_url),
    Field(json_schema_extra={"pattern": f"{_DATA_URL}[A-Za-z0-9+/]+={{0,2}}$"}),
]
Detail = Literal["auto", "low", "high"]


class ImageURL(Strict):
    """An image, which the URL holds."""

    url: DataURL
    """data:image/TYPE;base64,...: a PNG, JPEG, WebP, GIF (its first frame) or BMP."""
    detail: Detail = "auto"
    """high: crops of a long or wide image are shown beside the whole; auto and low: the whole alone."""


class ContentPart(Strict):
    """A piece of a message's content; users also have images, assistants refusals."""

    model_config = ConfigDict(json_schema_extra=_ONE_KIND)

    type: Annotated[Literal["text", "refusal", "image_url"], BeforeValidator(_served_part)]
    text: Text | None = None
    refusal: Text | None = None
    image_url: ImageURL | None = None

    @model_validator(mode="after")
    def _of_its_type(self) -> ContentPart:
        if getattr(self, self.type) is None:
            raise ValueError(f"{self.type}: required in a part of type {self.type!r}")
        for other in _PARTS:
            if other != self.type and getattr(self, other) is not None:
                raise ValueError(f"{other}: not allowed in a part of type {self.type!r}")
        return self

    def said(self) -> str | ImageURL:
        said = self.image_url or self.text or self.refusal
        return "" if said is None else said


class CalledFunction(Strict):
    name: FunctionName
    arguments: Text
    """JSON, as the model wrote it."""


class ToolCall(Strict):
    """A call that an earlier answer made."""

    id: Annotated[Text, Field(min_length=1, max_length=256)]
    type: FunctionType = "function"
    function: CalledFunction


_MAY_HAVE: Mapping[str, frozenset[str]] = {
    "system": frozenset({"content", "name"}),
    "developer": frozenset({"content", "name"}),
    "user": frozenset({"content", "name"}),
    "assistant": frozenset({"content", "name", "refusal", "tool_calls"}),
    "tool": frozenset({"content", "name", "tool_call_id"}),
}
_NOT_MADE_HERE: Mapping[str, tuple[Any, ...]] = {
    "annotations": ([], None),
    "audio": (None,),
    "function_call": (None,),
}
"""Fields of answers that clients send back as they got them, at the values that say nothing."""


_SAYS: JsonDict = {"properties": {"content": {"type": ["string", "array"]}}, "required": ["content"]}
_CALLS_NOTHING: JsonDict = {"refusal": _EMPTY, "tool_calls": {"maxItems": 0}}
_BY_ROLE: list[JsonValue] = [
    {
        "properties": {
            "role": {"enum": ["system", "developer", "user"]},
            "tool_call_id": _EMPTY,
            **_CALLS_NOTHING,
        },
        "allOf": [_SAYS],
    },
    {
        "properties": {"role": {"const": "tool"}, "tool_call_id": {"type": "string"}, **_CALLS_NOTHING},
        "required": ["tool_call_id"],
        "allOf": [_SAYS],
    },
    {
        "properties": {"role": {"const": "assistant"}, "tool_call_id": _EMPTY},
        "anyOf": [
            _SAYS,
            {"properties": {"refusal": {"type": "string", "minLength": 1}}, "required": ["refusal"]},
            {"properties": {"tool_calls": {"type": "array", "minItems": 1}}, "required": ["tool_calls"]},
        ],
    },
]


def _say_roles(schema: JsonDict) -> None:
    """Say what `Message` checks beyond its fields, as far as JSON Schema can."""
    schema["oneOf"] = _BY_ROLE
    fields = cast(JsonDict, schema["properties"])
    fields |= {name: {"enum": list(values)} for name, values in _NOT_MADE_HERE.items()}


class Message(Strict):
    """One chat turn. Gemma has no system role: system text is put before the first user turn."""

    model_config = ConfigDict(json_schema_extra=_say_roles)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    name: Annotated[Text, Field(min_length=1, max_length=64)] | None = None
    """Tells participants of a role apart: their text begins with it. Of a tool: the function called."""
    refusal: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Text | None = None
    """Which call a tool message answers."""

    @model_validator(mode="before")
    @classmethod
    def _as_sent_back(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {k: v for k, v in data.items() if not (k in _NOT_MADE_HERE and v in _NOT_MADE_HERE[k])}

    @model_validator(mode="after")
    def _fits_its_role(self) -> Message:
        for field in ("name", "refusal", "tool_calls", "tool_call_id"):
            if getattr(self, field) and field not in _MAY_HAVE[self.role]:
                raise ValueError(f"{field}: not allowed in a message of role {self.role!r}")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("tool_call_id: required in a message of role 'tool'")
        if self.content is None and not self.refusal and not self.tool_calls:
            raise ValueError("content: required, unless an assistant message has tool_calls or a refusal")
        if self.tool_calls and len({call.id for call in self.tool_calls}) < len(self.tool_calls):
            raise ValueError("tool_calls: two calls have the same id; ids must be unique")
        if self.role != "assistant" and any(part.type == "refusal" for part in self._parts()):
            raise ValueError("content: only assistants have parts of type 'refusal'")
        if self.role != "user" and any(part.type == "image_url" for part in self._parts()):
            raise ValueError("content: only users have parts of type 'image_url'")
        return self

    def _parts(self) -> Sequence[ContentPart]:
        return self.content if isinstance(self.content, list) else ()

    def said(self) -> list[str | ImageURL]:
        """Texts and images, part by part; a refusal stands where the content would."""
        if isinstance(self.content, str):
            return [self.content]
        return [part.said() for part in self._parts()] or [self.refusal or ""]

    def text(self) -> str:
        """What is said in words."""
        return "".join(said for said in self.said() if isinstance(said, str))

    def images(self) -> Iterator[tuple[int, ImageURL]]:
        """Its images, each with the number of its part."""
        return ((at, part.image_url) for at, part in enumerate(self._parts()) if part.image_url is not None)


# --- tools --------------------------------------------------------------------------------------


def _of_an_object(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise ValueError(f"must describe an object, with type 'object', not {schema['type']!r:.60}")
    return schema


class FunctionDefinition(Strict):
    name: FunctionName
    description: Text | None = None
    parameters: Annotated[JsonSchema, AfterValidator(_of_an_object)] | None = None
    """JSON Schema of the arguments, an object; None: there are none."""
    strict: bool | None = None
    """True: a schema of which any part cannot be enforced is refused; otherwise that part is left out."""


class Tool(Strict):
    type: FunctionType
    function: FunctionDefinition


class _Name(Strict):
    name: FunctionName


class NamedTool(Strict):
    type: FunctionType
    function: _Name


class _AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: _AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What an answer may call."""

    functions: Sequence[FunctionDefinition]
    """At least one."""
    required: bool
    """The answer is a call, never text."""
    parallel: bool
    """It may be several calls."""


def tool_use(tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool) -> ToolUse | None:
    """What `tool_choice` leaves of the tools; None: nothing may be called, the answer is text.

    Raises ValueError, `field: message`, for a name that stands twice or is not declared.
    """
    declared = {tool.function.name: tool.function for tool in tools}
    if len(declared) < len(tools):
        raise ValueError("tools: two functions have the same name; names must be unique")
    if not tools or choice == "none":
        return None
    if isinstance(choice, NamedTool):
        return ToolUse([_declared(declared, choice.function.name)], required=True, parallel=False)
    if isinstance(choice, AllowedTools):
        wanted = {tool.function.name for tool in choice.allowed_tools.tools}
        functions = [_declared(declared, name) for name in sorted(wanted)]
        return ToolUse(functions, choice.allowed_tools.mode == "required", parallel)
    return ToolUse(list(declared.values()), choice == "required", parallel)


def _declared(declared: Mapping[str, FunctionDefinition], name: str) -> FunctionDefinition:
    if name not in declared:
        raise ValueError(f"tool_choice: no function {name!r} in tools; they are {', '.join(declared)}")
    return declared[name]
