"""Rotary tables against the definition, and against the values torch computes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from wicore.gemma3.config import PUBLISHED
from wicore.gemma3.rope import inverse_frequencies, rope_table

CONFIG = PUBLISHED["gemma-3-4b"]


def test_frequencies_follow_the_definition() -> None:
    exponent = np.arange(0, 256, 2) / 256
    np.testing.assert_allclose(inverse_frequencies(CONFIG, "window"), 1e4**-exponent, rtol=2e-7)
    np.testing.assert_allclose(inverse_frequencies(CONFIG, "global"), 1e6**-exponent / 8, rtol=2e-7)


def test_frequencies_are_rounded_as_torch_rounds_them() -> None:
    # 1.0 / (1e4 ** (torch.arange(0, 256, 2) / 256)), at indices 1, 2, 3, 64.
    torch_values = np.array([0.93057203, 0.86596435, 0.8058422, 0.01], np.float32)
    assert (inverse_frequencies(CONFIG, "window")[[1, 2, 3, 64]] == torch_values).all()


@pytest.mark.parametrize("kind", ["global", "window"])
def test_a_row_is_the_same_whatever_else_is_asked_for(kind) -> None:
    cos, sin = rope_table(CONFIG, kind, range(700))
    assert cos.dtype == sin.dtype == np.float32
    assert cos.shape == sin.shape == (700, 256)
    for position in (0, 1, 511, 699):
        one_cos, one_sin = rope_table(CONFIG, kind, [position])
        assert (one_cos[0] == cos[position]).all()
        assert (one_sin[0] == sin[position]).all()


def test_halves_repeat_and_position_zero_does_not_rotate() -> None:
    cos, sin = rope_table(CONFIG, "global", [0, 77])
    assert (cos[:, :128] == cos[:, 128:]).all()
    assert (sin[:, :128] == sin[:, 128:]).all()
    assert (cos[0] == 1).all()
    assert (sin[0] == 0).all()


def test_the_factor_touches_global_layers_only() -> None:
    plain = dataclasses.replace(CONFIG, rope_scale=1.0)
    positions = np.arange(0, 4096, 8)
    assert (rope_table(CONFIG, "window", positions)[0] == rope_table(plain, "window", positions)[0]).all()
    # Position 8 p with factor 8 is position p without.
    scaled, unscaled = rope_table(CONFIG, "global", positions), rope_table(plain, "global", positions / 8)
    np.testing.assert_allclose(scaled[1], unscaled[1], atol=1e-6)
