"""How many answers are valid: a real model's, at temperature 1, each held to a schema of its own.

`python -m benchmarks.grammar.validity [--schemas 300]`: the real Gemma 3 270M on the CPU engine, as the
worker drives it. An answer that `max_tokens` cut off is counted apart, as its `finish_reason` says so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jsonschema import Draft202012Validator
from tqdm import tqdm

from benchmarks.grammar.schemas import Schema, schemas
from wicore.bench.hardware import describe
from wicore.config import load_settings
from wicore.engine.base import Engine
from wicore.engine.factory import create_engine
from wicore.gemma3.fetch import fetch
from wicore.generation import Generation
from wicore.grammar import grammar_of
from wicore.grammar.compiler import Compiler
from wicore.hmt import CacheManager, TierSizes
from wicore.model import Model, load_model
from wicore.request import Priority, parse_job
from wicore.scheduler import Limits, Scheduler
from wicore.text.prompt import prepare

PROMPT = "A short value, as JSON: "
"""It says nothing of the schema: what holds the answer to it is the grammar alone."""
_FREQUENCY_PENALTY = 0.5
"""A base model that nests once goes on nesting: in a recursive schema its answers would have no end."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote for a schema."""

    schema: Schema
    text: str
    tokens: int
    finish_reason: str

    @property
    def fault(self) -> str | None:
        """Why it is not valid; None: it is."""
        try:
            value = json.loads(self.text)
        except ValueError as err:
            return f"no JSON: {err}"
        errors = Draft202012Validator(self.schema).iter_errors(value)
        return next((f"invalid: {error.message}" for error in errors), None)


def answers(
    model: Model, engine: Engine, wanted: Iterable[Schema], *, batch: int = 16, max_tokens: int = 6000
) -> Iterator[Answer]:
    """The model's answers, at temperature 1, as they are done; `batch` are written together."""
    info = engine.info
    sizes = TierSizes({"global": info.global_blocks, "window": info.window_blocks})
    scheduler = Scheduler(Limits(batch, 512), CacheManager(info.layout, sizes, info.fingerprint))
    compiler = Compiler(model.tokenizer, info.vocab_size)
    waiting = enumerate(wanted)
    running: dict[int, tuple[Generation, Schema]] = {}
    while True:
        while len(running) < batch and (following := next(waiting, None)) is not None:
            key, schema = following
            generation = _job(key, schema, model, compiler, max_tokens)
            for _, request in generation.requests(key):
                scheduler.add(request)
            running[key] = generation, schema
        if not running:
            return
        plan = scheduler.plan()
        assert plan is not None
        for out in scheduler.apply(engine.step(plan)):
            generation, schema = running[out.key]
            if generation.take(0, out.token):
                scheduler.remove(out.key)
                del running[out.key]
                yield _answer(generation, schema)


def _job(key: int, schema: Schema, model: Model, compiler: Compiler, max_tokens: int) -> Generation:
    asked = {"type": "json_schema", "json_schema": {"name": "value", "schema": schema}}
    body = parse_job(
        {
            "kind": "completion",
            "prompt": PROMPT,
            "max_tokens": max_tokens,
            "frequency_penalty": _FREQUENCY_PENALTY,
            "response_format": asked,
        }
    )
    prepared, grammar = (
        prepare(body, model.tokenizer, model.checkpoint.config, model.context),
        grammar_of(body),
    )
    assert grammar is not None
    return Generation(
        f"schema-{key}",
        body,
        prepared,
        model.tokenizer,
        priority=Priority.NORMAL,
        constrain=lambda: compiler.constraint(grammar, prepared.stop_ids),
    )


def _answer(generation: Generation, schema: Schema) -> Answer:
    if generation.error is not None:
        raise generation.error
    events = [event for event in generation.events() if event["type"] == "token"]
    text = "".join(event["text"] for event in events)
    return Answer(schema, text, len(events), events[-1]["finish_reason"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=6000)
    args = parser.parse_args()
    settings = load_settings(environ={}, overrides={"model.path": str(fetch("gemma-3-270m"))})
    model = load_model(settings)
    engine = create_engine(settings, model)
    started, done = time.monotonic(), []
    written = answers(
        model, engine, schemas(args.schemas, args.seed), batch=args.batch, max_tokens=args.max_tokens
    )
    for answer in tqdm(written, total=args.schemas, unit="answer", disable=None):
        done.append(answer)
        if answer.fault is not None:
            shown = {"fault": answer.fault, "finish_reason": answer.finish_reason, "text": answer.text[:200]}
            print(json.dumps({**shown, "schema": answer.schema}, ensure_ascii=False), flush=True)
    cut = [answer for answer in done if answer.finish_reason == "length"]
    whole = [answer for answer in done if answer.finish_reason == "stop"]
    line = {
        "measure": "structured output",
        "model": model.name,
        "weights": engine.info.weights,
        "temperature": 1,
        "frequency_penalty": _FREQUENCY_PENALTY,
        "schemas": len(done),
        "whole": len(whole),
        "valid": sum(answer.fault is None for answer in whole),
        "cut off": len(cut),
        "tokens": sum(answer.tokens for answer in done),
        "longest": max(answer.tokens for answer in done),
        "seconds": round(time.monotonic() - started, 1),
        "hardware": describe(),
    }
    print(json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    main()
