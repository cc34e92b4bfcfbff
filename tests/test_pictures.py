"""Image files to pixels: what they show, whatever their form, and no crash whatever they hold."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.images import png
from wicore.errors import InvalidRequest, TooLarge
from wicore.vision.pixels import Picture, crops, pixels, size_of

HALVES = np.zeros((600, 1200, 3), np.uint8)
HALVES[:, :600] = (10, 20, 200)
HALVES[:, 600:] = (200, 20, 10)
"""In BGR: red, then blue."""


def encoded(kind: str, image: np.ndarray = HALVES) -> bytes:
    done, data = cv2.imencode(f".{kind}", image)
    assert done
    return data.tobytes()


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "gif"])
def test_every_form_is_read_in_red_green_blue(kind: str) -> None:
    data = encoded(kind)
    assert size_of(data, 10**7) == (1200, 600)
    seen = pixels(Picture(data, None), 56)
    assert (seen.shape, seen.dtype) == ((56, 56, 3), np.uint8)
    assert np.abs(seen[28, 10].astype(int) - (200, 20, 10)).max() < 40
    assert np.abs(seen[28, 45].astype(int) - (10, 20, 200)).max() < 40


def test_crops_of_a_wide_image_lie_side_by_side() -> None:
    data = encoded("png")
    left, right = (Picture(data, crop) for crop in crops(1200, 600))
    assert pixels(left, 56).reshape(-1, 3).mean(0).round().tolist() == [200, 20, 10]
    assert pixels(right, 56).reshape(-1, 3).mean(0).round().tolist() == [10, 20, 200]
    assert len({left.digest, right.digest, Picture(data, None).digest}) == 3
    assert crops(600, 600) == crops(500, 300) == []


def test_the_limit_of_pixels_is_that_of_the_header() -> None:
    assert size_of(png(20, 30), 600) == (20, 30)
    with pytest.raises(TooLarge):
        size_of(png(20, 30), 599)


@given(cut=st.integers(0, 99), at=st.integers(0, 99), value=st.integers(0, 255))
def test_a_damaged_file_is_an_image_or_refused(cut: int, at: int, value: int) -> None:
    data = bytearray(png(16, 16)[: len(png(16, 16)) - cut])
    if data:
        data[at % len(data)] = value
    try:
        size_of(bytes(data), 10**6)
        assert pixels(Picture(bytes(data), None), 8).shape == (8, 8, 3)
    except (InvalidRequest, TooLarge):
        return
