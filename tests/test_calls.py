"""Gemma's form of function calling: what the model is told, and how its answers are read."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from wicore.messages import CalledFunction, FunctionDefinition, ToolCall, ToolUse
from wicore.text.calls import AnswerReader, call_grammar, preamble, read_answer, spelt_calls, spelt_results

WEATHER = FunctionDefinition(
    name="get_weather",
    description="Weather of a place",
    parameters={"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
)
NOW = FunctionDefinition(name="now")

leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
calls = st.lists(
    st.tuples(
        st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True),
        st.dictionaries(st.text(max_size=5), values, max_size=3).map(json.dumps),
    ),
    min_size=1,
    max_size=3,
)


def spelt(called: list[tuple[str, str]]) -> str:
    """As a history spells them, which is as the model does."""
    return spelt_calls(
        [
            ToolCall(id=f"call_{i}", function=CalledFunction(name=name, arguments=arguments))
            for i, (name, arguments) in enumerate(called)
        ]
    )


def use(*functions: FunctionDefinition, parallel: bool = True) -> ToolUse:
    return ToolUse(functions, required=False, parallel=parallel)


def test_the_model_is_told_each_function_and_the_form_of_a_call() -> None:
    told = preamble(use(WEATHER, NOW, parallel=False))
    assert told.startswith("You have access to functions.")
    assert '{"name": function name, "parameters": dictionary of argument name and its value}\n\n' in told
    listed = json.loads(told[told.index("\n[") :])
    assert listed[0] == {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": WEATHER.parameters,
    }
    assert listed[1]["name"] == "now"
    assert listed[1]["parameters"]["properties"] == {}


def test_the_model_is_told_of_lists_only_if_it_may_call_several() -> None:
    assert "to invoke several" in preamble(use(NOW))
    assert "to invoke several" not in preamble(use(NOW, parallel=False))


def test_one_call_is_an_object_and_several_are_a_list() -> None:
    assert spelt([("f", '{"x": 1}')]) == '{"name": "f", "parameters": {"x": 1}}'
    assert spelt([("f", ""), ("g", "{}")]) == (
        '[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}]'
    )


def test_results_are_blocks_in_order() -> None:
    assert spelt_results(["42", "no"]) == "```tool_output\n42\n```\n```tool_output\nno\n```"


@given(called=calls, data=st.data())
def test_calls_are_read_back_however_the_answer_is_cut(called: list[tuple[str, str]], data: Any) -> None:
    text = spelt(called)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    reader = AnswerReader()
    names: list[str] = []
    arguments: list[str] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        said, pieces = reader.read(text[start:end])
        assert said == ""
        for piece in pieces:
            if piece.name is not None:
                assert piece.index == len(names)
                names.append(piece.name)
                arguments.append("")
            arguments[piece.index] += piece.arguments
    assert list(zip(names, arguments, strict=True)) == called
    assert reader.called


def test_a_call_that_lacks_its_last_brace_is_not_whole() -> None:
    text = spelt([("f", "{}")])
    assert read_answer(text).called
    assert not read_answer(text[:-1]).called


@given(called=calls, data=st.data())
def test_a_call_that_is_cut_off_is_read_as_far_as_it_goes_and_is_not_whole(
    called: list[tuple[str, str]], data: Any
) -> None:
    text = spelt(called)
    answer = read_answer(text[: data.draw(st.integers(0, len(text) - 1))])
    assert not answer.called
    assert answer.text == ""
    for (name, arguments), (whole_name, whole_arguments) in zip(answer.calls, called, strict=False):
        assert name == whole_name
        assert whole_arguments.startswith(arguments)


@pytest.mark.parametrize("text", ["", "Hello {", "It is [1].", 'Call {"name": "f", "parameters": {}}'])
def test_what_begins_as_text_is_text(text: str) -> None:
    answer = read_answer(text)
    assert (answer.text, list(answer.calls), answer.called) == (text, [], False)


def test_braces_and_quotes_within_strings_end_nothing() -> None:
    arguments = json.dumps({"x": '}"]\\', 'k"}': [{"y": "{"}]})
    answer = read_answer(spelt([("f", arguments)]))
    assert answer.calls == [("f", arguments)]


# --- grammar --------------------------------------------------------------------------------------

TRIP = FunctionDefinition(
    name="plan",
    strict=True,
    parameters={
        "type": "object",
        "properties": {
            "to": {"enum": ["Paris", "Rome"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 99},
            "by": {"type": "array", "items": {"enum": ["train", "}]"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["to", "days"],
        "additionalProperties": False,
    },
)


def matcher(use: ToolUse) -> LLMatcher:
    """Of texts byte by byte."""
    found = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_lark(call_grammar(use)))
    assert not found.is_error(), found.get_error()
    return found


def allows(use: ToolUse, text: str) -> bool:
    walk = matcher(use)
    return bool(walk.consume_tokens(list(text.encode()))) and walk.is_accepting()


ONE = '{"name": "plan", "parameters": {"to": "Rome", "days": 3}}'
NONE = '{"name": "now", "parameters": {}}'


@pytest.mark.parametrize(
    ("text", "auto", "single", "required"),
    [
        ("", True, True, False),
        ("Hello {\n```json\n[1]", True, True, False),
        ("`", False, False, False),
        (" Hello", False, False, False),
        ("{}", False, False, False),
        (ONE, True, True, True),
        (NONE, True, True, True),
        (f"[{ONE}, {NONE}]", True, False, True),
        (f"[{NONE}]", True, False, True),
        ("[]", False, False, False),
        (f"{ONE} ", False, False, False),
        (f"{ONE}\nThere.", False, False, False),
        (ONE.replace("Rome", "Oslo"), False, False, False),
        (ONE.replace("plan", "then"), False, False, False),
        (NONE.replace("{}", '{"x": 1}'), False, False, False),
    ],
)
def test_an_answer_is_text_or_valid_calls_as_the_request_says(
    text: str, auto: bool, single: bool, required: bool
) -> None:
    functions = [TRIP, NOW]
    assert allows(ToolUse(functions, required=False, parallel=True), text) == auto
    assert allows(ToolUse(functions, required=False, parallel=False), text) == single
    assert allows(ToolUse(functions, required=True, parallel=True), text) == required


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_drawn_from_the_grammar_is_read_as_valid_calls(seed: int) -> None:
    draw, walk = random.Random(seed), matcher(ToolUse([TRIP, NOW], required=True, parallel=seed % 2 == 0))
    text = bytearray()
    while not walk.is_stopped():
        mask = int.from_bytes(walk.compute_bitmask(), "little") & (2**256 - 1)
        byte = draw.choice([b for b in range(256) if mask >> b & 1])
        assert walk.consume_token(byte)
        text.append(byte)
    answer = read_answer(text.decode())
    assert answer.called
    for name, arguments in answer.calls:
        given = json.loads(arguments)
        if name == "plan":
            assert given["to"] in ("Paris", "Rome")
            assert 1 <= given["days"] <= 99
            assert set(given.get("by", [])) <= {"train", "}]"}
        else:
            assert (name, given) == ("now", {})


def test_what_cannot_be_enforced_is_left_out_unless_the_schema_is_strict() -> None:
    odd = {"type": "object", "properties": {"x": {"type": "string", "format": "odd"}}}
    text = '{"name": "f", "parameters": {"x": "y"}}'
    assert allows(use(FunctionDefinition(name="f", parameters=odd)), text)
    strict = call_grammar(use(FunctionDefinition(name="f", parameters=odd, strict=True)))
    assert LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_lark(strict)).is_error()


@pytest.mark.parametrize("parameters", [None, {}, {"properties": {}}])
def test_arguments_are_an_object_whatever_the_schema_leaves_open(parameters: Any) -> None:
    open_use = use(FunctionDefinition(name="f", parameters=parameters))
    assert allows(open_use, '{"name": "f", "parameters": {}}')
    assert not allows(open_use, '{"name": "f", "parameters": "x"}')
    assert allows(open_use, '{"name": "f", "parameters": {"x": 1}}') == (parameters is not None)
