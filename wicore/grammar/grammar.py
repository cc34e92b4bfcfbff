"""Which outputs a request allows, as a value. Pure: nothing is compiled here, and no library is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from wicore.request import JobBody
from wicore.text.calls import arguments_grammar, call_grammar


@dataclass(frozen=True, slots=True)
class Grammar:
    """The outputs that are allowed. Equal grammars are compiled once; `param` does not count for that."""

    kind: Literal["json_schema", "lark"]
    text: str
    """The schema as JSON, its keys in the order given, in which an output has its properties; or the Lark
    grammar."""
    param: str = field(default="response_format", compare=False)
    """The field that asked for it, which errors name."""


def json_object_grammar(param: str = "response_format") -> Grammar:
    """Any JSON object, without white space between its parts."""
    return json_schema_grammar({"type": "object"}, param)


def json_schema_grammar(schema: Mapping[str, Any], param: str = "response_format") -> Grammar:
    """The JSON values valid against `schema`, which `wicore.request.JsonSchema` has bounded, without white
    space between their parts."""
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return Grammar("json_schema", text, param)


def lark_grammar(text: str, param: str = "response_format") -> Grammar:
    """What a grammar in llguidance's Lark dialect derives from `start`. `%json {...}` embeds a schema."""
    return Grammar("lark", text, param)


def grammar_of(body: JobBody) -> Grammar | None:
    """What the output of a job must be; None: any text."""
    use = body.tool_use()
    if use is not None:
        return lark_grammar(call_grammar(use), "tools")
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return json_object_grammar()
    return json_schema_grammar(wanted.json_schema.schema_, "response_format.json_schema.schema")


def parts_of(body: JobBody) -> list[Grammar]:
    """Those that `grammar_of` puts together, each with the field that asked for it: where the whole cannot be
    honoured they tell which is at fault."""
    return [
        lark_grammar(arguments_grammar(tool.function), f"tools.{i}.function.parameters")
        for i, tool in enumerate(body.tools)
    ]
