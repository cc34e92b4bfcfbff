"""Steps of the TensorRT engine with images, on an emulated device: what rows of an image see and give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.emulation import EmulatedDevice
from tests.engines import FIXTURES, Row, rows
from tests.gpu_engines import engine_on, hopper_choices
from tests.numpy_segments import NumpySegments
from tests.test_gpu_images import image
from tests.test_parity import relative_error
from wicore.engine.base import ImageRows, StepPlan
from wicore.engine.tensorrt.engine import TensorrtEngine
from wicore.engine.tensorrt.networks import SegmentShape
from wicore.gemma3.checkpoint import Checkpoint, open_checkpoint

TOLERANCE = 1e-2


def checkpoint() -> Checkpoint:
    """A model whose images take more tokens than a block has; its tower, which gives fewer, is not used."""
    found = open_checkpoint(FIXTURES / "tiny-image")
    assert found.config.vision is not None
    found.config = replace(found.config, vision=replace(found.config.vision, tokens=20))
    return found


def with_segments() -> TensorrtEngine:
    segments = NumpySegments(
        SegmentShape.of(checkpoint().config), (64, 256), kinds=("first", "middle", "last")
    )
    return engine_on(EmulatedDevice(capability=(8, 0)), checkpoint(), segments=segments)


MODES: Mapping[str, Callable[[], TensorrtEngine]] = {
    "kernels": lambda: engine_on(EmulatedDevice(capability=(8, 0)), checkpoint()),
    "Hopper": lambda: engine_on(EmulatedDevice(), checkpoint(), tune=hopper_choices(checkpoint().config)),
    "TensorRT": with_segments,
    "invariant": lambda: engine_on(EmulatedDevice(capability=(8, 0)), checkpoint(), invariant=True),
}


@pytest.fixture(scope="module", params=MODES)
def engine(request: pytest.FixtureRequest) -> Iterator[TensorrtEngine]:
    found = MODES[request.param]()
    yield found
    found.close()


def embedded(engine: TensorrtEngine, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """What the embeddings of ids are in the first layer."""
    table = checkpoint().rows("model.embed_tokens.weight", ids).astype(np.float16)
    scaled: NDArray[np.float32] = table.astype(np.float32) * np.float32(table.shape[1] ** 0.5)
    return scaled


def logits(
    engine: TensorrtEngine, row: Row, ids: NDArray[np.int32], images: tuple[ImageRows, ...], cuts: list[int]
) -> NDArray[np.float32]:
    """After every token, with the ids of images negative."""
    tokens, parts = ids.copy(), []
    for one in images:
        tokens[one.start : one.end] = -7
    for first, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        row.start = first
        inside = tuple(one for one in images if one.start < end and one.end > first)
        asked = replace(row.input(tokens[first:end]), images=inside)
        parts.append(engine.logits(StepPlan((asked,)))[row.key])
    return np.concatenate(parts)


IDS = np.random.default_rng(5).integers(5, 500, 150).astype(np.int32)


def test_logits_of_a_prompt_with_images_are_those_of_transformers(engine) -> None:
    reference = np.load(FIXTURES / "tiny-image" / "images.npz")
    images = tuple(map(ImageRows, reference["starts"].tolist(), reference["rows"]))
    [row] = rows(engine, 1, 160)
    for cuts in ([], [14, 74]):
        found = logits(engine, row, reference["tokens"], images, cuts)[reference["positions"]]
        assert relative_error(found, reference["logits"]) < TOLERANCE


def test_an_image_of_one_token_with_the_row_of_an_embedding_is_that_token(engine) -> None:
    [row] = rows(engine, 1, 160)
    expected = logits(engine, row, IDS, (), [])
    ones = tuple(ImageRows(at, embedded(engine, IDS[at : at + 1])) for at in (0, 3, 63, 64, 120, 149))
    for cuts in ([], [63, 64, 140]):
        assert relative_error(logits(engine, row, IDS, ones, cuts), expected) < 2e-3


def test_tokens_of_an_image_see_those_behind_them_and_text_does_not(engine) -> None:
    [row] = rows(engine, 1, 160)
    hidden = checkpoint().config.hidden_size
    one = image(50, 20, hidden)
    other = ImageRows(one.start, one.rows.copy())
    other.rows[-1] += 3
    before, after = (logits(engine, row, IDS, (i,), []) for i in (one, other))
    changed = np.abs(before - after).max(1) > 1e-3 * np.abs(before).max()
    assert changed[50:].all()
    np.testing.assert_array_equal(before[:50], after[:50])


def test_images_give_the_same_however_a_prompt_is_cut_around_them(engine) -> None:
    [row] = rows(engine, 1, 160)
    hidden = checkpoint().config.hidden_size
    images = (image(0, 20, hidden), image(30, 20, hidden), image(50, 20, hidden), image(100, 20, hidden))
    whole = logits(engine, row, IDS, images, [])
    for cuts in ([20, 70], [25, 30, 50, 90], [70, 71, 72, 99, 100, 120, 149]):
        found = logits(engine, row, IDS, images, cuts)
        if engine._runner._parts.invariant:
            np.testing.assert_array_equal(found, whole)
        assert relative_error(found, whole) < TOLERANCE


def test_an_image_whose_first_tokens_are_there_already_goes_on(engine) -> None:
    [row] = rows(engine, 1, 160)
    one = image(40, 20, checkpoint().config.hidden_size)
    whole = logits(engine, row, IDS, (one,), [])
    tokens = IDS.copy()
    tokens[40:60] = -7
    for first in (48, 59):  # a block's border, and the last token alone
        row.start = first
        for end in (60, 150):
            asked = replace(row.input(tokens[first:end]), images=(one,))
            found = engine.logits(StepPlan((asked,)))[row.key]
            assert relative_error(found, whole[first:end]) < TOLERANCE


def test_images_share_a_step_with_text_of_others(engine) -> None:
    batch, hidden = rows(engine, 3, 160), checkpoint().config.hidden_size
    images = (image(10, 20, hidden), image(44, 20, hidden))
    alone = logits(engine, batch[0], IDS[:70], images, [])
    text = logits(engine, batch[1], IDS[:33], (), [])
    single = logits(engine, batch[2], IDS[:1], (), [])
    tokens = IDS[:70].copy()
    tokens[10:30] = tokens[44:64] = -7
    for row in batch:
        row.start = 0
    asked = replace(batch[0].input(tokens), images=images)
    found = engine.logits(StepPlan((asked, batch[1].input(IDS[:33]), batch[2].input(IDS[:1]))))
    for key, expected in enumerate((alone, text, single)):
        assert relative_error(found[key], expected) < TOLERANCE


def test_text_after_images_is_decoded_by_the_graphs_of_text(engine) -> None:
    [row] = rows(engine, 1, 160)
    one = image(10, 20, checkpoint().config.hidden_size)
    tokens = IDS[:40].copy()
    tokens[10:30] = -7
    expected = logits(engine, row, IDS[:48], (one,), [])[40:]
    row.start = 0
    engine.step(StepPlan((replace(row.input(tokens), images=(one,)),)))
    for position in range(40, 48):
        row.start = position
        step = StepPlan((row.input(IDS[position : position + 1], sample=True),))
        token = engine.step(step).outputs[row.key].token
        best = expected[position - 40]
        assert best[token.id] >= best.max() - TOLERANCE * np.abs(best).max()
    assert (1, True) in engine._runner._graphs
