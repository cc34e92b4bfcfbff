"""What every engine owes (wicore/engine/base.py). One parameter set an engine; the tests are shared."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engines import FIXTURES, TINY, Row, cpu_engine, generate, rows
from tests.gpu_engines import emulated_engine
from tests.test_sampling import Allowing
from wicore.engine.base import Engine, ImageRows, Pool, SequenceInput, StepPlan
from wicore.errors import EngineError
from wicore.request import SamplingParams

ENGINES: dict[str, Callable[[], Engine]] = {
    f"cpu {weights} {name}": (lambda name=name, weights=weights: cpu_engine(FIXTURES / name, weights))
    for name in TINY
    for weights in ("float32", "int8")
}
POOLS: tuple[Pool, Pool] = ("global", "window")
ENGINES["cpu int8 tiny, int8 kv"] = lambda: cpu_engine(FIXTURES / "tiny", "int8", "int8")
ENGINES["tensorrt emulated tiny"] = lambda: emulated_engine(FIXTURES / "tiny", invariant=True)
PROMPT = np.random.default_rng(3).integers(5, 500, 210).astype(np.int32)


def slow(engine: Engine) -> bool:
    """Whether it runs a GPU's kernels on the CPU."""
    return engine.info.device == "emulation"


def examples(engine: Engine) -> settings:
    count = 2 if slow(engine) else 12
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=ENGINES.keys())
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]()


@pytest.fixture(scope="module")
def host(engine: Engine) -> dict[Pool, np.ndarray]:
    """The engine's host memory, for the one time that it gives it."""
    return {pool: engine.host_memory(pool, 40) for pool in POOLS}


@pytest.fixture(scope="module")
def undisturbed(engine: Engine) -> list[int]:
    """40 greedy tokens after PROMPT, alone, prompt in one piece; fewer where each takes its time."""
    [row] = rows(engine, 1, 260)
    return generate(engine, row, PROMPT, 12 if slow(engine) else 40)


@pytest.mark.parametrize("chunks", [[1], [64, 64, 64], [100, 1, 1, 1, 100], [209]], ids=str)
def test_text_does_not_depend_on_how_the_prompt_is_cut(engine, undisturbed, chunks) -> None:
    [row] = rows(engine, 1, 260, seed=1)
    assert generate(engine, row, PROMPT, len(undisturbed), chunks) == undisturbed


def test_text_does_not_depend_on_who_shares_the_batch(engine, undisturbed) -> None:
    ours, *others = rows(engine, 6, 260, seed=2)
    rng = np.random.default_rng(5)
    for other in others:
        prompt = rng.integers(5, 500, int(rng.integers(3, 200)))
        generate(engine, other, prompt, 1)
    pending = {row.key: [row.output[-1]] for row in others} | {ours.key: PROMPT}
    while len(ours.output) < len(undisturbed):
        batch = [ours, *others[: len(ours.output) % 6]]
        result = engine.step(StepPlan(tuple(r.input(pending[r.key], sample=True) for r in batch)))
        for row in batch:
            token = result.outputs[row.key].token.id
            row.start += len(pending[row.key])
            row.output.append(token)
            pending[row.key] = [token]
    assert ours.output == undisturbed


def test_text_survives_eviction_and_return_of_every_block_between_steps(engine, undisturbed) -> None:
    row, elsewhere = rows(engine, 2, 260, seed=4)
    generate(engine, row, PROMPT, len(undisturbed) // 2)
    layout = engine.info.layout
    for pool in ("global", "window"):
        host = np.empty((len(row.blocks), layout.block_bytes(pool)), np.uint8)
        engine.copy_out(pool, row.blocks.tolist(), host).wait()
        zero = np.zeros_like(host)
        engine.copy_in(pool, zero, row.blocks.tolist()).wait()
        engine.copy_in(pool, host, elsewhere.blocks.tolist()).wait()
    moved = Row(row.key, elsewhere.blocks, row.start, output=row.output)
    assert generate(engine, moved, row.output[-1:], len(undisturbed)) == undisturbed


@pytest.mark.parametrize("pool", POOLS)
def test_host_memory_is_aligned_and_given_once(engine, host, pool) -> None:
    memory = host[pool]
    assert memory.shape == (40, engine.info.layout.block_bytes(pool))
    assert memory.flags.c_contiguous
    assert memory.ctypes.data % mmap.PAGESIZE == 0
    with pytest.raises(ValueError, match=f"{pool} pool: asked for twice"):
        engine.host_memory(pool, 40)


def test_blocks_come_back_from_host_memory_as_they_were(engine, host) -> None:
    for pool, memory in host.items():
        memory[[3, 1]] = (
            np.random.default_rng(15).random((2, memory.shape[1] // 4), np.float32).view(np.uint8)
        )
        engine.copy_in(pool, [memory[3], memory[1]], [9, 8]).wait()
        engine.copy_out(pool, [8, 9], [memory[5], memory[6]]).wait()
        assert np.array_equal(memory[[6, 5]], memory[[3, 1]])


def test_copies_made_while_steps_run_arrive_whole(engine, undisturbed) -> None:
    row, elsewhere = rows(engine, 2, 260, seed=13)
    blocks, size = elsewhere.blocks.tolist(), engine.info.layout.block_bytes("global")
    sent = np.random.default_rng(14).random((len(blocks), size // 4), np.float32).view(np.uint8)
    tickets, returned = [], []
    for _ in range(20):
        tickets.append(engine.copy_in("global", sent, blocks))
        returned.append(np.zeros_like(sent))
        tickets.append(engine.copy_out("global", blocks, list(returned[-1])))
    assert generate(engine, row, PROMPT, len(undisturbed)) == undisturbed
    for ticket in tickets:
        ticket.wait()
    assert all(ticket.done() for ticket in tickets)
    assert all(np.array_equal(back, sent) for back in returned)


def test_a_copy_that_fails_says_so_when_it_is_waited_for(engine) -> None:
    size = engine.info.layout.block_bytes("global")
    ticket = engine.copy_out("global", [10**6], np.empty((1, size), np.uint8))
    with pytest.raises(EngineError, match="copy of KV blocks failed"):
        ticket.wait()
    assert ticket.done()


def test_a_copy_of_more_blocks_than_rows_is_refused(engine) -> None:
    size = engine.info.layout.block_bytes("window")
    with pytest.raises(ValueError, match="2 blocks and 1 rows"):
        engine.copy_in("window", np.empty((1, size), np.uint8), [1, 2])


@pytest.mark.parametrize("left", [39, 23, 1])
def test_text_goes_on_alike_after_prompt_and_k_tokens_are_prefilled_anew(engine, undisturbed, left) -> None:
    [row] = rows(engine, 1, 260, seed=6)
    k = max(1, len(undisturbed) - left)
    row.output = undisturbed[:k]
    assert generate(engine, row, [*PROMPT, *undisturbed[:k]], len(undisturbed)) == undisturbed


def test_seeded_sampling_does_not_depend_on_the_batch(engine) -> None:
    warm = SamplingParams(temperature=0.9, top_p=0.95, repetition_penalty=1.1)
    alone, shared, other = rows(engine, 3, 260, seed=7)
    alone.params = shared.params = warm
    expected = generate(engine, alone, PROMPT, 6 if slow(engine) else 12)
    pending = {shared.key: PROMPT, other.key: PROMPT[:50]}
    while len(shared.output) < len(expected):
        batch = (shared, other)
        result = engine.step(StepPlan(tuple(r.input(pending[r.key], sample=True) for r in batch)))
        for row in batch:
            token = result.outputs[row.key].token.id
            row.start += len(pending[row.key])
            row.output.append(token)
            pending[row.key] = [token]
    assert shared.output == expected


def test_a_row_with_a_constraint_takes_what_it_allows_and_the_others_are_as_without_it(engine) -> None:
    held, free, alone = rows(engine, 3, 260, seed=12)
    expected = generate(engine, alone, PROMPT[:50], 4)
    every_third = np.arange(engine.info.vocab_size) % 3 == 1
    pending = {held.key: PROMPT[:60], free.key: PROMPT[:50]}
    while len(free.output) < len(expected):
        inputs = {row.key: row.input(pending[row.key], sample=True) for row in (held, free)}
        inputs[held.key].sampling.constraint = Allowing(every_third)
        result = engine.step(StepPlan(tuple(inputs.values())))
        for row in (held, free):
            token = result.outputs[row.key].token.id
            row.start += len(pending[row.key])
            row.output.append(token)
            pending[row.key] = [token]
    assert free.output == expected
    assert all(every_third[token] for token in held.output)


def test_attention_mass_covers_the_sequence_and_sums_to_one(engine) -> None:
    [row] = rows(engine, 1, 260, seed=8)
    used = -(-len(PROMPT) // engine.info.layout.block_tokens)
    whole = engine.step(StepPlan((row.input(PROMPT),))).outputs[row.key].mass
    assert whole.shape == row.blocks.shape
    assert whole.sum() == pytest.approx(1, abs=1e-5)
    assert (whole[:used] > 0).all()
    assert (whole[used:] == 0).all()


def test_a_step_without_sampling_returns_no_token(engine) -> None:
    [row] = rows(engine, 1, 260, seed=9)
    assert engine.step(StepPlan((row.input(PROMPT[:5]),))).outputs[row.key].token is None


def test_logprobs_are_the_log_softmax_of_the_logits(engine) -> None:
    if not hasattr(engine, "logits"):
        pytest.fail("every engine offers logits for tests")
    row, twin = rows(engine, 2, 260, seed=10)
    row.params = SamplingParams(temperature=0.0, logprobs=3)
    token = engine.step(StepPlan((row.input(PROMPT, sample=True),))).outputs[row.key].token
    logits = engine.logits(StepPlan((twin.input(PROMPT),)))[twin.key][-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert token.logprob == pytest.approx(expected[token.id], abs=1e-4)
    assert [i for i, _ in token.top] == np.argsort(-expected, kind="stable")[:3].tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.input([]), "positions"),
        (lambda r: r.input([100_000]), "token id"),
        (lambda r: r.input(np.zeros(261, np.int32)), "blocks"),
        (lambda r: Row(r.key, r.blocks + 10_000).input([5]), "block id"),
        (lambda r: Row(r.key, r.blocks, start=10_000).input([5]), "positions"),
    ],
    ids=["no tokens", "foreign token", "too few blocks", "foreign block", "beyond the context"],
)
def test_a_plan_that_breaks_the_contract_is_refused_before_anything_is_written(engine, change, words) -> None:
    [row] = rows(engine, 1, 240, seed=11)
    with pytest.raises(ValueError, match=words):
        engine.step(StepPlan((change(row),)))


def test_logits_are_bitwise_the_same_in_any_chunking_and_company(engine) -> None:
    @examples(engine)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        alone, row, *others = rows(engine, 5, 260, seed=12)
        prompt = PROMPT[: 100 if slow(engine) else None]
        whole = engine.logits(StepPlan((alone.input(prompt),)))[alone.key]
        parts = []
        while row.start < len(prompt):
            size = data.draw(st.integers(1, len(prompt) - row.start))
            company = [o for o in others if data.draw(st.booleans())]
            plan = StepPlan((*(o.input(PROMPT[:3]) for o in company), row.input(prompt[row.start :][:size])))
            parts.append(engine.logits(plan)[row.key])
            row.start += size
        assert np.array_equal(np.concatenate(parts), whole)

    check()


def test_kv_of_another_format_has_another_size_and_is_never_taken_for_ours() -> None:
    exact, rounded = (cpu_engine(FIXTURES / "tiny", kv=kv).info for kv in ("float32", "int8"))
    assert exact.fingerprint != rounded.fingerprint
    width, vectors = exact.layout.head_dim, exact.layout.block_bytes("global") // (4 * exact.layout.head_dim)
    assert rounded.layout.block_bytes("global") == vectors * (width + 4)


# --- streamed blocks ------------------------------------------------------------------------------


def stream(engine: Engine, row: Row, host: np.ndarray, streamed: int, rng: np.random.Generator) -> Row:
    """The sequence with its first blocks in host memory only: on the device they are overwritten."""
    slots = rng.permutation(len(host))[:streamed]
    leaving = row.blocks[:streamed].tolist()
    engine.copy_out("global", leaving, [host[slot] for slot in slots]).wait()
    other = rng.random((streamed, host.shape[1] // 4), np.float32).view(np.uint8)
    engine.copy_in("global", other, leaving).wait()
    table = np.concatenate([slots, row.blocks[streamed:]]).astype(np.int32)
    return replace(row, global_blocks=table, streamed=streamed)


@pytest.mark.parametrize("streamed", [1, 5, 13])
def test_text_is_the_same_when_leading_blocks_are_streamed(engine, undisturbed, host, streamed) -> None:
    row, other = rows(engine, 2, 260, seed=16)
    generate(engine, row, PROMPT, 1)
    row = stream(engine, row, host["global"], streamed, np.random.default_rng(streamed))
    generate(engine, other, PROMPT[:60], 1)
    while len(row.output) < len(undisturbed):
        plan = StepPlan((other.input(PROMPT[60:61]), row.input(row.output[-1:], sample=True)))
        row.output.append(engine.step(plan).outputs[row.key].token.id)
        row.start += 1
    assert row.output == undisturbed


def test_logits_and_mass_are_bitwise_the_same_with_any_blocks_streamed(engine, host) -> None:
    @examples(engine)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        resident, row, *others = rows(engine, 4, 260, seed=17)
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        size = engine.info.layout.block_tokens
        while row.start < (70 if slow(engine) else len(PROMPT)):
            part = PROMPT[row.start :][: data.draw(st.integers(1, 100))]
            if data.draw(st.booleans()):
                part = part[:1]
            streamed = data.draw(st.integers(0, row.start // size))
            moved = stream(engine, row, host["global"], streamed, rng) if streamed else row
            company = [o for o in others if data.draw(st.booleans())]
            plan = StepPlan((*(o.input(PROMPT[:1]) for o in company), moved.input(part)))
            expected_plan = StepPlan((resident.input(part),))
            expected = engine.logits(expected_plan)[resident.key]
            assert np.array_equal(engine.logits(plan)[row.key], expected)
            mass = engine.step(plan).outputs[row.key].mass
            assert np.array_equal(mass, engine.step(expected_plan).outputs[resident.key].mass)
            slots = moved.global_table[:streamed].tolist()
            engine.copy_in(
                "global", [host["global"][i] for i in slots], row.blocks[:streamed].tolist()
            ).wait()
            row.start = resident.start = row.start + len(part)

    check()


@pytest.mark.parametrize(
    ("streamed", "slot", "block", "words"),
    [
        (3, 0, 0, "3 streamed blocks do not end before position 40"),
        (-1, 0, 0, "-1 streamed blocks"),
        (1, 40, 0, "slot of host memory is not in 0..39"),
        (1, -1, 0, "slot of host memory"),
        (2, 0, 10**6, "block id is not in 0..255"),
    ],
)
def test_a_plan_that_streams_what_it_cannot_is_refused(engine, host, streamed, slot, block, words) -> None:
    [row] = rows(engine, 1, 260, seed=18)
    table = row.blocks.copy()
    table[0], table[2] = slot, block
    broken = replace(row, start=40, global_blocks=table, streamed=streamed)
    with pytest.raises(ValueError, match=words):
        engine.step(StepPlan((broken.input([5]),)))


def test_streaming_before_host_memory_was_asked_for_is_refused() -> None:
    engine = cpu_engine(FIXTURES / "tiny")
    [row] = rows(engine, 1, 260)
    with pytest.raises(ValueError, match="host_memory was not asked for"):
        engine.step(StepPlan((replace(row, start=40, streamed=1).input([5]),)))


# --- images ---------------------------------------------------------------------------------------

PLACES = (5, 40, 60)
"""Where images begin: within blocks, one across a border that also ends a window, one beside another."""
IMAGE_TOKENS = 20
PICTURED = np.where(
    np.isin(np.arange(110), [p + i for p in PLACES for i in range(IMAGE_TOKENS)]), -PROMPT[:110], PROMPT[:110]
)
"""Tokens with images among them."""


def with_images(engine: Engine, row: Row, seed: int = 0) -> Row:
    """The sequence, with images of random rows where PICTURED has them."""
    rng, width = np.random.default_rng(seed), engine._config.hidden_size
    shape = (IMAGE_TOKENS, width)
    return replace(
        row, images=tuple(ImageRows(p, 3 * rng.standard_normal(shape, np.float32)) for p in PLACES)
    )


def allowed(position: int) -> int:
    """The last place up to a position where a chunk may end."""
    return next((place for place in PLACES if place < position < place + IMAGE_TOKENS), position)


@pytest.fixture(scope="module")
def pictured(engine: Engine) -> list[int]:
    """Greedy tokens after PICTURED, alone, in one piece."""
    [row] = rows(engine, 1, 160)
    return generate(engine, with_images(engine, row), PICTURED, 6 if slow(engine) else 30)


@pytest.fixture(scope="module")
def pictured_logits(engine: Engine) -> np.ndarray:
    [row] = rows(engine, 1, 160)
    return engine.logits(StepPlan((with_images(engine, row).input(PICTURED),)))[row.key]


@pytest.mark.parametrize("chunks", [[5], [4, 21], [26, 34, 20, 29], [60, 20]], ids=str)
def test_text_after_images_does_not_depend_on_how_the_prompt_is_cut_around_them(
    engine, pictured, chunks
) -> None:
    [row] = rows(engine, 1, 160, seed=21)
    assert generate(engine, with_images(engine, row), PICTURED, len(pictured), chunks) == pictured


def test_text_after_images_does_not_depend_on_who_shares_the_batch(engine, pictured) -> None:
    ours, other, text = rows(engine, 3, 160, seed=22)
    ours, other = with_images(engine, ours), with_images(engine, other, seed=1)
    pending = {ours.key: PICTURED, other.key: PICTURED[:25], text.key: PROMPT[:30]}
    while len(ours.output) < len(pictured):
        batch = [ours, *[other, text][len(ours.output) % 3 :]]
        result = engine.step(StepPlan(tuple(r.input(pending[r.key], sample=True) for r in batch)))
        for row in batch:
            row.start += len(pending[row.key])
            row.output.append(result.outputs[row.key].token.id)
            pending[row.key] = row.output[-1:]
        if len(other.output) == 2:  # its next images come while ours decodes
            other.start, pending[other.key] = 25, PICTURED[25:]
    assert ours.output == pictured


def test_text_after_images_survives_eviction_and_return_of_every_block(engine, pictured) -> None:
    row, elsewhere = rows(engine, 2, 160, seed=23)
    row = with_images(engine, row)
    engine.step(StepPlan((row.input(PICTURED[:60]),)))
    move(engine, row.blocks, elsewhere.blocks)
    moved = replace(row, blocks=elsewhere.blocks, start=60)
    assert generate(engine, moved, PICTURED[60:], len(pictured)) == pictured


def move(engine: Engine, source: np.ndarray, target: np.ndarray) -> None:
    """Copy blocks to others, and overwrite them."""
    for pool in POOLS:
        host = np.empty((len(source), engine.info.layout.block_bytes(pool)), np.uint8)
        engine.copy_out(pool, source.tolist(), host).wait()
        engine.copy_in(pool, np.zeros_like(host), source.tolist()).wait()
        engine.copy_in(pool, host, target.tolist()).wait()


@pytest.mark.parametrize("left", [29, 1])
def test_text_after_images_goes_on_alike_when_prompt_and_k_tokens_are_prefilled_anew(
    engine, pictured, left
) -> None:
    [row] = rows(engine, 1, 160, seed=24)
    k = max(1, len(pictured) - left)
    row = replace(with_images(engine, row), output=pictured[:k])
    assert generate(engine, row, [*PICTURED, *pictured[:k]], len(pictured)) == pictured


@pytest.mark.parametrize("cached", [16, 48, 64], ids="prefix of {} tokens".format)
def test_a_prefix_that_ends_within_an_image_is_as_good_as_computing_it(engine, pictured, cached) -> None:
    first, second = rows(engine, 2, 160, seed=25)
    first = with_images(engine, first)
    engine.step(StepPlan((first.input(PICTURED),)))
    size = engine.info.layout.block_tokens
    move(engine, first.blocks[: cached // size], second.blocks[: cached // size])
    second = replace(second, start=cached, images=first.images)
    assert generate(engine, second, PICTURED[cached:], len(pictured)) == pictured


def test_logits_after_images_are_bitwise_the_same_in_any_chunking_and_company(
    engine, pictured_logits
) -> None:
    @examples(engine)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        row, *others = rows(engine, 4, 160, seed=26)
        row = with_images(engine, row)
        others[0] = with_images(engine, others[0], seed=1)
        done = 0
        while done < len(PICTURED):
            # Begin anew anywhere, in the middle of an image too: what is before is there.
            row.start = data.draw(st.integers(0, done)) if data.draw(st.booleans()) else done
            end = allowed(data.draw(st.integers(row.start + 1, len(PICTURED))))
            if end <= row.start:
                end = next(place for place in PLACES if place + IMAGE_TOKENS > row.start) + IMAGE_TOKENS
            company = [o for o in others if data.draw(st.booleans())]
            plan = StepPlan(
                (*(o.input(PICTURED[:25] if o.images else PROMPT[:3]) for o in company),
                 row.input(PICTURED[row.start : end]))
            )  # fmt: skip
            assert np.array_equal(engine.logits(plan)[row.key], pictured_logits[row.start : end])
            done = max(done, end)

    check()


def test_logits_after_images_are_bitwise_the_same_with_any_blocks_streamed(
    engine, host, pictured_logits
) -> None:
    for streamed, start in ((1, 25), (3, 50), (3, 60), (4, 65), (5, 80)):
        [row] = rows(engine, 1, 160, seed=27)
        row = with_images(engine, row)
        engine.logits(StepPlan((row.input(PICTURED),)))
        row.start = start
        moved = stream(engine, row, host["global"], streamed, np.random.default_rng(streamed))
        found = engine.logits(StepPlan((moved.input(PICTURED[start:]),)))[row.key]
        assert np.array_equal(found, pictured_logits[start:])


def test_every_row_of_an_image_sees_its_last_and_text_before_it_sees_none(engine, pictured_logits) -> None:
    [row] = rows(engine, 1, 160, seed=28)
    row = with_images(engine, row)
    changed = row.images[1].rows.copy()
    changed[-1] *= -1
    row.images = (row.images[0], ImageRows(PLACES[1], changed), row.images[2])
    found = engine.logits(StepPlan((row.input(PICTURED),)))[row.key]
    differs = (found != pictured_logits).any(-1)
    assert differs[PLACES[1] :].all()
    assert not differs[: PLACES[1]].any()


def test_ids_of_images_only_name_them(engine, pictured_logits) -> None:
    [row] = rows(engine, 1, 160, seed=29)
    others = np.where(PICTURED < 0, -(2**31), PICTURED).astype(np.int32)
    plan = StepPlan((with_images(engine, row).input(others),))
    assert np.array_equal(engine.logits(plan)[row.key], pictured_logits)


def test_attention_mass_sums_to_one_with_images(engine) -> None:
    [row] = rows(engine, 1, 160, seed=30)
    mass = engine.step(StepPlan((with_images(engine, row).input(PICTURED),))).outputs[row.key].mass
    assert mass.sum() == pytest.approx(1, abs=1e-5)
    assert (mass[: -(-len(PICTURED) // engine.info.layout.block_tokens)] > 0).all()


def told_of(row: Row, tokens: np.ndarray, images: Sequence[ImageRows]) -> SequenceInput:
    """The row's share of a step that is told of just these images."""
    return replace(row.input(tokens), images=images)


BROKEN: dict[str, tuple[Callable[[Row], SequenceInput], str]] = {
    "no images": (lambda r: told_of(r, PICTURED, ()), "token id"),
    "one left out": (lambda r: told_of(r, PICTURED, r.images[1:]), "at position 5, which is in no image"),
    "one cut": (lambda r: r.input(PICTURED[:59]), r"positions 40\.\.60 does not end in 1\.\.59"),
    "one after the step": (lambda r: told_of(r, PICTURED[:40], r.images[:2]), r"positions 40\.\.60"),
    "one before the step": (
        lambda r: told_of(replace(r, start=25), PICTURED[25:40], r.images[:1]),
        r"positions 5\.\.25 does not end in 26\.\.40",
    ),
    "in no order": (lambda r: told_of(r, PICTURED, r.images[::-1]), "overlaps the one before"),
    "ids of text in one": (lambda r: r.input(np.abs(PICTURED)), "at position 5, which is in an image"),
    "larger than any window": (
        lambda r: told_of(r, np.full(129, -1), [ImageRows(0, np.tile(r.images[0].rows, (7, 1))[:129])]),
        "an image of 129 tokens, and the window has",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_plan_whose_images_break_the_contract_is_refused(engine, case) -> None:
    [row] = rows(engine, 1, 160, seed=31)
    change, words = BROKEN[case]
    with pytest.raises(ValueError, match=words):
        engine.step(StepPlan((change(with_images(engine, row)),)))
