"""What the settings make of formats and pools, without an engine."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wicore.config import Settings, load_settings
from wicore.engine.sizing import (
    device_blocks,
    fitting_blocks,
    kv_format,
    kv_layout,
    longest,
    pool_bytes,
    tier_sizes,
    weight_format,
)
from wicore.engine.tensorrt.limits import buckets
from wicore.errors import ConfigError
from wicore.gemma3.config import PUBLISHED

CONFIG = PUBLISHED["gemma-3-27b"]


def settings(kind: str = "tensorrt", **options: Any) -> Settings:
    given = {name.replace("__", "."): value for name, value in options.items()}
    return load_settings([], {}, {"engine.kind": kind, **given})


@pytest.mark.parametrize(
    ("kind", "weights", "kv"), [("cpu", "int8", "float32"), ("tensorrt", "float16", "float16")]
)
def test_each_engine_has_formats_of_its_own(kind, weights, kv) -> None:
    engine = settings(kind).engine
    assert (weight_format(engine), kv_format(engine)) == (weights, kv)


@pytest.mark.parametrize(
    ("kind", "option", "words"),
    [
        (
            "cpu",
            {"engine__kv": "float16"},
            r"engine\.kv: float16 is not for engine\.kind cpu.* float32 or int8",
        ),
        ("tensorrt", {"engine__weights": "int8"}, r"engine\.weights: int8 is not for .*takes float16"),
    ],
)
def test_a_format_that_an_engine_does_not_have_is_refused(kind, option, words) -> None:
    engine = settings(kind, **option).engine
    format_of = kv_format if "engine__kv" in option else weight_format
    with pytest.raises(ConfigError, match=words):
        format_of(engine)


def test_only_a_card_says_how_long_a_sequence_may_be_when_its_pool_has_no_size() -> None:
    assert longest(settings(), CONFIG) is None
    assert longest(settings(hmt__device_tokens=65_536, hmt__host_bytes=0), CONFIG) == 65_536
    assert longest(settings("cpu", hmt__host_bytes=0), CONFIG) == 16_384


@given(st.integers(0, 2**38), st.integers(1, 64), st.sampled_from(["float16", "int8"]))
def test_pools_that_fit_are_the_largest_that_do(size: int, max_batch: int, kv: str) -> None:
    given_settings = settings(scheduler__max_batch=max_batch, engine__kv=kv)
    layout = kv_layout(given_settings, CONFIG)
    found = fitting_blocks(given_settings, layout, size)
    assert pool_bytes(layout, found) <= size
    more = device_blocks(given_settings, layout, found["global"] + 1)
    assert pool_bytes(layout, more) > size


def test_tiers_below_an_engine_that_sized_itself_have_its_blocks() -> None:
    given_settings = settings(hmt__host_bytes=2**34)
    layout = kv_layout(given_settings, CONFIG)
    sizes = tier_sizes(given_settings, layout, {"global": 7, "window": 5})
    assert sizes.device == {"global": 7, "window": 5}
    assert sizes.host is not None


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1, (1,)),
        (3, (1, 2, 4)),
        (16, (1, 2, 4, 8, 16)),
        (65, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80)),
    ],
)
def test_buckets_hold_every_batch_with_little_to_spare(most, expected) -> None:
    assert buckets(most) == expected
