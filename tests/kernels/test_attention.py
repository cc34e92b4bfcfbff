"""Attention kernels against float64 numpy, over paged pools in a random order of blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.attention_steps import Blocks, Step, Text, half, layout_of, mass_only, model
from wicore.engine.base import Pool
from wicore.engine.tensorrt.attention import Attention
from wicore.engine.tensorrt.attention_settings import DecodeSetting, MmaSetting
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.prompt_attention import prompt_tiles
from wicore.errors import EngineError
from wicore.gemma3.config import Gemma3Config
from wicore.gemma3.rope import rope_table

POOLS: tuple[Pool, Pool] = ("global", "window")
SHAPES = [
    ((4, 2, 16), "float16"),
    ((4, 2, 16), "int8"),
    pytest.param((4, 4, 32), "float16", marks=pytest.mark.thorough),
    pytest.param((8, 2, 64), "int8", marks=pytest.mark.thorough),
    ((4, 2, 128), "float16"),
    ((4, 1, 256), "float16"),
    pytest.param((4, 1, 256), "int8", marks=pytest.mark.thorough),
    pytest.param((3, 1, 48), "float16", marks=pytest.mark.thorough),
]
"""heads, kv_heads, head_dim; how KV is stored. Few, as each is compiled; other tests use some of them."""


SAME_DEVICE = [HealthCheck.function_scoped_fixture]
"""A device may serve many examples."""


def assert_same_bits(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
@pytest.mark.parametrize("pool", ["global", "window"])
def test_single_rows_attend_to_what_they_see(device: Device, shape: Any, dtype: str, pool: Any) -> None:
    config = model(*shape)
    step = Step(
        device,
        config,
        layout_of(config, 16, dtype),
        [Text([0]), Text([300]), Text([47]), Text([15, 16])],
        padding=2,
    )
    step.check(step.decode(pool, 1), pool, 1)
    step.close()


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
@pytest.mark.parametrize("pool", ["global", "window"])
def test_prompt_chunks_attend_to_what_they_see(device: Device, shape: Any, dtype: str, pool: Any) -> None:
    config = model(*shape)
    sequences = [Text(range(0, 5)), Text(range(37, 140)), Text(range(70, 71))]
    step = Step(device, config, layout_of(config, 16, dtype), sequences, padding=2)
    step.check(step.prefill(pool, 1), pool, 1)
    step.close()


@pytest.mark.parametrize(
    ("block_tokens", "dtype"),
    [
        (32, "float16"),
        *(pytest.param(*wide, marks=pytest.mark.thorough) for wide in ((64, "int8"), (128, "float16"))),
    ],
)
def test_blocks_may_be_larger(device: Device, block_tokens: int, dtype: str) -> None:
    config = model(4, 2, 16, window=100)
    step = Step(
        device,
        config,
        layout_of(config, block_tokens, dtype),
        [Text(range(150, 170)), Text([31]), Text([290])],
    )
    for pool in POOLS:
        step.check(step.decode(pool, 1), pool, 1)
        step.check(step.prefill(pool, 1), pool, 1)
    step.close()


def spans(most: int) -> DecodeSetting:
    return DecodeSetting(tiles=2, span=128, max_spans=most, merge_parts=2, blocks=1)


@pytest.mark.parametrize(("dtype", "most"), [("float16", 2), ("int8", 4)])
def test_a_long_row_is_cut_into_no_more_spans_than_there_is_room_for(
    device: Device, dtype: str, most: int
) -> None:
    config = model(4, 2, 16, window=600)
    step = Step(
        device,
        config,
        layout_of(config, 16, dtype),
        [Text([1500]), Text([255, 256]), Text([900])],
        decode_setting=spans(most),
    )
    for pool in POOLS:
        step.check(step.decode(pool), pool)
    step.check_mass(range(step.rows))
    step.close()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_start_of_a_table_may_be_host_memory(device: Device, dtype: str) -> None:
    config = model(4, 2, 16)
    sequences = [Text(range(200, 210), streamed=9), Text([40]), Text([70], streamed=4)]
    step = Step(device, config, layout_of(config, 16, dtype), sequences)
    step.check(step.decode("global"), "global")
    step.check_mass(range(step.rows))
    step.check(step.prefill("global"), "global")
    step.close()


def test_where_blocks_lie_changes_nothing(device: Device) -> None:
    config = model(4, 2, 16)
    found = []
    for place, streamed in ((0, 0), (1, 0), (2, 7)):
        step = Step(
            device,
            config,
            layout_of(config),
            [Text([3]), Text(range(180, 200), streamed=streamed)],
            place=place,
        )
        found.append([step.decode(pool) for pool in POOLS] + [step.prefill(pool) for pool in POOLS])
        step.close()
    for other in found[1:]:
        assert_same_bits(found[0], other)


def test_a_row_is_the_same_whoever_shares_the_launch(device: Device) -> None:
    """More than one group of listed rows; some listed alone, in another order, or among padding."""
    config = model(4, 2, 16)
    sequences = [Text(range(100, 166)), Text([500]), Text([17]), Text([63, 64])]
    step = Step(device, config, layout_of(config), sequences, padding=1)
    for pool in POOLS:
        together = step.decode(pool)
        step.check(together, pool)
        for rows in ([67], [69, 68, 2, -1, 66], [65, -1]):
            step.clear()
            alone = step.decode(pool, indices=rows)
            wanted = [row for row in rows if row >= 0]
            assert_same_bits([together[wanted]], [alone[wanted]])
            others = np.delete(alone, wanted, 0)
            assert np.isnan(others).all(), "a row that was not listed is left alone"
    step.close()


@st.composite
def sequences(draw: st.DrawFn) -> Text:
    first, rows = draw(st.integers(0, 300)), draw(st.integers(1, 3))
    ends = first // 16
    return Text(range(first, first + rows), streamed=draw(st.integers(0, ends)) if draw(st.booleans()) else 0)


@given(
    st.lists(sequences(), min_size=1, max_size=4), st.integers(1, 300), st.integers(0, 3), st.integers(0, 9)
)
@settings(max_examples=20, suppress_health_check=SAME_DEVICE)
def test_any_rows_attend_to_what_they_see(
    device: Device, found: list[Text], window: int, padding: int, seed: int
) -> None:
    config = model(4, 2, 16, window=window)
    step = Step(device, config, layout_of(config), found, seed=seed, padding=padding)
    for pool in POOLS:
        step.check(step.decode(pool), pool)
        step.check(step.prefill(pool), pool)
    step.check_mass(range(step.rows - padding))
    step.close()


@given(cuts=st.lists(st.integers(1, 149), max_size=6), first=st.integers(0, 70))
@settings(max_examples=10, suppress_health_check=SAME_DEVICE)
def test_where_a_prompt_is_cut_changes_nothing(device: Device, cuts: list[int], first: int) -> None:
    config = model(4, 2, 16, window=80)
    step = Step(device, config, layout_of(config), [Text(range(first, first + 150))])
    ends = sorted({*cuts, 150})
    chunks = [(start, end - start, 0, first + start) for start, end in zip([0, *ends], ends, strict=False)]
    for pool in POOLS:
        whole = step.prefill(pool)
        step.clear()
        assert_same_bits([whole], [step.prefill(pool, chunks=chunks)])
    step.close()


def test_tokens_of_an_image_see_all_of_it(device: Device) -> None:
    config = model(4, 2, 16, window=40)
    image = [(70, 110), (130, 134)]
    step = Step(device, config, layout_of(config), [Text(range(60, 140), images=image), Text([5])])
    for pool in POOLS:
        step.check(step.prefill(pool), pool)
        step.check(step.decode(pool), pool)
    step.close()


def test_tiles_end_at_fixed_positions_and_the_longest_come_first() -> None:
    tiles = prompt_tiles([(0, 100, 0, 30), (100, 1, 2, 64)])
    assert tiles.tolist() == [[98, 2, 0, 128], [34, 64, 0, 64], [100, 1, 2, 64], [0, 34, 0, 30]]
    assert prompt_tiles([]).shape == (0, 4)


# --- mass ---


@pytest.mark.parametrize(("shape", "block_tokens"), [((4, 2, 16), 16), ((4, 2, 16), 32), ((4, 1, 256), 16)])
def test_mass_is_what_heads_and_layers_gave_each_block(device: Device, shape: Any, block_tokens: int) -> None:
    config = model(*shape)
    sequences = [Text([0]), Text(range(90, 94)), Text([333])]
    step = Step(device, config, layout_of(config, block_tokens), sequences, padding=3)
    step.check_mass(range(6))
    step.close()


def test_mass_is_summed_over_passes_until_it_is_cleared(device: Device) -> None:
    config = model(4, 2, 16)
    step = Step(device, config, layout_of(config), [Text(range(40, 44)), Text([100])])
    once = step.mass()
    a, stream = step.attention, step.memory.stream
    twice = step.memory.read(a.mass(stream, step.rows, step.tables), once.shape, np.float32)
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)
    np.testing.assert_array_equal(step.mass(), once)
    step.close()


def test_mass_can_be_had_without_output(device: Device) -> None:
    """As for the last row of a prompt chunk, whose output is the tensor cores' business."""
    config = model(4, 2, 16)
    step = Step(device, config, layout_of(config), [Text(range(120, 130)), Text([50]), Text(range(20, 30))])
    listed = [mass_only(9), 10, mass_only(20)]
    np.testing.assert_allclose(
        step.mass(listed), sum(step.expected_mass(row) for row in (9, 10, 20)), rtol=2e-3, atol=2e-4
    )
    step.clear()
    for pool in POOLS:
        out = step.decode(pool, indices=listed)
        assert np.isnan(np.delete(out, 10, 0)).all()
        step.check(out, pool, rows=[10])
    step.close()


def test_mass_that_does_not_fit_leaves_out_earlier_rows_first(device: Device) -> None:
    config = model(4, 2, 16)
    step = Step(device, config, layout_of(config), [Text(range(40, 44)), Text([100])], mass_blocks=13)
    np.testing.assert_allclose(
        step.mass(), sum(step.expected_mass(row) for row in (0, 3, 4)), rtol=2e-3, atol=2e-4
    )
    step.close()


def test_attention_is_the_same_without_mass(device: Device) -> None:
    config = model(4, 2, 16)
    step = Step(device, config, layout_of(config), [Text([140]), Text([3])])
    assert_same_bits([step.decode("global", mass=True)], [step.decode("global", mass=False)])
    step.close()


# --- before attention ---


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_new_rows_are_normed_and_rotated_and_their_kv_stored(device: Device, shape: Any, dtype: str) -> None:
    config = model(*shape)
    layout = layout_of(config, 16, dtype)
    sequences = [Text(range(13, 19)), Text([0]), Text([100_000 % 700])]
    step = Step(device, config, layout, sequences, padding=2)
    rng = np.random.default_rng(3)
    heads, kv, width = config.heads, config.kv_heads, config.head_dim
    qkv = half(rng, step.rows, heads + 2 * kv, width, scale=3.0)
    norms = 1 + 0.3 * rng.standard_normal((2, width)).astype(np.float32)
    a, m = step.attention, step.memory
    q_norm, k_norm, qkv_address, q = (
        m.upload(norms[0]),
        m.upload(norms[1]),
        m.upload(qkv),
        m.allocate(step.q.nbytes),
    )
    a.rope(m.stream, step.rows, step.tables)
    for pool in POOLS:
        a.append(m.stream, step.rows, pool, 1, qkv_address, q_norm, k_norm, q, step.tables)
        expected_q, k = rotated(config, pool, step.positions, qkv.astype(np.float64), norms)
        v = qkv[:, heads + kv :].astype(np.float64)
        valid = step.positions >= 0
        found = m.read(q, step.q.shape, np.float16)
        np.testing.assert_allclose(found[valid], expected_q[valid], rtol=2e-3, atol=2e-3)
        assert np.isnan(found[~valid]).all()
        before = step.blocks[pool]
        after = Blocks(layout, pool, len(before.data))
        after.data[:] = m.read(step.device_address[pool], before.data.shape, np.uint8)
        for row in np.flatnonzero(valid):
            position = int(step.positions[row])
            found_at = step.entry(int(step.row_seq[row]), pool, position // layout.block_tokens)
            assert found_at is not None
            place = found_at[1], position % layout.block_tokens
            for part, vectors in enumerate((k, v)):
                stored = after.read(*place, layer=1, part=part)[:, 0]
                step_of_code = np.abs(vectors[row]).max(-1, keepdims=True) / 127
                close = 0.52 * step_of_code if dtype == "int8" else 2e-3 + 1e-3 * np.abs(vectors[row])
                assert (np.abs(stored - vectors[row]) <= close).all()
                after.put_back(before, *place, layer=1, part=part)
        np.testing.assert_array_equal(after.data, before.data, "a byte of another vector was changed")
    step.close()


def rotated(
    config: Gemma3Config, pool: Any, positions: np.ndarray, qkv: np.ndarray, norms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """q [rows][heads][head_dim] and k [rows][kv_heads][head_dim] as transformers computes them."""
    cos, sin = (
        table[:, None].astype(np.float64) for table in rope_table(config, pool, np.maximum(positions, 0))
    )
    x = qkv[:, : config.heads + config.kv_heads]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps)
    x[:, : config.heads] *= norms[0]
    x[:, config.heads :] *= norms[1]
    low, high = np.split(x, 2, axis=-1)
    x = x * cos + np.concatenate((-high, low), -1) * sin
    return x[:, : config.heads], x[:, config.heads :]


def test_a_graph_follows_the_contents_of_its_arrays(device: Device) -> None:
    """The same launches serve other positions, as in a decode step's graph."""
    config = model(4, 2, 16)
    step = Step(device, config, layout_of(config), [Text([10, 40, 60, 61]), Text([20, 199])])
    a, m = step.attention, step.memory

    def launches() -> None:
        a.schedule(m.stream, step.rows, step.tables)
        a.decode(m.stream, step.rows, "window", 0, step.q_address, step.out, step.tables)

    graph = device.capture(m.stream, launches)
    for positions in (step.positions, np.array([3, 61, -1, -1, 120, -1], np.int32)):
        device.copy(step.tables.positions, positions.ctypes.data, positions.nbytes, m.stream)
        step.positions = positions
        step.clear()
        graph.launch(m.stream)
        step.check(step.output(), "window")
    graph.close()
    step.close()


def test_what_a_step_writes_is_never_read_early(device: Device) -> None:
    """Each item says below which position nothing is new; a chunk too long to look through says 0."""
    config = model(4, 2, 16)
    texts = [Text(range(40, 43)), Text([0]), Text(range(100, 165)), Text([7, 8])]
    step = Step(device, config, layout_of(config), texts)
    step.attention.schedule(step.memory.stream, step.rows, step.tables)
    scratch, group_bytes = step.attention._items, step.attention._group_items * 48
    rows: dict[int, int] = {}
    for group, listed in ((0, 64), (1, step.rows - 64)):
        counts = step.memory.read(step.attention._counts, [2, 2], np.int32)[0]
        items = step.memory.read(scratch + group * group_bytes, [int(counts[group]), 12], np.int32)
        rows |= {int(item[0]): int(item[10]) for item in items}
        assert len(items) >= listed
    expected = [40] * 3 + [0] + [100] * 64 + [0] + [7] * 2
    assert [rows[row] for row in range(step.rows)] == expected
    step.close()


@pytest.mark.parametrize(
    ("shape", "block_tokens", "dtype"),
    [
        ((32, 2, 64), 16, "float16"),
        ((4, 2, 24), 16, "float16"),
        ((4, 2, 32), 8, "int8"),
        ((4, 2, 32), 16, "float32"),
    ],
)
def test_shapes_it_cannot_do_are_refused(device: Device, shape: Any, block_tokens: int, dtype: str) -> None:
    config = model(*shape)
    with pytest.raises(EngineError, match="expected at most 8 query heads"):
        Attention(device, config, layout_of(config, block_tokens, dtype), 1, 1, 1)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_every_gemma_fits_on_every_card(capability: tuple[int, int], dtype: str) -> None:
    for heads, kv_heads, width in ((4, 1, 256), (8, 4, 256), (16, 8, 256), (32, 16, 128)):
        config = model(heads, kv_heads, width)
        layout = layout_of(config, 16, dtype)
        most = {8: 99, 9: 227, 10: 227, 12: 99}[capability[0]] << 10
        if capability == (8, 0):
            most = 163 << 10
        assert DecodeSetting.of(config, layout, capability).shared_bytes(config, layout) <= most
        assert MmaSetting.of(config, layout, capability).shared_bytes(config, layout) <= most
