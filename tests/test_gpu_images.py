"""Images in steps of the TensorRT engine: how steps are cut around them, and what is sent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.emulation import EmulatedDevice
from tests.engines import FIXTURES, rows
from tests.gpu_engines import engine_on
from wicore.engine.base import ImageRows, KVLayout, SequenceInput, StepPlan
from wicore.engine.tensorrt.block_tables import BlockTables
from wicore.engine.tensorrt.image_rows import ImageUpload
from wicore.engine.tensorrt.limits import Limits
from wicore.engine.tensorrt.passes import cut
from wicore.engine.tensorrt.step_arrays import listed, pass_arrays, tiles
from wicore.gemma3.checkpoint import open_checkpoint

LAYOUT = KVLayout(16, 1, 1, 1, 16, 64, "float16")
TABLE = np.arange(64, dtype=np.int32)


def image(start: int, count: int, hidden: int = 4, seed: int = 0) -> ImageRows:
    values = np.random.default_rng((seed, start)).standard_normal((count, hidden), np.float32)
    return ImageRows(start, values)


def sequence(key: int, start: int, count: int, images: tuple[ImageRows, ...] = ()) -> SequenceInput:
    """Ids 5, 6 and so on, negative in images."""
    tokens = np.arange(5, 5 + count, dtype=np.int32)
    for one in images:
        tokens[max(0, one.start - start) : one.end - start] *= -1
    return SequenceInput(key, tokens, start, TABLE, TABLE, 0, None, images=images)


# --- passes -----------------------------------------------------------------------------------------


@st.composite
def sequences(draw: st.DrawFn) -> list[SequenceInput]:
    """Chunks with images of up to 20 tokens, of which the first may have begun before."""
    found = []
    for key in range(draw(st.integers(1, 6))):
        start, images = draw(st.integers(0, 40)), []
        at = start - draw(st.integers(0, min(start, 19)))
        for text, tokens in draw(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), max_size=4)):
            first = at + text
            if first + tokens > start:
                images.append(image(first, tokens))
            at = first + tokens
        end = max(start + 1, at + draw(st.integers(0, 30)))
        found.append(sequence(key, start, end - start, tuple(images)))
    return found


@settings(max_examples=200, deadline=None)
@given(sequences(), st.integers(20, 70), st.booleans())
def test_one_pass_has_all_of_an_image_and_every_token_has_its_place(asked, capacity, invariant) -> None:
    passes = list(cut(asked, capacity=capacity, decode_capacity=16, invariant=invariant))
    done = dict.fromkeys((s.key for s in asked), 0)
    for work in passes:
        assert work.pieces
        assert work.rows <= capacity
        assert len(work.pieces) <= 16
        assert not (work.decode and list(work.images()))
        assert not invariant or work.decode != work.by_row
        for piece in work.pieces:
            assert piece.first == done[piece.sequence.key]
            done[piece.sequence.key] += piece.count
            for one in piece.sequence.images:
                begin, end = max(one.start, piece.sequence.start), one.end
                overlap = min(end, piece.start + piece.count) - max(begin, piece.start)
                assert overlap <= 0 or overlap == end - begin
    assert done == {s.key: len(s.tokens) for s in asked}


@settings(max_examples=100, deadline=None)
@given(sequences(), st.booleans())
def test_every_row_of_an_image_knows_where_it_ends_and_what_enters_there(asked, invariant) -> None:
    tables = BlockTables(asked, LAYOUT, np.zeros(4096, np.int32))
    for work in cut(asked, capacity=64, decode_capacity=16, invariant=invariant):
        arrays = pass_arrays(work, tables, work.rows, len(work.pieces))
        ends = np.zeros(work.rows, np.int32) if arrays.image_end is None else arrays.image_end
        values = np.full((work.rows, 4), np.nan, np.float32)
        for first, _, stretch in work.images():
            values[first : first + len(stretch)] = stretch
        row = 0
        for piece in work.pieces:
            for position in range(piece.start, piece.start + piece.count):
                inside = [i for i in piece.sequence.images if i.start <= position < i.end]
                assert ends[row] == (inside[0].end if inside else 0)
                assert arrays.positions[row] == position
                if inside:
                    assert arrays.ids[row] == 0
                    np.testing.assert_array_equal(values[row], inside[0].rows[position - inside[0].start])
                else:
                    assert arrays.ids[row] > 0
                    assert np.isnan(values[row]).all()
                row += 1
        if work.by_row:
            assert listed(work).tolist() == list(range(work.rows))
            assert not len(tiles(work))


def test_a_step_of_text_alone_sends_nothing_for_images() -> None:
    [work] = cut([sequence(0, 0, 9)], capacity=64, decode_capacity=4, invariant=False)
    tables = BlockTables([work.pieces[0].sequence], LAYOUT, np.zeros(64, np.int32))
    assert pass_arrays(work, tables, 9, 1).image_end is None


def test_an_image_larger_than_a_pass_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence 3: an image of 65 tokens, and a pass has 64 rows"):
        list(cut([sequence(3, 0, 70, (image(2, 65),))], capacity=64, decode_capacity=4, invariant=False))


@pytest.mark.parametrize("invariant", [False, True])
def test_buffers_hold_a_whole_image_and_decode_steps_are_as_without(invariant: bool) -> None:
    sizes = {"max_batch": 4, "token_budget": 64, "max_context": 1024, "invariant": invariant}
    text, images = (Limits.of(LAYOUT, **sizes, image_tokens=tokens) for tokens in (0, 256))
    assert images.rows == 256 > text.rows
    assert images.decode_rows == text.decode_rows
    assert not invariant or images.listed >= images.rows


@pytest.mark.parametrize("room", [0, 40, 48], ids=["none", "too little", "as much as needed"])
def test_more_images_than_buffers_arrive_each_at_its_place(emulated, room: int) -> None:
    upload, stream = ImageUpload(emulated, room), emulated.stream()
    target = emulated.allocate(9 * 48, "rows")
    sent = [image(i, 3) for i in range(9)]
    for i, one in enumerate(sent):
        upload.send(stream, one.rows, target.address + 48 * i)
    np.testing.assert_array_equal(
        target.array.view(np.float32).reshape(27, 4), np.concatenate([one.rows for one in sent])
    )


def test_steps_of_text_launch_the_same_kernels_whether_the_model_takes_images_or_not() -> None:
    sighted, blind = (open_checkpoint(FIXTURES / "tiny-image") for _ in range(2))
    blind.config, counts = replace(blind.config, vision=None), []
    for source in (sighted, blind):
        device = EmulatedDevice(capability=(8, 0))
        found = engine_on(device, source)
        [row] = rows(found, 1, 160)
        launched = []
        for first, end in ((0, 100), (100, 101), (101, 102), (102, 103)):
            row.start, before = first, device._launches
            found.step(StepPlan((row.input(np.arange(5 + first, 5 + end), sample=True),)))
            launched.append(device._launches - before)
        counts.append(launched)
        found.close()
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0
