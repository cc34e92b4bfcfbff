"""The pixels that a worker's encoder is given: made ahead, a file decoded once for its crops."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.images import damaged_png, png
from wicore.errors import InvalidRequest
from wicore.vision.pixels import Crop, Picture, pixels, upright
from workers.pixels import PixelMaker

SIDE = 16


class Decoder:
    """Notes what is decoded; waits for `gate`."""

    def __init__(self) -> None:
        self.files: list[bytes] = []
        self.decoded: list[weakref.ref[NDArray[np.uint8]]] = []
        self.begun, self.gate = threading.Semaphore(0), threading.Event()
        self.gate.set()

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        self.files.append(data)
        self.begun.release()
        assert self.gate.wait(10)
        image = upright(data).copy()
        self.decoded.append(weakref.ref(image))
        return image


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    found = Decoder()
    monkeypatch.setattr("workers.pixels.upright", found)
    return found


@pytest.fixture
def maker(decoder: Decoder) -> Iterator[PixelMaker]:
    found = PixelMaker(SIDE)
    yield found
    found.close()


def test_a_file_is_decoded_once_for_all_its_crops(maker: PixelMaker, decoder: Decoder) -> None:
    whole = Picture(png(40, 20))
    views = [whole, whole.part(Crop(0, 0, 20, 20)), whole.part(Crop(20, 0, 20, 20))]
    for view, following in zip(views, [*views[1:], None], strict=True):
        found = maker.take(view)
        maker.expect(following)
        np.testing.assert_array_equal(found, pixels(view, SIDE))
    assert decoder.files == [whole.data]


def test_what_is_expected_is_made_before_it_is_taken(maker: PixelMaker, decoder: Decoder) -> None:
    picture = Picture(png(seed=1))
    maker.expect(picture)
    assert decoder.begun.acquire(timeout=10)
    np.testing.assert_array_equal(maker.take(picture), pixels(picture, SIDE))
    assert len(decoder.files) == 1


def test_what_was_not_expected_is_made_all_the_same(maker: PixelMaker, decoder: Decoder) -> None:
    expected, other = Picture(png(seed=1)), Picture(png(seed=2))
    decoder.gate.clear()
    maker.expect(expected)
    assert decoder.begun.acquire(timeout=10)
    decoder.gate.set()
    np.testing.assert_array_equal(maker.take(other), pixels(other, SIDE))
    np.testing.assert_array_equal(maker.take(expected), pixels(expected, SIDE))


def test_a_damaged_file_fails_where_it_is_taken_and_nothing_else_does(maker: PixelMaker) -> None:
    whole, bad = Picture(png(seed=1)), Picture(damaged_png())
    maker.expect(bad)
    np.testing.assert_array_equal(maker.take(whole), pixels(whole, SIDE))
    for _ in range(2):
        maker.expect(bad)
        with pytest.raises(InvalidRequest, match="cannot be decoded"):
            maker.take(bad)
    np.testing.assert_array_equal(maker.take(whole), pixels(whole, SIDE))


def test_a_decoded_file_is_held_no_longer_than_more_of_it_is_expected(
    maker: PixelMaker, decoder: Decoder
) -> None:
    first, second = Picture(png(seed=1)), Picture(png(seed=2))
    maker.take(first)
    assert decoder.decoded[0]() is not None
    maker.take(second)
    assert decoder.decoded[0]() is None
    decoder.gate.clear()
    maker.expect(None)
    maker.expect(first)
    assert decoder.begun.acquire(timeout=10)
    assert decoder.begun.acquire(timeout=10)
    assert decoder.begun.acquire(timeout=10)  # the thread has come to the third file
    assert decoder.decoded[1]() is None
    decoder.gate.set()
    maker.take(first)
