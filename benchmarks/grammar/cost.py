"""What a grammar costs a step: decode steps of the real Gemma 3 270M with and without one, in turns.

`python -m benchmarks.grammar.cost [--batch 16]`: the CPU engine, temperature 1, rounds of steps in which no
row has a grammar and rounds in which every row has one (an array of records: strings, numbers, enums). The
ratio is of medians over the steps of a round, and the median of that over rounds. `cpu` is the same of
processor time, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import NamedTuple

from wicore.bench.driver import random_prompt
from wicore.bench.hardware import describe
from wicore.config import load_settings
from wicore.engine.base import Engine
from wicore.engine.factory import create_engine
from wicore.gemma3.fetch import fetch
from wicore.grammar import json_schema_grammar
from wicore.grammar.compiler import Compiler
from wicore.hmt import CacheManager, TierSizes
from wicore.model import load_model
from wicore.request import Priority, SamplingParams
from wicore.sampling import SamplingState
from wicore.scheduler import Limits, Scheduler, SequenceRequest

RECORDS = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 10, "maxLength": 60},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["one", "two", "three"]},
            "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"},
        },
        "required": ["name", "age", "kind", "code"],
        "additionalProperties": False,
    },
}


class Step(NamedTuple):
    wall_s: float
    cpu_s: float


class Bench:
    """Rounds of decode steps on one engine."""

    def __init__(self, engine: Engine, compiler: Compiler, eos: int, batch: int) -> None:
        info = engine.info
        sizes = TierSizes({"global": info.global_blocks, "window": info.window_blocks})
        cache = CacheManager(info.layout, sizes, info.fingerprint, prefix_cache=False)
        self._engine, self._compiler, self._eos, self._batch = engine, compiler, eos, batch
        self._scheduler = Scheduler(Limits(batch, 512), cache)

    def round(self, steps: int, *, held: bool, context: int) -> list[Step]:
        """So many steps of a full batch, its prompts done."""
        for key in range(self._batch):
            prompt = random_prompt(context, key, self._engine.info.vocab_size)
            constraint = None
            if held:
                constraint = self._compiler.constraint(json_schema_grammar(RECORDS), {self._eos})
            state = SamplingState(SamplingParams(), key, prompt, (), constraint)
            self._scheduler.add(SequenceRequest(key, prompt, [], 4 * steps, state, Priority.NORMAL))
        while self._step()[1] < self._batch:
            pass
        times = [self._step()[0] for _ in range(steps)]
        for key in range(self._batch):
            self._scheduler.remove(key)
        return times

    def _step(self) -> tuple[Step, int]:
        plan = self._scheduler.plan()
        assert plan is not None
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = self._scheduler.apply(self._engine.step(plan))
        return Step(time.perf_counter() - wall, time.process_time() - cpu), len(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    overrides = {"model.path": str(fetch("gemma-3-270m"))}
    settings = load_settings(environ={}, overrides=overrides)
    model = load_model(settings)
    engine = create_engine(settings, model)
    bench = Bench(engine, Compiler(model.tokenizer, engine.info.vocab_size), model.tokenizer.eos, args.batch)
    bench.round(5, held=True, context=args.context)
    rounds = [
        [_medians(bench.round(args.steps, held=held, context=args.context)) for held in (False, True)]
        for _ in range(args.rounds)
    ]
    free, held = ([pair[i].wall_s * 1e3 for pair in rounds] for i in (0, 1))
    line = {
        "measure": "grammar cost",
        "model": model.name,
        "weights": engine.info.weights,
        "batch": args.batch,
        "context": args.context,
        "step_ms": round(statistics.median(free), 2),
        "with_grammar_ms": round(statistics.median(held), 2),
        "ratio": round(statistics.median(b.wall_s / a.wall_s for a, b in rounds), 3),
        "cpu_ratio": round(statistics.median(b.cpu_s / a.cpu_s for a, b in rounds), 3),
        "hardware": describe(),
    }
    print(json.dumps(line))


def _medians(steps: list[Step]) -> Step:
    return Step(statistics.median(s.wall_s for s in steps), statistics.median(s.cpu_s for s in steps))


if __name__ == "__main__":
    main()
