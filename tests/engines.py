"""Driving an engine by hand: sequences on scattered blocks, run in chosen chunks and batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import Engine, ImageRows, SequenceInput, StepPlan
from wicore.engine.cpu import CpuEngine
from wicore.gemma3.checkpoint import open_checkpoint
from wicore.request import SamplingParams
from wicore.sampling import SamplingState

FIXTURES = Path(__file__).parent / "fixtures"
TINY = ("tiny", "tiny-mqa", "tiny-image")
GREEDY = SamplingParams(temperature=0.0)


def cpu_engine(path: Path, weights: str = "float32", kv: str = "float32", **options: int) -> CpuEngine:
    sizes = {"block_tokens": 16, "global_blocks": 256, "window_blocks": 256} | options
    return CpuEngine(open_checkpoint(path), weights=weights, kv=kv, **sizes)


@dataclass
class Row:
    """One sequence: which blocks it has and how far it is computed."""

    key: int
    blocks: NDArray[np.int32]
    start: int = 0
    params: SamplingParams = GREEDY
    output: list[int] = field(default_factory=list)
    global_blocks: NDArray[np.int32] | None = None
    """Where the global table differs from `blocks`; its first `streamed` are slots of host memory."""
    streamed: int = 0
    images: tuple[ImageRows, ...] = ()
    """Of the whole sequence; a step is told of those that it has positions of."""

    @property
    def global_table(self) -> NDArray[np.int32]:
        return self.blocks if self.global_blocks is None else self.global_blocks

    def input(self, tokens: Sequence[int] | NDArray[np.int32], *, sample: bool = False) -> SequenceInput:
        end = self.start + len(tokens)
        return SequenceInput(
            key=self.key,
            tokens=np.asarray(tokens, np.int32),
            start=self.start,
            global_table=self.global_table,
            window_table=self.blocks,
            window_first=0,
            sampling=SamplingState(self.params, 7, output=self.output) if sample else None,
            streamed=self.streamed,
            images=[image for image in self.images if image.start < end and image.end > self.start],
        )


def rows(engine: Engine, count: int, positions: int, seed: int = 0) -> list[Row]:
    """`count` sequences of up to `positions` tokens on disjoint, shuffled blocks."""
    need = -(-positions // engine.info.layout.block_tokens)
    total = min(engine.info.global_blocks, engine.info.window_blocks)
    order = np.random.default_rng(seed).permutation(total).astype(np.int32)
    assert count * need <= total
    return [Row(key, order[key * need : (key + 1) * need]) for key in range(count)]


def generate(
    engine: Engine, row: Row, prompt: Sequence[int], count: int, chunks: Iterable[int] = ()
) -> list[int]:
    """Greedy tokens of one sequence alone, its prompt cut into `chunks` (the rest in one)."""
    tokens = np.asarray(prompt, np.int32)
    for size in chunks:
        engine.step(StepPlan((row.input(tokens[:size]),)))
        row.start += size
        tokens = tokens[size:]
    while len(row.output) < count:
        output = engine.step(StepPlan((row.input(tokens, sample=True),))).outputs[row.key]
        assert output.token is not None
        row.start += len(tokens)
        row.output.append(output.token.id)
        tokens = np.array([output.token.id], np.int32)
    return row.output
