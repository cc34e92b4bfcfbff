"""The tiny model with eyes, and an encoder that tests hold."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from tests.engines import FIXTURES
from wicore.config import Settings
from wicore.gemma3.checkpoint import open_checkpoint
from wicore.gemma3.config import VisionConfig
from wicore.model import Model, load_model

SEEING = FIXTURES / "tiny-image"
"""A checkpoint with a vision tower."""
PATIENCE_S = 20.0


def _vision() -> VisionConfig:
    found = open_checkpoint(SEEING).config.vision
    assert found is not None
    return found


VISION = _vision()


def seeing_model(settings: Settings) -> Model:
    """The model that takes images, under the name of that of these settings."""
    named = settings.model.model_copy(update={"path": str(SEEING), "name": "tiny"})
    return load_model(settings.model_copy(update={"model": named}))


class HeldEncoder:
    """Encodes an image when it is let, to rows of its mean; raises `error` instead, if there is one."""

    def __init__(self, hidden: int = 64, *, held: bool = True) -> None:
        self._hidden = hidden
        self._begun = threading.Semaphore(0)
        self._let = threading.Semaphore(0)
        self._held = held
        self.error: Exception | None = None
        self.seen: list[float] = []
        """The mean of each image, in order."""
        self.closed = False

    def encode(self, pixels: Any) -> Any:
        assert pixels.shape == (VISION.image_size, VISION.image_size, 3)
        self.seen.append(float(np.float32(pixels.mean())))
        self._begun.release()
        if self._held:
            assert self._let.acquire(timeout=PATIENCE_S)
        if self.error is not None:
            raise self.error
        return np.full((VISION.tokens, self._hidden), self.seen[-1], np.float32)

    def begun(self) -> None:
        """Wait until another image is being encoded."""
        assert self._begun.acquire(timeout=PATIENCE_S)

    def let(self, count: int = 1) -> None:
        """Have so many images done."""
        self._let.release(count)

    def close(self) -> None:
        self.closed = True
