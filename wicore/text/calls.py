"""How Gemma 3 is told of functions, how it calls them, and how it is told what they gave. Pure.

Gemma 3 has no tokens for tools: all is text, in the forms that Google documents: declarations and calls in
the JSON form of ai.google.dev/gemma/docs/capabilities/function-calling, results in `tool_output` blocks, as
its examples have them. What the documents leave open is said here: several calls are a list.

A grammar holds the answer to these forms, with the white space of Python's `json.dumps`, so that reading
it back is exact: an answer that begins with "{" or "[" is a call, and no text begins so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from wicore.messages import FunctionDefinition, ToolCall, ToolUse

_ONE = '{"name": function name, "parameters": dictionary of argument name and its value}'
_PREAMBLE = (
    "You have access to functions. If you decide to invoke any of the function(s),\n"
    "you MUST put it in the format of\n{form}\n\n"
    "You SHOULD NOT include any other text in the response if you call a function\n{functions}\n"
)
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def preamble(use: ToolUse) -> str:
    """What stands before the first user text."""
    form = f"{_ONE}\nor, to invoke several, [{_ONE}, ...]" if use.parallel else _ONE
    functions = [_described(function) for function in use.functions]
    return _PREAMBLE.format(form=form, functions=json.dumps(functions, indent=2, ensure_ascii=False))


def _described(function: FunctionDefinition) -> dict[str, Any]:
    described: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        described["description"] = function.description
    return described | {"parameters": parameters_of(function)}


def parameters_of(function: FunctionDefinition) -> dict[str, Any]:
    """The schema of a function's arguments; of none, if it declares none."""
    return _NO_PARAMETERS if function.parameters is None else function.parameters


def spelt_calls(calls: Sequence[ToolCall]) -> str:
    """Calls of an earlier answer as the model wrote them."""
    spelt = [
        f'{{"name": "{call.function.name}", "parameters": {call.function.arguments or "{}"}}}'
        for call in calls
    ]
    return spelt[0] if len(spelt) == 1 else f"[{', '.join(spelt)}]"


def spelt_results(results: Iterable[str]) -> str:
    """What the called functions gave, in the order of the calls."""
    return "\n".join(f"```tool_output\n{result}\n```" for result in results)


# --- grammar ------------------------------------------------------------------------------------

_WHITE_SPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def call_grammar(use: ToolUse) -> str:
    """The answers that `use` allows, in llguidance's dialect of Lark.

    Text may not begin with a code fence either, or a model that fences its calls would make none.
    """
    names = [f"call_{i}" for i in range(len(use.functions))]
    rules = [
        "start: calls" if use.required else "start: (TEXT | calls)?",
        'calls: call | "[" call (", " call)* "]"' if use.parallel else "calls: call",
        f"call: {' | '.join(names)}",
    ]
    if not use.required:
        rules.append(r"TEXT: /[^\s\{\[`](.|\n)*/")
    for name, function in zip(names, use.functions, strict=True):
        head = json.dumps(f'{{"name": "{function.name}", "parameters": ')
        rules += [f'{name}: {head} {name}_arguments "}}"', f"{name}_arguments: {_arguments(function)}"]
    return "\n".join(rules) + "\n"


def arguments_grammar(function: FunctionDefinition) -> str:
    """What `call_grammar` allows as the arguments of a function."""
    return f"start: {_arguments(function)}\n"


def _arguments(function: FunctionDefinition) -> str:
    options = _WHITE_SPACE if function.strict else _WHITE_SPACE | {"lenient": True}
    schema = parameters_of(function) | {"type": "object", "x-guidance": options}
    return f"%json {json.dumps(schema)}"


# --- reading ------------------------------------------------------------------------------------

_HEAD = re.compile(r'\{"name": "([a-zA-Z0-9_-]+)", "parameters": ')


@dataclass(frozen=True, slots=True)
class CallPiece:
    """More of one call: its name, once and first, or a piece of its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class _ObjectEnd:
    """Finds where a JSON object ends, and is then ready for the next."""

    _depth: int = 0
    _quoted: bool = False
    _escaped: bool = False

    def ends(self, character: str) -> bool:
        """Take the object's next character; whether it is the last."""
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._quoted = not self._quoted
        elif not self._quoted and character in "{[":
            self._depth += 1
        elif not self._quoted and character in "}]":
            self._depth -= 1
            return self._depth == 0
        return False


@dataclass(slots=True)
class AnswerReader:
    """Takes an answer apart into text and calls as it comes, however it is cut. A call that is cut off by
    the answer's length is read as far as it goes.

    Attributes:
        called: the answer is a call, or several, and whole.
    """

    called: bool = False
    _state: Literal["start", "text", "head", "arguments", "between", "closing", "end"] = "start"
    _many: bool = False
    _index: int = -1
    _head: str = ""
    _object: _ObjectEnd = field(default_factory=_ObjectEnd)

    def read(self, text: str) -> tuple[str, list[CallPiece]]:
        """The text and the pieces of calls that come with `text`, the next of the answer."""
        if self._state == "start" and text:
            self._many = text[0] == "["
            self._state = "between" if self._many else "head" if text[0] == "{" else "text"
        if self._state == "text":
            return text, []
        pieces: list[CallPiece] = []
        arguments = ""
        for character in text:
            if self._state == "arguments":
                arguments += character
                if self._object.ends(character):
                    self._state = "between" if self._many else "closing"
                    pieces.append(CallPiece(self._index, arguments=arguments))
                    arguments = ""
            elif self._state == "head":
                self._head += character
                if character == " " and (found := _HEAD.fullmatch(self._head)):
                    self._index += 1
                    self._state, self._head = "arguments", ""
                    pieces.append(CallPiece(self._index, name=found[1]))
            elif character == "{" and self._state == "between":
                self._state, self._head = "head", character
            elif (character, self._state) in (("]", "between"), ("}", "closing")):
                self._state, self.called = "end", True
        return "", [*pieces, CallPiece(self._index, arguments=arguments)] if arguments else pieces


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, or as much as there is."""

    text: str
    calls: Sequence[tuple[str, str]]
    """(name, arguments) of each."""
    called: bool
    """It is a call, or several, and whole."""


def read_answer(text: str) -> Answer:
    reader = AnswerReader()
    said, pieces = reader.read(text)
    names = [piece.name for piece in pieces if piece.name is not None]
    arguments = ["".join(p.arguments for p in pieces if p.index == index) for index in range(len(names))]
    return Answer(said, list(zip(names, arguments, strict=True)), reader.called)
