"""Sampling against a straightforward float64 reference that sorts the whole vocabulary."""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from wicore.errors import EngineError
from wicore.request import SamplingParams
from wicore.sampling import (
    SampledToken,
    SamplingState,
    choice_seed,
    philox,
    sample,
    seed_of_job,
    uniform,
    uniforms,
)

# --- the reference ------------------------------------------------------------------------------------


def reference_logits(logits, params, prompt, output):
    """Bias, then penalties, in float64, one token at a time."""
    x = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    counts = Counter(output)
    for token in {*prompt, *output}:
        x[token] = (
            x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        )
    for token, count in counts.items():
        x[token] -= params.frequency_penalty * count + params.presence_penalty
    return x


def reference_kept(x, params):
    """Ids that the filters leave, likeliest first, and their normalised probabilities."""
    order = np.lexsort((np.arange(len(x)), -x))
    order = order[x[order] > -np.inf]
    if params.top_k:
        order = order[: params.top_k]
    p = np.exp((x[order] - x[order[0]]) / params.temperature)
    p /= p.sum()
    if params.top_p < 1:
        keep = np.cumsum(p) - p < params.top_p
        order, p = order[keep], p[keep]
    if params.min_p:
        keep = p >= params.min_p * p[0]
        order, p = order[keep], p[keep]
    return order, p / p.sum()


def filtered(params) -> bool:
    return bool(params.top_k or params.min_p) or params.top_p < 1


def reference_token(x, params, u):
    """The token, and how far `u` is from where it would be another."""
    if params.temperature < 1e-5:
        return int(np.argmax(x)), 1.0
    order, p = reference_kept(x, params)
    if not filtered(params):
        by_id = np.argsort(order)
        order, p = order[by_id], p[by_id]
    cumulative = np.cumsum(p)
    index = min(int(np.searchsorted(cumulative, u, side="right")), len(order) - 1)
    return int(order[index]), float(np.abs(np.concatenate(([0.0], cumulative)) - u).min())


def margin_of_filters(x, params) -> float:
    """How far the cuts of top-p and min-p are from falling elsewhere."""
    _, p = reference_kept(x, params.model_copy(update={"top_p": 1.0, "min_p": 0.0}))
    top_p = np.abs(np.cumsum(p) - params.top_p).min() if params.top_p < 1 else 1.0
    min_p = np.abs(p / p[0] - params.min_p).min() if params.min_p else 1.0
    return min(top_p, min_p)


def one(logits, params, seed=0, prompt=(), output=()) -> SampledToken:
    return sample(np.array([logits], np.float32), [SamplingState(params, seed, prompt, output)])[0]


class Allowing:
    """A constraint that allows the same tokens all the time."""

    complete, error = False, None

    def __init__(self, allowed) -> None:
        self.observed = []
        self.now(allowed)

    def now(self, allowed) -> None:
        octets = np.packbits(np.pad(allowed, (0, -len(allowed) % 32)), bitorder="little")
        self.mask = octets.view(np.uint32)

    def allowed(self):
        return self.mask

    def observe(self, token) -> None:
        self.observed.append(token)


# --- randomness ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # Random123's kat_vectors for philox4x32 10
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, answer):
    assert philox(np.array([counter], np.uint32), np.array([key], np.uint32)).tolist() == [answer]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
def test_a_uniform_number_depends_on_seed_and_position_alone(seed, position):
    number = uniform(seed, position)
    assert 0 <= number < 1
    assert uniforms([1, seed, 2], [0, position, 5])[1] == number
    assert number != uniform(seed, position + 1)


def test_uniform_numbers_are_the_first_two_output_words():
    key = np.array([[5, 0xFFFFFFFF]], np.uint32)
    words = philox(np.array([[7, 0, 0, 0]], np.uint32), key)[0].tolist()
    assert uniform(-(2**32) + 5, 7) == ((words[1] << 32 | words[0]) >> 11) * 2**-53


def test_uniform_numbers_are_uniform():
    numbers = uniforms([3] * 20_000, list(range(20_000)))
    observed = np.histogram(numbers, 50, (0, 1))[0]
    chi_square = float(((observed - 400) ** 2 / 400).sum())
    assert chi_square < 94  # 49 degrees of freedom: exceeded once in 10,000


def test_every_choice_and_every_job_has_a_seed_of_its_own():
    assert choice_seed(9, 0) == 9
    seeds = {choice_seed(9, index) for index in range(16)} | {seed_of_job(f"job-{i}") for i in range(16)}
    assert len(seeds) == 32
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert seed_of_job("a") == seed_of_job("a") == 3405396810240292928


# --- the token ----------------------------------------------------------------------------------------

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 1e-9]),
    top_k=st.sampled_from([0, 0, 1, 3, 40, 700, 5000]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    logit_bias=st.sampled_from([{}, {0: 5.0, 3: -100.0}, {1: 100.0}]),
)


@settings(deadline=None, max_examples=400)
@given(
    PARAMS,
    st.sampled_from([5, 64, 257, 1031, 4096, 4160]),
    st.sampled_from([0.1, 1.0, 4.0, 12.0]),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
@example(SamplingParams(top_p=0.9), 4096, 0.1, 0, False)
@example(SamplingParams(top_k=3000, top_p=0.9, min_p=0.05), 4096, 1.0, 1, True)
def test_the_token_is_the_one_the_reference_draws_from_the_same_number(params, vocab, spread, seed, holes):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, vocab).astype(np.float32)
    if holes:
        logits[rng.integers(0, vocab, vocab // 2)] = -np.inf
    assume(np.isfinite(logits).any())
    prompt, output = rng.integers(0, vocab, 30).tolist(), rng.integers(0, vocab, 40).tolist()
    x = reference_logits(logits, params, prompt, output)
    token, margin = reference_token(x, params, uniform(seed, len(output)))
    # float32 arithmetic may decide otherwise only where float64 itself is on the edge.
    assume(margin > 1e-4 and (params.temperature == 0 or margin_of_filters(x, params) > 1e-5))
    ranked = np.sort(x)[::-1]
    assume(params.temperature > 0 or ranked[0] - ranked[1] > 1e-4)
    state = SamplingState(params, seed, prompt, output)
    given_logits = np.array([logits])
    assert sample(given_logits, [state])[0].id == token
    np.testing.assert_array_equal(given_logits[0], logits)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(top_p=0.8),
        SamplingParams(top_k=4),
        SamplingParams(min_p=0.2, temperature=1.5),
        SamplingParams(top_k=6, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
def test_many_draws_have_the_distribution_of_the_filtered_softmax(params):
    draws = 6000
    logits = np.random.default_rng(3).normal(0, 1.5, 12).astype(np.float32)
    order, p = reference_kept(logits.astype(np.float64), params)
    state = SamplingState(params, 77)
    counts: Counter[int] = Counter()
    for _ in range(draws):
        token = sample(logits[None], [state])[0].id
        state.observe(token)
        counts[token] += 1
    assert set(counts) <= set(order.tolist())
    expected = p * draws
    chi_square = sum((counts[int(i)] - e) ** 2 / e for i, e in zip(order, expected, strict=True))
    freedom = max(1, len(order) - 1)
    assert chi_square < freedom + 4.5 * math.sqrt(2 * freedom) + 4


def test_the_whole_gemma_vocabulary_follows_the_reference_when_flat_and_when_peaked():
    rng = np.random.default_rng(0)
    logits = np.stack([rng.normal(0, spread, 262_144) for spread in (0.5, 3, 3)]).astype(np.float32)
    logits[2, rng.integers(0, 262_144, 30)] = rng.uniform(14, 24, 30)
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(top_p=0.5, min_p=0.001),
        SamplingParams(top_k=100, top_p=0.95),
    ):
        states = [SamplingState(params, seed) for seed in range(3)]
        tokens = [token.id for token in sample(logits, states)]
        for row, token in enumerate(tokens):
            x = logits[row].astype(np.float64)
            expected, _ = reference_token(x, params, uniform(row, 0))
            # So many tokens are so close that rounding may pick a neighbour in the order of drawing.
            order = np.lexsort((np.arange(len(x)), -x)) if filtered(params) else np.arange(len(x))
            place = np.empty(len(x), np.int64)
            place[order] = np.arange(len(x))
            assert abs(place[token] - place[expected]) <= 3


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = np.zeros(3000, np.float32)
    logits[[40, 1500, 2999]] = 2.0
    assert one(logits, SamplingParams(temperature=0)).id == 40
    assert one(logits, SamplingParams(top_k=1)).id == 40


def test_top_p_however_small_keeps_the_likeliest():
    assert one([0.0, 1.0, 0.5], SamplingParams(top_p=1e-12)).id == 1


def test_a_banned_token_is_never_drawn():
    logits = np.zeros(8, np.float32)
    params = SamplingParams(logit_bias=dict.fromkeys(range(7), -100.0))
    assert {one(logits, params, seed).id for seed in range(50)} == {7}
    logits[:7] = -np.inf
    assert {one(logits, SamplingParams(top_k=5), seed).id for seed in range(50)} == {7}
    assert {one(logits, SamplingParams(), seed).id for seed in range(50)} == {7}


# --- logprobs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [7, 4096])
@pytest.mark.parametrize("wanted", [0, 1, 5, 20])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.4])
def test_logprobs_are_those_of_the_raw_logits(vocab, wanted, temperature):
    logits = np.random.default_rng(1).normal(0, 3, vocab).astype(np.float32)
    params = SamplingParams(
        temperature=temperature, top_p=0.9, logprobs=wanted, logit_bias={2: 3.0}, presence_penalty=1.0
    )
    token = one(logits, params, output=[0, 1])
    x = logits.astype(np.float64)
    expected = x - x.max() - math.log(np.exp(x - x.max()).sum())
    assert token.logprob == pytest.approx(expected[token.id], abs=1e-5)
    best = np.argsort(-x, kind="stable")[:wanted]
    assert [i for i, _ in token.top] == best.tolist()
    assert [p for _, p in token.top] == pytest.approx(expected[best].tolist(), abs=1e-5)


def test_without_logprobs_none_are_reported():
    assert one([0.0, 1.0], SamplingParams(temperature=0)) == SampledToken(1, None, ())


# --- rows and states ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(PARAMS, st.integers(0, 99)), min_size=1, max_size=7), st.integers(0, 2**32 - 1))
def test_a_row_is_drawn_alike_alone_in_a_batch_and_with_threads(rows, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (len(rows), 2048)).astype(np.float32)
    prompt, output = rng.integers(0, 2048, 9).tolist(), rng.integers(0, 2048, 5).tolist()
    states = [SamplingState(p.model_copy(update={"logprobs": 3}), s, prompt, output) for p, s in rows]
    together = sample(logits, states)
    assert together == [sample(logits[i : i + 1], [state])[0] for i, state in enumerate(states)]
    with ThreadPoolExecutor(1) as executor:
        assert sample(logits, states, executor) == together


@given(PARAMS, st.lists(st.integers(0, 40), max_size=60), st.integers(0, 60))
def test_a_resumed_state_draws_as_the_one_that_ran_on(params, tokens, cut):
    logits = np.random.default_rng(len(tokens)).normal(0, 2, (1, 41)).astype(np.float32)
    ran_on = SamplingState(params, 5, [1, 2, 3], tokens[:cut])
    for token in tokens[cut:]:
        ran_on.observe(token)
    resumed = SamplingState(params, 5, [1, 2, 3], tokens)
    assert resumed.position == ran_on.position == len(tokens)
    assert sample(logits, [resumed]) == sample(logits, [ran_on])


def test_ids_of_an_image_are_under_no_penalty():
    params = SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.5)
    text, pictured = (SamplingState(params, 1, prompt, [4]) for prompt in ([3, 5], [3, -7, -(2**31), 5]))
    for expected, found in zip(text.touched(), pictured.touched(), strict=True):
        assert np.array_equal(expected, found)
    assert pictured.touched()[2].tolist() == [3, 5, 4]


def test_sampling_does_not_advance_the_state():
    state = SamplingState(SamplingParams(), 1)
    logits = np.zeros((1, 1000), np.float32)
    first = sample(logits, [state])
    assert sample(logits, [state]) == first
    state.observe(first[0].id)
    assert sample(logits, [state]) != first


def test_read_only_logits_are_accepted():
    logits = np.zeros((1, 16), np.float32)
    logits.flags.writeable = False
    assert sample(logits, [SamplingState(SamplingParams(temperature=0, logit_bias={4: 1.0}), 0)])[0].id == 4


# --- constraints --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    PARAMS, st.sampled_from([33, 512, 5000]), st.sampled_from([0.01, 0.3, 0.99]), st.integers(0, 2**32 - 1)
)
def test_a_constraint_is_as_good_as_banning_what_it_leaves_out(params, vocab, share, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (1, vocab)).astype(np.float32)
    mask = rng.random(vocab) < share
    mask[rng.integers(vocab)] = True
    free = SamplingState(params, seed, [1, 2], [3, 4, 4])
    held = SamplingState(params, seed, [1, 2], [3, 4, 4], Allowing(mask))
    before = logits.copy()
    assert sample(logits, [held]) == sample(np.where(mask, logits, np.float32(-np.inf)), [free])
    np.testing.assert_array_equal(logits, before)


def test_only_the_rows_that_have_a_constraint_keep_to_it():
    logits = np.zeros((4, 64), np.float32)
    states = [SamplingState(SamplingParams(), seed) for seed in range(4)]
    alone = sample(logits, states)
    held = SamplingState(SamplingParams(), 2, constraint=Allowing(np.arange(64) == 9))
    with ThreadPoolExecutor(1) as executor:
        drawn = sample(logits, [*states[:2], held, states[3]], executor)
    assert drawn[2].id == 9
    assert [*drawn[:2], drawn[3]] == [*alone[:2], alone[3]]


def test_logprobs_are_those_of_the_raw_logits_whatever_the_constraint():
    params = SamplingParams(temperature=0, logprobs=2)
    logits = np.arange(40, dtype=np.float32)[None] / 10
    [token] = sample(logits, [SamplingState(params, 0, constraint=Allowing(np.arange(40) < 20))])
    assert token.id == 19
    assert [i for i, _ in token.top] == [39, 38]
    assert token.logprob == pytest.approx(1.9 - math.log(np.exp(logits.astype(np.float64)).sum()), abs=1e-5)


def test_a_constraint_observes_what_was_generated_before_and_what_comes():
    constraint = Allowing(np.ones(40, bool))
    state = SamplingState(SamplingParams(), 0, [1, 2], [3, 4], constraint)
    state.observe(5)
    assert constraint.observed == [3, 4, 5]


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(logit_bias={1: 2.0})]
)
def test_logits_that_are_no_numbers_are_an_error_naming_the_row(bad, params):
    logits = np.zeros((3, 2048), np.float32)
    logits[1, 1999] = bad
    with pytest.raises(EngineError, match="row 1"):
        sample(logits, [SamplingState(params, 0)] * 3)
    with ThreadPoolExecutor(1) as executor, pytest.raises(EngineError, match="row 1"):
        sample(logits, [SamplingState(params, 0)] * 3, executor)


def test_a_row_with_every_token_banned_is_an_error():
    with pytest.raises(EngineError, match="row 0"):
        one(np.full(9, -np.inf), SamplingParams())
    nothing = SamplingState(SamplingParams(), 0, constraint=Allowing(np.zeros(9, bool)))
    with pytest.raises(EngineError, match="row 0"):
        sample(np.zeros((1, 9), np.float32), [nothing])


def test_logits_that_do_not_fit_the_states_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 4\) for 1 states"):
        sample(np.zeros((2, 4), np.float32), [SamplingState(SamplingParams(), 0)])
