"""Record what a real model's attention does to its KV blocks, as a trace for `wicore kv simulate`.

`python -m benchmarks.record_kv_trace OUT.jsonl [--profile PROFILE.json]`: Gemma 3 270M serves a workload on
Python's own manual: conversations that go on after a pause, long documents that are asked about again and
again, and one-off questions. Each request becomes a line: when it came, its lengths, the ids of its blocks,
and the attention that each block drew, relative to an even spread, as mean over the request's steps. The
profile is the mean attention by relative place in the prompt, with the spread between blocks: for traces
without it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np

from wicore.config import load_settings
from wicore.engine.base import Engine
from wicore.engine.factory import create_engine
from wicore.hmt import CacheManager, TierSizes
from wicore.model import Model, load_model
from wicore.request import Priority, SamplingParams
from wicore.sampling import SamplingState
from wicore.scheduler import Limits, Scheduler, SequenceRequest

BLOCK = 64
OUTPUT = 12
PLACES = 32


class Turn(NamedTuple):
    at: float
    """Seconds."""
    talk: int
    """Conversation that it continues, or -1."""
    text: str
    fresh: bool
    """Whether the prompt is this text alone."""


def turns(count: int, rng: random.Random) -> list[Turn]:
    """The workload: a third each conversations, questions about long documents, one-off questions."""
    passages = [part for text in topics.values() for part in re.split(r"\n\n(?=\S)", text) if len(part) > 150]
    documents = sorted(topics.values(), key=len)[-12:-4]
    system = (
        "You answer questions about a programming language, briefly and with an example.\n\n" + passages[0]
    )
    found: list[Turn] = []
    at, talk = 0.0, 0
    while len(found) < count:
        at += rng.expovariate(1 / 4)
        kind = rng.random()
        if kind < 0.2:
            talk += 1
            when = at
            for number in range(rng.randint(2, 6)):
                said = rng.choice(passages)[: rng.randint(100, 1500)]
                found.append(Turn(when, talk, said if number else f"{system}\n\n{said}", number == 0))
                when += rng.expovariate(1 / 60)
        elif kind < 0.45:
            document = documents[min(int(rng.expovariate(0.5)), len(documents) - 1)][:24_000]
            found.append(Turn(at, -1, f"{document}\n\nQuestion: {rng.choice(passages)[:200]}\nAnswer:", True))
        else:
            found.append(Turn(at, -1, rng.choice(passages)[: rng.randint(150, 3000)], True))
    return sorted(found[:count])


class Recorder:
    """Serves requests one by one and keeps what they drew."""

    def __init__(self, model: Model, engine: Engine) -> None:
        info = engine.info
        sizes = TierSizes({"global": info.global_blocks, "window": info.window_blocks})
        self._cache = CacheManager(info.layout, sizes, info.fingerprint)
        self._scheduler = Scheduler(Limits(4, 512), self._cache)
        self._engine, self._model = engine, model
        self._ids: dict[bytes, int] = {}
        self._keys = 0

    def serve(self, at: float, prompt: list[int]) -> tuple[dict[str, Any], list[int]]:
        """(the trace's line, the output)."""
        self._keys += 1
        state = SamplingState(SamplingParams(temperature=0.7, top_p=0.9), self._keys)
        self._scheduler.add(SequenceRequest(self._keys, prompt, [], OUTPUT, state, Priority.NORMAL))
        blocks = -(-len(prompt) // BLOCK)
        drawn, steps = np.zeros(blocks), 0
        output: list[int] = []
        while len(output) < OUTPUT:
            plan = self._scheduler.plan()
            assert plan is not None
            result = self._engine.step(plan)
            mass = result.outputs[self._keys].mass
            if len(mass) >= blocks:
                drawn, steps = drawn + mass[:blocks] * len(mass), steps + 1
            output += [out.token.id for out in self._scheduler.apply(result)]
        self._scheduler.remove(self._keys)
        chain = self._cache.chain(prompt)
        names = [*chain.hashes, b"%d" % self._keys][:blocks]
        line = {
            "timestamp": round(at * 1000),
            "input_length": len(prompt),
            "output_length": OUTPUT,
            "block_tokens": BLOCK,
            "hash_ids": [self._ids.setdefault(name, len(self._ids)) for name in names],
            "attention": [round(float(value), 3) for value in drawn / steps],
        }
        return line, output


def record(count: int, device_tokens: int) -> Iterator[dict[str, Any]]:
    overrides = {"model.path": "gemma-3-270m", "hmt.block_tokens": BLOCK, "hmt.device_tokens": device_tokens}
    settings = load_settings([], environ={}, overrides={**overrides, "scheduler.max_batch": 4})
    model = load_model(settings)
    recorder = Recorder(model, create_engine(settings, model))
    talks: dict[int, list[int]] = {}
    for number, turn in enumerate(turns(count, random.Random(7)), 1):
        ids = model.tokenizer.encode(turn.text, bos=turn.fresh)
        prompt = ids if turn.fresh else [*talks[turn.talk], *ids]
        prompt = prompt[:8000]
        line, output = recorder.serve(turn.at, prompt)
        if turn.talk >= 0:
            talks[turn.talk] = [*prompt, *output]
        print(f"{number}/{count}: {len(prompt)} tokens", flush=True)
        yield line


def profile(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean attention by relative place in prompts of 16 blocks and more, and the spread of single blocks
    around it (sigma of the logarithm)."""
    grid = (np.arange(PLACES) + 0.5) / PLACES
    curves, rest = [], []
    long = [np.array(line["attention"]) for line in lines if len(line["attention"]) >= 16]
    for drawn in long:
        curves.append(np.interp(grid, (np.arange(len(drawn)) + 0.5) / len(drawn), drawn / drawn.mean()))
    mean = np.mean(curves, axis=0)
    for drawn in long:
        expected = np.interp((np.arange(len(drawn)) + 0.5) / len(drawn), grid, mean)
        rest += np.log(np.maximum(drawn / drawn.mean(), 1e-3) / expected)[1:-1].tolist()
    return {
        "profile": [round(float(value), 3) for value in mean],
        "spread": round(statistics.pstdev(rest), 3),
        "prompts": len(long),
        "model": "gemma-3-270m",
        "source": "benchmarks/record_kv_trace.py",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--device-tokens", type=int, default=160_000)
    given = parser.parse_args()
    lines = []
    with given.out.open("w", encoding="utf-8") as out:
        for line in record(given.requests, given.device_tokens):
            lines.append(line)
            out.write(json.dumps(line, separators=(",", ":")) + "\n")
    if given.profile:
        given.profile.write_text(json.dumps(profile(lines)) + "\n", "utf-8")


if __name__ == "__main__":
    main()
