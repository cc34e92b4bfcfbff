"""Logits against Hugging Face transformers in float32, on checkpoints that transformers saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import text_reference
from tests.engines import FIXTURES, TINY, cpu_engine, rows
from wicore.engine.base import ImageRows, StepPlan
from wicore.engine.cpu import CpuEngine
from wicore.gemma3.checkpoint import open_checkpoint

TOLERANCE = 5e-6
WITH_IMAGES = 1e-5
CHUNKINGS = {
    "whole": [300],
    "halves": [150, 150],
    "ragged": [1, 63, 65, 1, 1, 127, 42],
    "token by token after 250": [250] + [1] * 50,
}


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module", params=TINY)
def checkpoint(request: pytest.FixtureRequest) -> tuple[CpuEngine, dict[str, NDArray[np.generic]]]:
    path = FIXTURES / request.param
    return cpu_engine(path), dict(np.load(path / "reference.npz"))


@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS.keys())
def test_logits_of_any_chunking_are_those_of_transformers(checkpoint, chunks: list[int]) -> None:
    engine, reference = checkpoint
    [row] = rows(engine, 1, 300)
    parts = []
    for size in chunks:
        tokens = reference["tokens"][row.start : row.start + size]
        parts.append(engine.logits(StepPlan((row.input(tokens),)))[row.key])
        row.start += size
    logits = np.concatenate(parts)
    assert relative_error(logits[reference["positions"]], reference["logits"]) <= TOLERANCE
    assert np.array_equal(logits.argmax(-1), reference["argmax"])


def test_logits_in_a_mixed_batch_are_those_of_transformers(checkpoint) -> None:
    engine, reference = checkpoint
    tokens = reference["tokens"]
    batch = rows(engine, 4, 300)
    # Four copies of the text at different points of it: two inside their prompt, two decoding.
    for row, done in zip(batch, (0, 70, 129, 200), strict=True):
        if done:
            engine.step(StepPlan((row.input(tokens[:done]),)))
        row.start = done
    sizes = (90, 60, 1, 1)
    plan = StepPlan(tuple(r.input(tokens[r.start : r.start + n]) for r, n in zip(batch, sizes, strict=True)))
    logits = engine.logits(plan)
    at = {int(position): i for i, position in enumerate(reference["positions"])}
    compared = 0
    for row in batch:
        for offset, found in enumerate(logits[row.key]):
            if (index := at.get(row.start + offset)) is not None:
                scale = np.abs(reference["logits"]).max()
                assert np.abs(found - reference["logits"][index]).max() / scale <= TOLERANCE
                compared += 1
    assert compared > 50


@pytest.mark.parametrize("name", TINY)
def test_kv_in_8_bits_stays_near_transformers(name: str) -> None:
    reference = np.load(FIXTURES / name / "reference.npz")
    engine = cpu_engine(FIXTURES / name, kv="int8")
    [row] = rows(engine, 1, 300)
    logits = engine.logits(StepPlan((row.input(reference["tokens"][:300]),)))[row.key]
    # Of all logits together: the largest error is one unlucky element's, on random weights.
    off = logits[reference["positions"]] - reference["logits"]
    assert np.sqrt(np.square(off).mean()) <= 0.005 * np.abs(reference["logits"]).max()
    assert (logits.argmax(-1) == reference["argmax"]).mean() >= 0.95


@pytest.mark.model
def test_logits_of_the_real_270m_are_those_of_transformers(gemma_270m: Path) -> None:
    reference = np.load(FIXTURES / "gemma-3-270m-reference.npz")
    tokens = reference["tokens"]
    engine = cpu_engine(gemma_270m, global_blocks=64, window_blocks=64)
    [row] = rows(engine, 1, len(tokens))
    logits = engine.logits(StepPlan((row.input(tokens),)))[row.key]
    expected = reference["logits"]
    found = logits[np.ix_(reference["positions"], reference["vocabulary"])]
    assert relative_error(found, expected) <= TOLERANCE
    assert np.array_equal(logits.argmax(-1), reference["argmax"])


@pytest.mark.model
def test_the_real_270m_in_8_bits_is_the_same_to_the_bit_in_any_chunking_and_company(gemma_270m: Path) -> None:
    tokens = np.load(FIXTURES / "gemma-3-270m-reference.npz")["tokens"][:300]
    engine = cpu_engine(gemma_270m, "int8", global_blocks=64, window_blocks=64)
    whole, row, other = rows(engine, 3, len(tokens))
    expected = engine.logits(StepPlan((whole.input(tokens),)))[whole.key]
    parts = []
    for size in (130, 1, 1, 67, 100, 1):
        company = (other.input(tokens[:3]), other.input(tokens[:1]))[size % 2 :][:1]
        plan = StepPlan((*company, row.input(tokens[row.start : row.start + size])))
        parts.append(engine.logits(plan)[row.key])
        row.start += size
    assert np.array_equal(np.concatenate(parts), expected)
    alone = engine.logits(StepPlan((whole.input(tokens[:1]),)))[whole.key]
    assert np.array_equal(alone, expected[:1])


# --- images -----------------------------------------------------------------------------------------

STARTS, IMAGE = (0, 50, 70, 203), 20
"""Images begin a text, stand side by side, and lie across a window's end."""


@pytest.mark.parametrize("name", TINY)
def test_the_text_model_written_down_once_more_is_that_of_transformers(name: str) -> None:
    reference = np.load(FIXTURES / name / "reference.npz")
    found = text_reference.logits(open_checkpoint(FIXTURES / name), reference["tokens"])
    assert relative_error(found[reference["positions"]], reference["logits"]) <= TOLERANCE


@pytest.mark.parametrize("chunks", [[300], [20, 70, 133, 77], [50, 40, 1, 1, 208]], ids=str)
def test_logits_with_images_are_those_of_the_text_model_written_down_once_more(checkpoint, chunks) -> None:
    engine, reference = checkpoint
    tokens, rng = reference["tokens"].astype(np.int32), np.random.default_rng(5)
    shape = (IMAGE, engine._config.hidden_size)
    images = tuple(ImageRows(start, 3 * rng.standard_normal(shape, np.float32)) for start in STARTS)
    expected = text_reference.logits(engine._checkpoint, tokens, images)
    for image in images:
        tokens[image.start : image.end] = -1
    [row] = rows(engine, 1, 300)
    row.images, parts = images, []
    for size in chunks:
        parts.append(engine.logits(StepPlan((row.input(tokens[row.start : row.start + size]),)))[row.key])
        row.start += size
    assert relative_error(np.concatenate(parts), expected) <= WITH_IMAGES


@pytest.mark.parametrize("chunks", [[120], [10, 4, 60, 46], [14, 6, 1, 99]], ids=str)
def test_logits_of_a_prompt_with_images_are_those_of_transformers(chunks: list[int]) -> None:
    reference = np.load(FIXTURES / "tiny-image" / "images.npz")
    engine = cpu_engine(FIXTURES / "tiny-image")
    [row] = rows(engine, 1, 120)
    row.images = tuple(map(ImageRows, reference["starts"].tolist(), reference["rows"]))
    parts = []
    for size in chunks:
        tokens = reference["tokens"][row.start : row.start + size]
        parts.append(engine.logits(StepPlan((row.input(tokens),)))[row.key])
        row.start += size
    found = np.concatenate(parts)[reference["positions"]]
    assert relative_error(found, reference["logits"]) <= TOLERANCE
