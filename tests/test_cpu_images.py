"""Images on the CPU engine: what of its own it does with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest

from tests.engines import FIXTURES, cpu_engine, rows
from wicore.engine.base import ImageRows, StepPlan
from wicore.engine.cpu import CpuEngine
from wicore.engine.cpu import engine as cpu
from wicore.gemma3.config import VisionConfig

TOWER = VisionConfig(24, 2, 2, 32, 56, 14, 64, 1e-6, 509, 510, 511)


@pytest.fixture(scope="module")
def engine() -> Iterator[CpuEngine]:
    found = cpu_engine(FIXTURES / "tiny", "int8")
    yield found
    found.close()


def prompt(places: Mapping[int, int], length: int = 400) -> tuple[np.ndarray, tuple[ImageRows, ...]]:
    """Ids, and images of so many tokens at these places."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 500, length).astype(np.int32)
    images = tuple(ImageRows(at, rng.standard_normal((n, 64), np.float32)) for at, n in places.items())
    for image in images:
        tokens[image.start : image.end] = -1
    return tokens, images


@pytest.mark.parametrize(("chunk", "score_bytes"), [(16, 2**25), (512, 4096), (64, 2**25)])
def test_passes_over_the_stack_never_cut_an_image(engine, monkeypatch, chunk, score_bytes) -> None:
    tokens, images = prompt({3: 20, 60: 8, 100: 64, 164: 64, 300: 1, 399: 1})
    whole, cut = rows(engine, 2, 400)
    whole.images = cut.images = images
    expected = engine.logits(StepPlan((whole.input(tokens),)))[whole.key]
    monkeypatch.setattr(cpu, "_CHUNK", chunk)
    monkeypatch.setattr(cpu, "_SCORE_BYTES", score_bytes)
    passes = list(engine._runs(StepPlan((cut.input(tokens),)).sequences))
    assert len(passes) > 5
    begun = [(run.starts[0], run.starts[0] + run.tokens.shape[1]) for run in passes]
    for image in images:
        assert sum(start < image.end and image.start < end for start, end in begun) == 1
    assert np.array_equal(engine.logits(StepPlan((cut.input(tokens),)))[cut.key], expected)


def test_text_alone_is_batched_as_if_there_were_no_images(engine) -> None:
    decoding = rows(engine, 3, 40)
    for row in decoding:
        row.start = 5
    [run] = engine._runs([row.input([7]) for row in decoding])
    assert len(run.inputs) == 3
    assert run.images == ()


@pytest.mark.parametrize("shape", [(4, 63), (4, 65), (4,)], ids=str)
def test_rows_of_another_width_are_refused(engine, shape) -> None:
    [row] = rows(engine, 1, 40)
    images = [ImageRows(0, np.zeros(shape, np.float32))]
    plan = StepPlan((replace(row.input([-1] * 4), images=images),))
    with pytest.raises(ValueError, match=r"rows of an image have shape .*, not \[tokens, 64\]"):
        engine.step(plan)
