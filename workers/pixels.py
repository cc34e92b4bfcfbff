"""Pixels of pictures, those of the next one made by a thread while another is encoded.

Decoding a photograph takes longer than a GPU takes to encode it. A file is decoded once for all its crops, if
they are asked for one after the other; no more than one decoded file is held.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from wicore.vision.pixels import Picture, upright, view

Pixels = NDArray[np.uint8]


class PixelMaker:
    """For one thread, which takes pictures and says what it expects to take next."""

    def __init__(self, side: int) -> None:
        """`side` in pixels, of the square that pictures are shown on."""
        self._side = side
        self._thread = ThreadPoolExecutor(1, "pixels")
        self._expected: tuple[bytes, Future[Pixels]] | None = None
        self._decoded: tuple[bytes, Pixels] | None = None
        """The file whose digest this is. The thread's own."""

    def take(self, picture: Picture) -> Pixels:
        """`wicore.vision.pixels.pixels`: RGB, uint8 [side, side, 3]. Raises InvalidRequest as it does."""
        expected, self._expected = self._expected, None
        if expected is not None and expected[0] == picture.digest:
            return expected[1].result()
        return self._thread.submit(self._make, picture).result()

    def expect(self, picture: Picture | None) -> None:
        """Begin to make these pixels; None: nothing is expected, and nothing is held any longer."""
        if picture is None:
            self._expected = None
            self._thread.submit(self._forget)
        else:
            self._expected = picture.digest, self._thread.submit(self._make, picture)

    def close(self) -> None:
        """End the thread, after the picture that it has begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, picture: Picture) -> Pixels:
        if self._decoded is None or self._decoded[0] != picture.file_digest:
            self._decoded = None  # before the next one: each may take 150 MB
            self._decoded = picture.file_digest, upright(picture.data)
        return view(self._decoded[1], picture.crop, self._side)

    def _forget(self) -> None:
        self._decoded = None
