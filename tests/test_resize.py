"""Resizing to the square that a tower takes: Pillow's bilinear filter, antialiased."""

from __future__ import annotations

import numpy as np
import pytest

from wicore.vision.resize import to_square


@pytest.mark.parametrize(
    ("width", "height", "by_pillow"),
    [
        (13, 9, [[106, 130, 107, 136], [109, 122, 119, 118], [129, 111, 128, 116], [148, 117, 118, 119]]),
        (40, 30, [[120, 123, 128, 131], [129, 122, 125, 129], [131, 127, 122, 125], [129, 131, 124, 123]]),
        (
            3,
            2,
            [
                [0, 15, 37, 59, 74],
                [9, 24, 46, 68, 83],
                [46, 61, 83, 105, 120],
                [82, 97, 119, 141, 156],
                [91, 106, 128, 150, 165],
            ],
        ),
        (
            10,
            3,
            [
                [26, 93, 167, 113, 51],
                [62, 129, 152, 98, 87],
                [117, 184, 130, 76, 142],
                [150, 104, 108, 131, 131],
                [172, 51, 93, 167, 123],
            ],
        ),
    ],
)
def test_resizing_is_pillows_bilinear(width: int, height: int, by_pillow: list[list[int]]) -> None:
    rows, columns = np.mgrid[:height, :width]
    grey = ((37 * columns + 91 * rows) % 256).astype(np.uint8)
    square = to_square(np.stack([grey, 255 - grey, grey], -1), len(by_pillow))
    assert np.abs(square[..., 0].astype(int) - by_pillow).max() <= 1
    assert (square[..., 2] == square[..., 0]).all()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 3000), (100_000, 1), (56, 700), (3, 56)])
def test_one_colour_stays_one_whatever_the_shape(width: int, height: int) -> None:
    assert np.unique(to_square(np.full((height, width, 3), 255, np.uint8), 56)).tolist() == [255]


def test_an_image_of_the_size_is_returned_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    assert to_square(image, 56) is image
