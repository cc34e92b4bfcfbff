"""The GPU's sampler draws what wicore.sampling draws for the same logits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from tests.test_sampling import (
    PARAMS,
    Allowing,
    filtered,
    margin_of_filters,
    reference_kept,
    reference_logits,
    reference_token,
)
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.sampler import Sampler
from wicore.errors import EngineError
from wicore.request import SamplingParams
from wicore.sampling import SampledToken, SamplingState, sample, uniform

MANY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEW = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Bench:
    """Samplers by vocabulary, on one device."""

    def __init__(self, device: Device) -> None:
        self.device, self.stream = device, device.stream()
        self.samplers: dict[int, Sampler] = {}

    def sampler(self, vocab: int) -> Sampler:
        if vocab not in self.samplers:
            self.samplers[vocab] = Sampler(self.device, vocab, 8)
        return self.samplers[vocab]

    def draw(self, logits, states) -> list[SampledToken | None]:
        logits = np.ascontiguousarray(logits, np.float32)
        rows, vocab = logits.shape
        sampler = self.sampler(vocab)
        staging = self.device.allocate_host(logits.nbytes)
        staging.array[:] = logits.view(np.uint8).reshape(-1)
        on_device = self.device.allocate(logits.nbytes, "logits")
        try:
            self.device.copy(on_device.address, staging.address, logits.nbytes, self.stream)
            sampler.pack(states)
            sampler.upload(self.stream)
            sampler.upload_masks(self.stream)
            sampler.launch(self.stream, rows, on_device.address)
            self.stream.synchronize()
            return sampler.read(rows)
        finally:
            for buffer in (staging, on_device):
                buffer.free()

    def one(self, logits, params, seed=0, prompt=(), output=()) -> SampledToken:
        token = self.draw([logits], [SamplingState(params, seed, prompt, output)])[0]
        assert token is not None
        return token


@pytest.fixture
def bench(device: Device) -> Iterator[Bench]:
    bench = Bench(device)
    yield bench
    for sampler in bench.samplers.values():
        sampler.close()


def made_logits(rng, vocab, spread, kind):
    logits = rng.normal(0, spread, vocab).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits * 2) / 2
    elif kind == "halves":
        logits = logits.astype(np.float16).astype(np.float32)
    elif kind == "holes":
        logits[rng.integers(0, vocab, vocab // 2)] = -np.inf
    elif kind == "peaked":
        logits[rng.integers(0, vocab, 5)] += rng.uniform(5, 20, 5).astype(np.float32)
    elif kind == "equal":
        logits[:] = 0.5
    return logits


KINDS = st.sampled_from(["plain", "ties", "halves", "holes", "peaked", "equal"])


@MANY
@given(
    PARAMS,
    st.sampled_from([5, 64, 512, 1031, 5000]),
    st.sampled_from([0.1, 1.0, 4.0, 12.0]),
    st.integers(0, 2**32 - 1),
    KINDS,
)
@example(SamplingParams(top_p=0.9), 5000, 0.1, 0, "plain")
@example(SamplingParams(top_k=3000, top_p=0.9, min_p=0.05), 5000, 1.0, 1, "plain")
@example(SamplingParams(top_k=3000, top_p=0.9, min_p=0.05), 5000, 1.0, 1, "equal")
@example(SamplingParams(temperature=2.0, top_p=0.999), 5000, 0.1, 5, "equal")
@example(
    SamplingParams(temperature=2.0, top_p=0.9, top_k=700, frequency_penalty=0.7), 1031, 4.0, 2**28, "peaked"
)
def test_the_token_is_the_one_the_reference_draws_from_the_same_number(
    bench, params, vocab, spread, seed, kind
):
    rng = np.random.default_rng(seed)
    logits = made_logits(rng, vocab, spread, kind)
    assume(np.isfinite(logits).any())
    prompt, output = rng.integers(0, vocab, 30).tolist(), rng.integers(0, vocab, 40).tolist()
    x = reference_logits(logits, params, prompt, output)
    token, margin = reference_token(x, params, uniform(seed, len(output)))
    assume(margin > 1e-4 and (params.temperature == 0 or margin_of_filters(x, params) > 1e-5))
    if kind not in ("ties", "equal"):
        ranked = np.sort(x)[::-1]
        assume(params.temperature > 0 or ranked[0] - ranked[1] > 1e-4)
    if kind in ("ties", "equal") and (params.repetition_penalty != 1.0 or params.frequency_penalty):
        x = x.astype(np.float32)  # ties of float32 arithmetic are none in float64, and the other way round
        assume(reference_token(x.astype(np.float64), params, uniform(seed, len(output)))[0] == token)
        assume(sample(logits[None].copy(), [SamplingState(params, seed, prompt, output)])[0].id == token)
    assert bench.one(logits, params, seed, prompt, output).id == token


def test_the_whole_vocabulary_follows_the_reference_when_flat_and_when_peaked(bench):
    rng = np.random.default_rng(0)
    logits = np.stack([rng.normal(0, spread, 262_144) for spread in (0.5, 3)]).astype(np.float32)
    logits[1, rng.integers(0, 262_144, 30)] = rng.uniform(14, 24, 30)
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(top_p=0.5, min_p=0.001),
        SamplingParams(top_k=100, top_p=0.95),
    ):
        tokens = bench.draw(logits, [SamplingState(params, seed) for seed in range(2)])
        for row, token in enumerate(tokens):
            x = logits[row].astype(np.float64)
            expected, _ = reference_token(x, params, uniform(row, 0))
            # So many tokens are so close that rounding may pick a neighbour in the order of drawing.
            order = np.lexsort((np.arange(len(x)), -x)) if filtered(params) else np.arange(len(x))
            place = np.empty(len(x), np.int64)
            place[order] = np.arange(len(x))
            assert abs(place[token.id] - place[expected]) <= 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.5, top_p=0.8),
        SamplingParams(top_k=6, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
def test_many_draws_have_the_distribution_of_the_filtered_softmax(bench, params):
    logits = np.random.default_rng(3).normal(0, 1.5, 12).astype(np.float32)
    order, p = reference_kept(logits.astype(np.float64), params)
    counts: Counter[int] = Counter()
    draws = 240
    for first in range(0, draws, 8):
        states = [SamplingState(params, seed) for seed in range(first, first + 8)]
        counts.update(token.id for token in bench.draw(np.tile(logits, (8, 1)), states))
    assert set(counts) <= set(order.tolist())
    expected = p * draws
    chi_square = sum((counts[int(i)] - e) ** 2 / e for i, e in zip(order, expected, strict=True))
    freedom = max(1, len(order) - 1)
    assert chi_square < freedom + 4.5 * math.sqrt(2 * freedom) + 4


def test_any_temperature_draws_what_the_cpu_draws(bench):
    logits = np.random.default_rng(8).normal(0, 3, (6, 512)).astype(np.float32)
    for temperature in (1e-5, 2e-5, 1e-3, 2.0):
        states = [SamplingState(SamplingParams(temperature=temperature, top_p=0.9), i) for i in range(6)]
        assert ids(bench.draw(logits, states)) == ids(sample(logits, states))


def ids(tokens):
    return [token.id for token in tokens]


def test_greedy_takes_the_lowest_of_equal_ids(bench):
    logits = np.zeros(9000, np.float32)
    logits[[40, 5000, 8999]] = 2.0
    assert bench.one(logits, SamplingParams(temperature=0)).id == 40
    assert bench.one(logits, SamplingParams(top_k=1)).id == 40


def test_both_zeros_are_equal(bench):
    logits = np.full(512, -1.0, np.float32)
    logits[7], logits[300] = -0.0, 0.0
    assert bench.one(logits, SamplingParams(temperature=0, logprobs=2)).top[0][0] == 7


def test_top_p_however_small_keeps_the_likeliest(bench):
    assert bench.one([0.0, 1.0, 0.5], SamplingParams(top_p=1e-12)).id == 1


def test_a_banned_token_is_never_drawn(bench):
    logits = np.zeros((8, 8), np.float32)
    bias = SamplingParams(logit_bias=dict.fromkeys(range(7), -100.0))
    assert set(ids(bench.draw(logits, [SamplingState(bias, seed) for seed in range(8)]))) == {7}
    logits[:, :7] = -np.inf
    for params in (SamplingParams(top_k=5), SamplingParams()):
        assert set(ids(bench.draw(logits, [SamplingState(params, seed) for seed in range(8)]))) == {7}


# --- masks --------------------------------------------------------------------------------------------


@FEW
@given(PARAMS, st.sampled_from([33, 512, 5000]), st.integers(0, 2**32 - 1))
def test_a_mask_is_as_good_as_banning_what_it_leaves_out(bench, params, vocab, seed):
    rng = np.random.default_rng(seed)
    logits = np.tile(rng.normal(0, 2, vocab).astype(np.float32), (2, 1))
    mask = rng.random(vocab) < 0.3
    mask[rng.integers(vocab)] = True
    banned = np.where(mask, logits[0], -np.inf).astype(np.float32)
    state = SamplingState(params, seed, [1, 2], [3, 4, 4])
    constrained = SamplingState(params, seed, [1, 2], [3, 4, 4], Allowing(mask))
    masked, plain = bench.draw(logits, [constrained, state])
    assert [masked] == bench.draw(banned[None], [state])
    assert [plain] == bench.draw(logits[:1], [state])
    assert mask[masked.id]


def test_each_step_has_masks_of_its_own(bench):
    logits = np.zeros((3, 512), np.float32)
    constraints = [Allowing(np.arange(512) == 5), Allowing(np.arange(512) == 400)]
    states = [
        SamplingState(SamplingParams(), 0, constraint=c) for c in (constraints[0], None, constraints[1])
    ]
    first = bench.draw(logits, states)
    assert (first[0].id, first[2].id) == (5, 400)
    constraints[1].now(np.arange(512) == 77)
    second = bench.draw(logits, states)
    assert (second[0].id, second[2].id) == (5, 77)
    assert second[1] == first[1] == bench.draw(logits[:1], [states[1]])[0]


def test_a_mask_that_allows_nothing_is_an_error_naming_the_row(bench):
    states = [SamplingState(SamplingParams(), 0, constraint=c) for c in (None, Allowing(np.zeros(40, bool)))]
    with pytest.raises(EngineError, match="row 1"):
        bench.draw(np.zeros((2, 40)), states)


def test_logprobs_are_those_of_the_raw_logits_whatever_the_mask(bench):
    logits = np.arange(40, dtype=np.float32) / 10
    constraint = Allowing(np.arange(40) < 20)
    state = SamplingState(SamplingParams(temperature=0, logprobs=2), 0, constraint=constraint)
    [token] = bench.draw(logits[None], [state])
    assert token.id == 19
    assert [i for i, _ in token.top] == [39, 38]
    assert token.logprob == pytest.approx(1.9 - math.log(np.exp(logits.astype(np.float64)).sum()), abs=1e-5)
    assert [token] == sample(logits[None], [state])


# --- logprobs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [7, 4096, 9001])
@pytest.mark.parametrize("wanted", [0, 1, 5, 20])
@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "holes"])
def test_logprobs_are_the_cpus(bench, vocab, wanted, kind):
    logits = made_logits(np.random.default_rng(1), vocab, 3.0, kind)
    params = [
        SamplingParams(
            temperature=temperature,
            top_p=0.9,
            logprobs=wanted,
            logit_bias={2: 3.0, 6: -3.0},
            presence_penalty=1.0,
            repetition_penalty=1.2,
        )
        for temperature in (0.0, 1.0)
    ]
    states = [SamplingState(p, 4, [6, 6], [0, 1]) for p in params]
    tokens = bench.draw(np.stack([logits] * 2), states)
    for token, expected in zip(tokens, sample(np.stack([logits] * 2), states), strict=True):
        assert token.id == expected.id
        assert token.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [i for i, _ in token.top] == [i for i, _ in expected.top]
        assert [p for _, p in token.top] == pytest.approx([p for _, p in expected.top], abs=1e-5)


def test_without_logprobs_none_are_reported(bench):
    assert bench.one([0.0, 1.0], SamplingParams(temperature=0)) == SampledToken(1, None, ())


# --- rows and steps -----------------------------------------------------------------------------------


@FEW
@given(
    st.lists(st.one_of(st.none(), st.tuples(PARAMS, st.integers(0, 99))), min_size=1, max_size=8),
    st.integers(0, 2**32 - 1),
)
def test_a_row_is_drawn_alike_alone_and_among_others(bench, rows, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (len(rows), 2048)).astype(np.float32)
    prompt, output = rng.integers(0, 2048, 9).tolist(), rng.integers(0, 2048, 5).tolist()
    states = [
        row and SamplingState(row[0].model_copy(update={"logprobs": 3}), row[1], prompt, output)
        for row in rows
    ]
    together = bench.draw(logits, states)
    assert together == [bench.draw(logits[i : i + 1], [state])[0] for i, state in enumerate(states)]
    assert together == bench.draw(logits, states)
    assert [token is None for token in together] == [state is None for state in states]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_p=0.7, presence_penalty=1.5)])
def test_a_captured_launch_draws_the_steps_that_are_packed_later(bench, params):
    rng = np.random.default_rng(2)
    device, stream, sampler = bench.device, bench.stream, bench.sampler(600)
    logits = rng.normal(0, 2, (12, 3, 600)).astype(np.float32)
    host = device.allocate_host(logits[0].nbytes)
    target = device.allocate(logits[0].nbytes, "logits")
    graph = device.capture(stream, lambda: sampler.launch(stream, 3, target.address))
    states = [SamplingState(params, seed) for seed in range(3)]
    for step, values in enumerate(logits):
        present = states if step < 6 else [states[2], None, states[0]]
        host.array[:] = values.view(np.uint8).reshape(-1)
        device.copy(target.address, host.address, host.size, stream)
        sampler.pack(present)
        sampler.upload(stream)
        graph.launch(stream)
        stream.synchronize()
        found = sampler.read(3)
        rows = [i for i, state in enumerate(present) if state is not None]
        expected = sample(values[rows], [present[i] for i in rows])
        assert [found[i].id for i in rows] == ids(expected)
        for i in rows:
            present[i].observe(found[i].id)
    graph.close()
    host.free()
    target.free()


def test_penalties_of_long_sequences_find_room(bench):
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2, (2, 20_000)).astype(np.float32)
    params = SamplingParams(temperature=0, repetition_penalty=1.4)
    for length in (10, 6000, 19_000, 50):
        states = [SamplingState(params, 0, rng.integers(0, 20_000, length).tolist()) for _ in range(2)]
        assert ids(bench.draw(logits, states)) == ids(sample(logits, states))


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_p=0.9),
        SamplingParams(logit_bias={1: 2.0}, logprobs=2),
    ],
)
def test_logits_that_are_no_numbers_are_the_cpus_error(bench, bad, params):
    logits = np.zeros((3, 5000), np.float32)
    logits[1, 4999] = bad
    states = [SamplingState(params, 0)] * 3
    with pytest.raises(EngineError, match="row 1") as expected:
        sample(logits, states)
    with pytest.raises(EngineError) as found:
        bench.draw(logits, states)
    assert str(found.value) == str(expected.value)


def test_a_row_with_every_token_banned_is_an_error(bench):
    with pytest.raises(EngineError, match=r"row 0 .* -inf"):
        bench.one(np.full(9, -np.inf), SamplingParams())


def test_more_rows_than_there_is_room_for_and_foreign_ids_are_refused(bench):
    state = SamplingState(SamplingParams(), 0)
    with pytest.raises(ValueError, match="at most 8"):
        bench.sampler(9).pack([state] * 9)
    with pytest.raises(ValueError, match="1 to 8"):
        bench.sampler(9).launch(bench.stream, 9, 0)
    with pytest.raises(ValueError, match="under 9"):
        bench.sampler(9).pack([SamplingState(SamplingParams(logit_bias={9: 1.0}), 0)])
    image = SamplingState(SamplingParams(presence_penalty=1.0), 0)
    image.observe(-7)
    with pytest.raises(ValueError, match="got id -7"):
        bench.sampler(9).pack([image])
