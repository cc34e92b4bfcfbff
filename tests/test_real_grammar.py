"""Structured output with the vocabulary, and the answers, of the real Gemma 3 270M."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from benchmarks.grammar.schemas import schemas
from benchmarks.grammar.validity import answers
from tests.test_grammar import at_random, write
from wicore.config import Settings, load_settings
from wicore.engine.factory import create_engine
from wicore.grammar import json_schema_grammar
from wicore.grammar.compiler import Compiler
from wicore.model import Model, load_model

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def settings(gemma_270m: Path) -> Settings:
    return load_settings(environ={}, overrides={"model.path": str(gemma_270m)})


@pytest.fixture(scope="module")
def model(settings: Settings) -> Model:
    return load_model(settings)


def test_whatever_is_drawn_from_the_real_vocabulary_is_valid(model: Model) -> None:
    tokenizer = model.tokenizer
    compiler = Compiler(tokenizer, model.checkpoint.config.vocab_size)
    for seed, schema in enumerate(schemas(15, seed=2)):
        constraint = compiler.constraint(json_schema_grammar(schema), {tokenizer.eos})
        ids = write(constraint, at_random(seed), tokenizer.eos)
        text = b"".join(map(tokenizer.piece_bytes, ids)).decode()
        Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.thorough
def test_answers_of_the_real_model_at_temperature_1_are_valid(model: Model, settings: Settings) -> None:
    engine = create_engine(settings, model)
    done = list(answers(model, engine, schemas(40, seed=3)))
    assert [answer.fault for answer in done if answer.finish_reason == "stop" and answer.fault] == []
    assert sum(answer.finish_reason == "stop" for answer in done) >= 36
