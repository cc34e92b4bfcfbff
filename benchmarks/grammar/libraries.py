"""Which library for grammars: schemas honoured, time to compile, time of a mask.

`pip install outlines-core; python -m benchmarks.grammar.libraries [--schemas 100]`: Gemma's vocabulary of
262,144 tokens, random walks through what is allowed. Times are processor time of the thread that works. A
schema whose compilation takes more than a minute ends that library's run, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jsonschema import Draft202012Validator
from numpy.typing import NDArray

from benchmarks.grammar.schemas import Schema, schemas
from wicore.bench.hardware import describe
from wicore.config import load_settings
from wicore.gemma3.fetch import fetch
from wicore.grammar import Grammar, json_schema_grammar
from wicore.grammar.compiler import Compiler
from wicore.model import Model, load_model

_COMPILE_S = 60.0
_STEPS = 40


class Walk(NamedTuple):
    """One output, as a library follows it."""

    mask: Callable[[], NDArray[np.uint32]]
    take: Callable[[int], object]
    done: Callable[[], bool]


Library = Callable[[Schema], Callable[[], Walk]]
"""Compiles a schema; what it returns begins an output."""


def llguidance(model: Model) -> Library:
    """llguidance, through WiCore's compiler."""
    compiler, eos = Compiler(model.tokenizer, model.checkpoint.config.vocab_size), model.tokenizer.eos

    def begin(grammar: Grammar) -> Walk:
        constraint = compiler.constraint(grammar, {eos})
        return Walk(constraint.allowed, constraint.observe, lambda: constraint.complete)

    def compile(schema: Schema) -> Callable[[], Walk]:
        grammar = json_schema_grammar(schema)
        compiler.constraint(grammar, {eos})
        return lambda: begin(grammar)

    return compile


def outlines(model: Model) -> Library:
    """outlines-core: a schema becomes a regular expression, and that an index of tokens by state."""
    from outlines_core import Guide, Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema

    pieces: dict[bytes, list[int]] = {}
    for token in range(model.tokenizer.vocab_size):
        if piece := model.tokenizer.piece_bytes(token):
            pieces.setdefault(piece, []).append(token)
    vocabulary = Vocabulary(model.tokenizer.eos, pieces)
    words = np.zeros(-(-model.checkpoint.config.vocab_size // 32), np.uint32)

    def begin(index: Any) -> Walk:
        guide = Guide(index)

        def mask() -> NDArray[np.uint32]:
            guide.write_mask_into(words.ctypes.data, len(words), 4)
            return words

        return Walk(mask, guide.advance, guide.is_finished)

    def compile(schema: Schema) -> Callable[[], Walk]:
        index = Index(build_regex_from_schema(json.dumps(schema), ""), vocabulary)
        return lambda: begin(index)

    return compile


LIBRARIES: dict[str, Callable[[Model], Library]] = {"llguidance": llguidance, "outlines-core": outlines}


def measure(name: str, count: int, seed: int, results: Any) -> None:
    """Put one library's figures into `results`, schema by schema: (compile s, mask times, what is wrong)."""
    overrides = {"model.path": str(fetch("gemma-3-270m"))}
    model = load_model(load_settings(environ={}, overrides=overrides))
    started = time.thread_time()
    library = LIBRARIES[name](model)
    results.put(time.thread_time() - started)
    for schema in schemas(count, seed):
        results.put(_one(library, model, schema))
    results.put(None)


def _one(library: Library, model: Model, schema: Schema) -> tuple[float, list[float], str | None]:
    started = time.thread_time()
    try:
        walk = library(schema)()
    except Exception as err:
        return time.thread_time() - started, [], f"refused: {str(err)[:60]}"
    compile_s, masks = time.thread_time() - started, []
    rng, ids = np.random.default_rng(0), []
    while not walk.done() and len(ids) < 2000:
        started = time.thread_time()
        mask = walk.mask()
        if len(ids) < _STEPS:
            masks.append(time.thread_time() - started)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        token = int(allowed[rng.integers(len(allowed))])
        if token == model.tokenizer.eos:
            break
        ids.append(token)
        walk.take(token)
    try:
        value = json.loads(b"".join(map(model.tokenizer.piece_bytes, ids)).decode())
    except ValueError:
        return compile_s, masks, "long" if len(ids) == 2000 else "no JSON"
    valid = Draft202012Validator(schema).is_valid(value)
    return compile_s, masks, None if valid else "invalid"


def report(name: str, count: int, seed: int) -> dict[str, object]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure, args=(name, count, seed, results))
    process.start()
    load_s, rows, stuck = results.get(), [], False
    while not stuck:
        try:
            row = results.get(timeout=_COMPILE_S)
        except queue.Empty:  # it compiles, and goes on compiling
            stuck = True
            break
        if row is None:
            break
        rows.append(row)
    process.kill()
    process.join()
    honoured = [row for row in rows if row[2] is None or row[2] == "long"]
    compiles = [row[0] * 1e3 for row in honoured]
    masks = sorted(t * 1e6 for row in honoured for t in row[1])
    faults: dict[str, int] = {}
    for row in rows:
        if row[2] not in (None, "long"):
            faults[row[2]] = faults.get(row[2], 0) + 1
    return {
        "library": name,
        "vocabulary_s": round(load_s, 2),
        "schemas": len(rows),
        "honoured": len(honoured),
        "gave_up_after_s": _COMPILE_S if stuck else None,
        "compile_ms": _spread(compiles),
        "mask_us": _spread(masks),
        "faults": dict(sorted(faults.items(), key=lambda item: -item[1])[:6]),
        "hardware": describe(),
    }


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 2),
        "p99": round(ordered[int(0.99 * (len(ordered) - 1))], 2),
        "max": round(ordered[-1], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemas", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--library", choices=LIBRARIES, action="append")
    args = parser.parse_args()
    for name in args.library or LIBRARIES:
        print(json.dumps(report(name, args.schemas, args.seed)), flush=True)


if __name__ == "__main__":
    main()
