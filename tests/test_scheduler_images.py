"""The scheduler with images in prompts: a step has all that is new of an image, or nothing of it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from tests.test_scheduler import (
    ANY,
    BLOCK,
    GREEDY,
    SEEDED,
    TIERS,
    AnyOrder,
    Service,
    image,
    images_of,
    words,
)
from wicore.engine.base import ImageRows
from wicore.errors import ConfigError, TooLarge
from wicore.hmt import CacheManager
from wicore.request import Priority
from wicore.sampling import SamplingState
from wicore.scheduler import Limits, SequenceRequest


def span(window: int, tokens: int) -> int:
    """Most blocks that a step with an image of so many tokens sees in a window layer."""
    firsts = range(window, window + BLOCK)
    return max((first + tokens - 1) // BLOCK - (first - window + 1) // BLOCK + 1 for first in firsts)


class AnyImages(AnyOrder):
    """Prompts of text and images, of which many share leading ones, or all of an image but its last id."""

    @initialize(
        blocks=st.integers(9, 24),
        extra=st.integers(-1, 8),
        tokens=st.integers(1, 7),
        wider=st.integers(0, 7),
        max_batch=st.integers(1, 5),
        slack=st.integers(0, 9),
        prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def start(self, blocks, extra, tokens, wider, max_batch, slack, prefix_cache) -> None:
        window = tokens + wider
        self.begin(
            tokens,
            blocks=blocks,
            window_blocks=min(blocks, max(1, span(window, tokens) + extra)),
            window=window,
            max_batch=max_batch,
            budget=max_batch + max(1, tokens) + slack,
            prefix_cache=prefix_cache,
        )

    def begin(self, tokens: int, **options) -> None:
        self.service = Service(image_tokens=tokens, **options)
        self.tokens, self.key = tokens, 0
        self.too_narrow = options["window_blocks"] < span(options["window"], tokens)

    @rule(
        parts=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1)), max_size=4),
        own=st.integers(0, 6),
        max_tokens=st.integers(1, 9),
        done=st.integers(0, 4),
        priority=st.sampled_from(Priority),
        params=st.sampled_from([GREEDY, SEEDED]),
    )
    def arrive(self, parts, own, max_tokens, done, priority, params) -> None:
        """`parts`: (text before an image, which image)."""
        prompt = words(self.key, max(own, 0 if parts else 1))
        for before, variant in reversed(parts):
            prompt = words(0, before) + image(self.tokens, variant) + prompt
        self.submit(prompt, max_tokens, done, priority, params)

    def is_too_large(self, positions: int) -> bool:
        return super().is_too_large(positions) or self.too_narrow


TestAnyImages = AnyImages.TestCase
TestAnyImages.settings = settings(max_examples=120, stateful_step_count=50, **ANY)


class AnyImagesInTiers(AnyImages):
    """The same over host memory and a file, with faults, and with sequences longer than the device pool."""

    @initialize(
        blocks=st.integers(4, 14),
        extra=st.integers(0, 4),
        tokens=st.integers(1, 7),
        wider=st.integers(0, 7),
        max_batch=st.integers(1, 5),
        slack=st.integers(0, 9),
        **TIERS,
    )
    def start(
        self, blocks, extra, tokens, wider, max_batch, slack, host, nvme, patience, fault_rate, seed, policy,
        checkpoint_tokens,
    ) -> None:  # fmt: skip
        window = tokens + wider
        self.begin(
            tokens,
            blocks=blocks,
            window_blocks=span(window, tokens) + extra,
            window=window,
            max_batch=max_batch,
            budget=max_batch + tokens + slack,
            host={"global": host[0], "window": span(window, tokens) + host[1]},
            nvme=None if nvme is None else {"global": nvme[0], "window": nvme[1]},
            patience=patience,
            fault_rate=fault_rate,
            seed=seed,
            policy=policy,
            checkpoint_tokens=checkpoint_tokens,
        )


TestAnyImagesInTiers = AnyImagesInTiers.TestCase
TestAnyImagesInTiers.settings = settings(max_examples=80, stateful_step_count=40, **ANY)


# --- single decisions ---------------------------------------------------------------------------------


def chunks(service: Service) -> dict[int, int]:
    """New tokens of each sequence in the next step, which is then computed."""
    service.start_step()
    planned = {s.key: len(s.tokens) for s in service.plan.sequences}
    service.end_step()
    return planned


def test_a_chunk_ends_before_an_image_that_the_budget_would_cut():
    service = Service(budget=10, image_tokens=6)
    service.add(1, words(0, 7) + image(6) + words(1, 3))
    assert [chunks(service)[1] for _ in range(2)] == [7, 9]
    service.drain()


def test_images_that_fit_the_budget_share_a_chunk_with_the_text_around_them():
    service = Service(budget=16, image_tokens=3)
    service.add(1, words(0, 2) + image(3, 0) + image(3, 1) + words(1, 4) + image(3, 2))
    service.start_step()
    [asked] = service.plan.sequences
    assert [(i.start, i.end) for i in asked.images] == [(2, 5), (5, 8), (12, 15)]
    service.end_step()
    service.drain()


def test_what_an_image_leaves_of_the_budget_goes_to_those_behind():
    service = Service(budget=12, image_tokens=6)
    service.add(1, words(0, 4) + image(6) + image(6) + words(1, 3))
    service.add(2, words(9, 8))
    assert chunks(service) == {1: 10, 2: 2}
    assert chunks(service) == {1: 9, 2: 3}
    service.drain()


def test_a_prompt_may_end_with_an_image():
    service = Service(budget=12, image_tokens=5)
    service.add(1, words(0, 3) + image(5))
    service.drain()
    assert list(service.finished) == [1]


def test_a_prefix_that_ends_within_an_image_is_taken_up_with_the_rest_of_the_image():
    service = Service(budget=32, image_tokens=7)
    prompt = words(0, 3) + image(7) + words(1, 1)
    service.add(1, prompt, params=SEEDED)
    service.drain()
    service.add(2, prompt, params=SEEDED)
    service.start_step()
    [asked] = service.plan.sequences
    assert (asked.start, len(asked.tokens)) == (8, 3)
    assert [(i.start, i.end) for i in asked.images] == [(3, 10)]
    service.end_step()
    service.drain()


def test_a_prompt_that_ends_with_an_image_is_taken_up_at_its_last_token():
    service = Service(budget=32, image_tokens=6)
    prompt = words(0, 3) + image(6)
    for key in (1, 2):
        service.add(key, prompt, params=SEEDED)
        service.start_step()
        if key == 2:
            assert [len(s.tokens) for s in service.plan.sequences] == [1]
            assert [i.start for i in service.plan.sequences[0].images] == [3]
        service.end_step()
        service.drain()


def test_of_images_that_differ_at_their_end_only_nothing_is_reused():
    service = Service(budget=32, image_tokens=7, blocks=32)
    for key, variant, cached in ((1, 0, 0), (2, 1, 4), (3, 0, 12)):
        service.add(key, words(0, 4) + image(7, variant) + words(1, 2))
        service.start_step()
        assert service.scheduler.cached(key) == cached
        service.end_step()
        service.drain()


def test_decode_steps_carry_no_images():
    service = Service(budget=32, image_tokens=6)
    service.add(1, words(0, 3) + image(6) + words(1, 2))
    service.step()
    while service.start_step():
        assert service.plan.sequences[0].images == ()
        service.end_step()


def test_room_for_an_image_is_made_at_the_cost_of_the_last_ranked():
    service = Service(blocks=16, window_blocks=5, window=8, max_batch=3, budget=16, image_tokens=8)
    service.add(1, words(1, 14) + image(8) + words(2, 2), params=SEEDED)
    service.add(2, words(3, 2), max_tokens=20, params=SEEDED)
    assert chunks(service) == {1: 14, 2: 2}
    assert chunks(service) == {1: 10}
    assert service.scheduler.preemptions == 1
    service.drain()


def test_a_prompt_whose_image_would_be_without_room_waits_and_is_not_begun_in_vain():
    service = Service(blocks=32, window_blocks=6, window=8, max_batch=3, budget=16, image_tokens=8)
    service.add(1, words(3, 6), max_tokens=12)
    service.step()
    service.add(2, words(1, 14) + image(8) + words(2, 2))
    service.step()
    assert (service.scheduler.running, service.scheduler.waiting) == (1, 1)
    service.drain()
    assert service.scheduler.preemptions == 0


@pytest.mark.parametrize("patience", [0, 4])
def test_a_long_sequence_waits_until_an_images_worth_of_blocks_has_been_saved(patience):
    host = {"global": 40, "window": 20}
    service = Service(
        blocks=6, window_blocks=12, window=8, budget=16, host=host, patience=patience, image_tokens=7
    )
    service.add(1, words(0, 8) + image(7) + words(1, 13))
    service.drain()
    assert service.scheduler.preemptions == 0


def test_a_budget_that_decodes_leave_no_image_of_is_refused_naming_what_it_should_be():
    words_ = (
        r"scheduler\.token_budget: 300 less scheduler\.max_batch \(64\) leaves 236 .* 256 .* raise it to 320"
    )
    with pytest.raises(ConfigError, match=words_):
        Limits(64, 300, image_tokens=256)
    Limits(64, 320, image_tokens=256)


def test_an_image_larger_than_what_decodes_leave_is_refused_with_its_request():
    service = Service(max_batch=4, budget=10)
    with pytest.raises(TooLarge, match=r"an image takes 7 tokens.*scheduler\.token_budget leaves 6"):
        service.add(1, image(7) + words(0, 3))
    service.add(2, image(6) + words(0, 3))
    service.drain()


@pytest.mark.parametrize(
    ("window_blocks", "refused"),
    [(span(10, 7) - 1, True), (span(10, 7), False)],
)
def test_a_window_pool_must_hold_an_image_and_the_window_before_it(window_blocks, refused):
    service = Service(blocks=32, window_blocks=window_blocks, window=10, budget=16, image_tokens=7)
    prompt = words(0, 18) + image(7) + words(1, 2)
    if refused:
        with pytest.raises(TooLarge, match=rf"7 of them for an image.*{window_blocks + 1} window blocks"):
            service.add(1, prompt)
    else:
        service.add(1, prompt)
        service.drain()


def test_a_long_sequences_share_of_the_device_must_hold_an_image():
    sizes = {"window_blocks": 8, "window": 8, "host": {"global": 40, "window": 20}}
    prompt = words(0, 18) + image(7) + words(1, 6)
    service = Service(blocks=4, budget=16, image_tokens=7, **sizes)
    with pytest.raises(TooLarge, match="3 device blocks of 4; the cache has 2"):
        service.add(1, prompt)
    service = Service(blocks=6, budget=16, image_tokens=7, **sizes)
    service.add(1, prompt)
    service.drain()


ROWS = images_of(image(3))[0].rows


@pytest.mark.parametrize(
    "images",
    [
        (ImageRows(4, ROWS),),
        (ImageRows(-1, ROWS),),
        (ImageRows(1, ROWS), ImageRows(3, ROWS)),
        (ImageRows(2, ROWS[:0]),),
    ],
    ids=["beyond the prompt", "before it", "over another", "without rows"],
)
def test_images_that_do_not_lie_in_the_prompt_are_refused(images):
    service = Service()
    state = SamplingState(GREEDY, 1)
    with pytest.raises(ValueError, match="does not lie in"):
        service.scheduler.add(SequenceRequest(1, words(0, 6), (), 3, state, Priority.NORMAL, images))
    assert service.scheduler.idle


@pytest.mark.parametrize("window", [1, 5, 10, 12])
@pytest.mark.parametrize("tokens", [1, 2, 4, 7])
def test_the_span_of_an_image_is_what_its_step_sees_at_worst(window, tokens):
    cache: CacheManager = Service(window=window).cache
    assert cache.window_span(10**6, tokens) == span(window, tokens)
