"""What a request may ask of the form of its output, and what tokens are then allowed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from benchmarks.grammar.schemas import Maker, Schema, schemas
from wicore.errors import InvalidRequest, WicoreError
from wicore.gemma3.checkpoint import Checkpoint
from wicore.generation import Generation
from wicore.grammar import Grammar, grammar_of, json_object_grammar, json_schema_grammar, lark_grammar
from wicore.grammar import compiler as compiler_module
from wicore.grammar.check import GrammarChecker
from wicore.grammar.compiler import Compiler, GrammarConstraint
from wicore.request import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, JobBody, Priority, parse_job
from wicore.sampling import SampledToken
from wicore.text.prompt import prepare
from wicore.text.tokenizer import Tokenizer

SCHEMA = {"type": "object", "properties": {"é": {"type": "string"}, "a": {"type": "integer"}}}
FIELD = "response_format.json_schema.schema"


def body(response_format: Any, **fields: Any) -> JobBody:
    return parse_job({"kind": "completion", "prompt": "a", "response_format": response_format} | fields)


def asking(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


def test_the_form_of_the_output_follows_the_request() -> None:
    assert grammar_of(body(None)) is None
    assert grammar_of(body({"type": "text"})) is None
    assert grammar_of(body({"type": "json_object"})) == json_object_grammar()
    assert grammar_of(body(asking(SCHEMA))) == json_schema_grammar(SCHEMA)


def test_grammars_are_equal_whatever_field_asked_for_them() -> None:
    grammars = {json_schema_grammar(SCHEMA, "tools.0.function.parameters"), json_schema_grammar(SCHEMA)}
    assert len(grammars) == 1


def test_the_order_of_properties_is_part_of_a_grammar() -> None:
    turned = {**SCHEMA, "properties": dict(reversed(SCHEMA["properties"].items()))}  # type: ignore[attr-defined]
    assert json_schema_grammar(SCHEMA) != json_schema_grammar(turned)


def test_a_message_carries_the_format() -> None:
    sent = body({**asking(SCHEMA), "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}})
    assert parse_job(sent.wire()) == sent


@pytest.mark.parametrize(
    ("response_format", "param", "says"),
    [
        ({"type": "json_schema"}, "response_format", "json_schema is required"),
        ({"type": "text", "json_schema": {"name": "a", "schema": {}}}, "response_format", "not allowed"),
        ({"type": "xml"}, "response_format.type", "'json_object'"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, FIELD, "required"),
        (
            {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
            "response_format.json_schema.name",
            "pattern",
        ),
        (asking([]), FIELD, "dictionary"),
        (asking({"const": "\ud800"}), FIELD, "Unicode"),
        (asking({"const": float("nan")}), FIELD, "NaN"),
        (asking({"const": "x" * MAX_SCHEMA_BYTES}), FIELD, str(MAX_SCHEMA_BYTES)),
        (asking(nested(MAX_SCHEMA_DEPTH + 1)), FIELD, "deep"),
        (asking(nested(100_000)), FIELD, "deep"),
    ],
)
def test_a_format_that_is_wrong_in_itself_is_refused_by_name(
    response_format: Any, param: str, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        body(response_format)
    assert refused.value.param == param


def test_a_schema_may_be_as_deep_as_the_limit_says() -> None:
    sent = body(asking(nested(MAX_SCHEMA_DEPTH)))
    assert parse_job(sent.wire()) == sent


def test_an_output_with_a_form_ends_where_it_is_complete() -> None:
    with pytest.raises(InvalidRequest) as refused:
        body({"type": "json_object"}, ignore_eos=True)
    assert refused.value.param == "ignore_eos"


# --- tokens -------------------------------------------------------------------------------------------

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "é": {"enum": ["ja", "nein"]}},
    "required": ["x", "é"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler(tiny: Checkpoint, tiny_tokenizer: Tokenizer) -> Compiler:
    return Compiler(tiny_tokenizer, tiny.config.vocab_size)


def allowed(constraint: GrammarConstraint) -> list[int]:
    mask = constraint.allowed()
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()  # type: ignore[no-any-return]


def write(constraint: GrammarConstraint, choose: Callable[[list[int]], int], end: int) -> list[int]:
    """Tokens of an output that is complete: each chosen from those allowed."""
    ids: list[int] = []
    while not constraint.complete:
        token = choose(allowed(constraint))
        if token == end:
            break
        ids.append(token)
        constraint.observe(token)
        assert constraint.error is None
        assert len(ids) < 20_000
    return ids


def at_random(seed: int) -> Callable[[list[int]], int]:
    rng = np.random.default_rng(seed)
    return lambda ids: ids[rng.integers(len(ids))]


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False), st.integers(0, 2**32 - 1))
def test_whatever_is_drawn_is_valid_against_its_schema(compiler, tiny_tokenizer, rng, seed) -> None:
    schema: Schema = Maker(rng).top()
    end = tiny_tokenizer.eos
    ids = write(compiler.constraint(json_schema_grammar(schema), {end}), at_random(seed), end)
    text = b"".join(map(tiny_tokenizer.piece_bytes, ids)).decode()  # whole characters, too
    Draft202012Validator(schema).validate(json.loads(text))


def test_an_object_is_any_object_without_white_space_between_its_parts(compiler, tiny_tokenizer) -> None:
    end = tiny_tokenizer.eos
    for seed in range(5):
        choose, closing = at_random(seed), {ord(c) for c in '"}]'}

        def soon(ids: list[int], choose=choose, closing=closing) -> int:
            ends = [i for i in ids if set(tiny_tokenizer.piece_bytes(i)) <= closing]
            return choose(ends) if ends and choose([0, 1, 2]) else choose(ids)

        ids = write(compiler.constraint(json_object_grammar(), {end}), soon, end)
        text = tiny_tokenizer.decode(ids)
        value = json.loads(text)
        assert isinstance(value, dict)
        # Written again it can only differ in how strings and numbers are spelt.
        assert text.count(" ") == 0 or '"' in text


def test_properties_come_in_the_order_of_the_schema(compiler, tiny_tokenizer) -> None:
    ids = write(compiler.constraint(json_schema_grammar(POINT), {1}), at_random(3), 1)
    assert list(json.loads(tiny_tokenizer.decode(ids))) == ["x", "é"]


def test_control_pieces_are_never_allowed_and_an_end_only_where_the_output_may_end(
    compiler, tiny_tokenizer
) -> None:
    ends = {tiny_tokenizer.eos, tiny_tokenizer.end_of_turn}
    control = {i for i in range(tiny_tokenizer.vocab_size) if not tiny_tokenizer.piece_bytes(i)}
    constraint = compiler.constraint(json_schema_grammar({"type": "integer", "minimum": 0}), ends)
    assert not control & set(allowed(constraint))
    constraint.observe(tiny_tokenizer.encode("7", bos=False)[-1])
    assert control & set(allowed(constraint)) == ends
    assert not constraint.complete  # another digit may come
    only_turn = compiler.constraint(json_schema_grammar({"type": "integer"}), {tiny_tokenizer.end_of_turn})
    only_turn.observe(tiny_tokenizer.encode("7", bos=False)[-1])
    assert control & set(allowed(only_turn)) == {tiny_tokenizer.end_of_turn}


def test_an_output_that_nothing_can_follow_is_complete(compiler, tiny_tokenizer) -> None:
    constraint = compiler.constraint(json_schema_grammar({"const": "a"}), {1})
    for token in tiny_tokenizer.encode('"a"', bos=False):
        assert not constraint.complete
        if tiny_tokenizer.piece_bytes(token) != b" ":
            constraint.observe(token)
    assert constraint.complete
    assert allowed(constraint) == [1]


def test_rows_beyond_the_vocabulary_are_never_allowed(tiny_tokenizer) -> None:
    padded = Compiler(tiny_tokenizer, tiny_tokenizer.vocab_size + 70)
    constraint = padded.constraint(json_schema_grammar({"type": "string"}), {1})
    constraint.observe(tiny_tokenizer.encode('"', bos=False)[-1])
    assert len(constraint.allowed()) == -(-(tiny_tokenizer.vocab_size + 70) // 32)
    assert max(allowed(constraint)) < tiny_tokenizer.vocab_size


def test_a_lark_grammar_may_hold_schemas(compiler, tiny_tokenizer) -> None:
    text = f'start: "<call>" call "</call>"\ncall: %json {json.dumps(POINT)}'
    ids = write(compiler.constraint(lark_grammar(text), {1}), at_random(5), 1)
    written = tiny_tokenizer.decode(ids)
    assert (written[:6], written[-7:]) == ("<call>", "</call>")
    Draft202012Validator(POINT).validate(json.loads(written[6:-7]))


def test_outputs_of_one_grammar_do_not_disturb_each_other(compiler) -> None:
    made = [next(iter(schemas(1, seed=8)))] * 2
    first, second = (compiler.constraint(json_schema_grammar(schema), {1}) for schema in made)
    alone = write(compiler.constraint(json_schema_grammar(made[0]), {1}), at_random(6), 1)
    write(second, at_random(7), 1)
    assert write(first, at_random(6), 1) == alone


def test_a_grammar_in_use_is_compiled_once(compiler, monkeypatch) -> None:
    compiled = []
    real = compiler_module.matcher_of
    monkeypatch.setattr(compiler_module, "matcher_of", lambda g, t: compiled.append(g) or real(g, t))
    for _ in range(3):
        compiler.constraint(json_schema_grammar({"const": "compiled once"}), {1})
    assert len(compiled) == 1


# --- an output in a job -------------------------------------------------------------------------------


def generation(compiler: Compiler, tiny: Checkpoint, tokenizer: Tokenizer, **fields: Any) -> Generation:
    asked = body(asking(POINT), max_tokens=200, **fields)
    prompt, grammar = prepare(asked, tokenizer, tiny.config), grammar_of(asked)
    assert grammar is not None
    return Generation(
        "j",
        asked,
        prompt,
        tokenizer,
        priority=Priority.NORMAL,
        constrain=lambda: compiler.constraint(grammar, prompt.stop_ids),
    )


def test_a_choice_ends_when_its_output_is_complete(compiler, tiny, tiny_tokenizer) -> None:
    job = generation(compiler, tiny, tiny_tokenizer)
    [(index, request)] = job.requests(0)
    choose, ended = at_random(1), False
    while not ended:
        token = choose(allowed(request.sampling.constraint))
        request.sampling.observe(token)
        ended = job.take(index, SampledToken(token, None, ()))
    events = [event for event in job.events() if event["type"] == "token"]
    assert events[-1]["finish_reason"] == "stop"
    assert tiny_tokenizer.eos not in [token for event in events for token in event["token_ids"]]
    Draft202012Validator(POINT).validate(json.loads("".join(event["text"] for event in events)))


def test_a_job_whose_output_left_its_grammar_fails_and_says_why(compiler, tiny, tiny_tokenizer) -> None:
    job = generation(compiler, tiny, tiny_tokenizer)
    [(index, request)] = job.requests(0)
    token = tiny_tokenizer.encode("nonsense", bos=False)[-1]
    request.sampling.observe(token)
    assert allowed(request.sampling.constraint) == sorted(job.prompt.stop_ids)
    assert job.take(index, SampledToken(token, None, ()))
    assert isinstance(job.error, WicoreError)
    assert job.error.param == FIELD
    assert [event["type"] for event in job.events()] == ["started"]


# --- what cannot be honoured --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    made = GrammarChecker(compile_s=30.0)  # others may share the machine
    yield made
    made.close()


REFUSED: dict[str, tuple[Schema, str]] = {
    "an unsupported keyword": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "a keyword that options would pass over": (
        {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True},
        "uniqueItems",
    ),
    "an unknown type": ({"type": "text"}, "Invalid type"),
    "an unknown format": ({"type": "string", "format": "isbn"}, "isbn"),
    "a reference to nothing": ({"$ref": "#/$defs/x"}, "does not exist"),
    "a reference elsewhere": ({"$ref": "http://example.com/schema"}, "example.com"),
    "look-ahead": ({"type": "string", "pattern": "^(?!a).*$"}, "look-ahead"),
    "no value": ({"enum": []}, "Unsatisfiable"),
    "bounds that cross": ({"type": "integer", "minimum": 2, "maximum": 1}, "Unsatisfiable"),
    "alternatives that overlap": ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "oneOf"),
    "itself": ({"$ref": "#"}, "cannot be honoured"),
    "a value without end": (
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        "Too many items",
    ),
    "too many optional properties": (
        {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(700)}},
        "items",
    ),
}


@pytest.mark.parametrize(("schema", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_a_schema_that_cannot_be_honoured_is_refused_by_name(checker, schema, says) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        checker.check(json_schema_grammar(schema, FIELD))
    assert refused.value.param == FIELD


def test_a_lark_grammar_that_is_wrong_is_refused(checker) -> None:
    with pytest.raises(InvalidRequest, match="foo"):
        checker.check(lark_grammar("start: foo"))


def test_schemas_as_clients_send_them_are_honoured(checker) -> None:
    for schema in schemas(40):
        checker.check(json_schema_grammar(schema))


def slow_grammar(patterns: int = 40) -> Grammar:
    """Takes minutes to compile."""
    return json_schema_grammar(
        {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(patterns)]}, FIELD
    )


def test_a_schema_that_takes_too_long_is_refused_in_time_and_only_it() -> None:
    checker = GrammarChecker(compile_s=0.2)
    try:
        checker.check(json_schema_grammar(POINT))
        started = time.monotonic()
        for _ in range(3):  # known from the second time on
            with pytest.raises(InvalidRequest, match="simpler") as refused:
                checker.check(slow_grammar())
        assert refused.value.param == FIELD
        assert time.monotonic() - started < 20
        checker._compile_s = 20.0  # a new child on a busy machine
        checker.check(json_schema_grammar(SCHEMA))
    finally:
        checker.close()


def test_a_schema_that_took_too_long_once_is_tried_again_after_a_while(monkeypatch) -> None:
    class OnABusyMachine(GrammarChecker):
        busy = True

        def _answer(self, child, seconds):
            return None if self.busy and seconds == self._compile_s else super()._answer(child, seconds)

    checker, grammar = OnABusyMachine(compile_s=20.0), json_schema_grammar(POINT)
    try:
        with pytest.raises(InvalidRequest, match="simpler"):
            checker.check(grammar)
        checker.busy = False
        with pytest.raises(InvalidRequest, match="simpler"):
            checker.check(grammar)
        now = time.monotonic() + 61
        monkeypatch.setattr("wicore.grammar.check.time.monotonic", lambda: now)
        checker.check(grammar)
    finally:
        checker.close()


def test_a_checker_whose_process_was_killed_starts_another(checker) -> None:
    checker.check(json_schema_grammar({"const": 1}))
    checker._child.kill()
    checker._child.wait()
    checker.check(json_schema_grammar({"const": 2}))
    with pytest.raises(InvalidRequest):
        checker.check(json_schema_grammar({"enum": []}))
