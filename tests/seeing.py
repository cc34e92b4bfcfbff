"""The tiny model with eyes, and encoders that tests hold in their hands."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import numpy as np

from wicore.config import Settings
from wicore.gemma3.config import VisionConfig
from wicore.model import Model, load_model

VISION = VisionConfig(
    hidden_size=24,
    layers=2,
    heads=2,
    intermediate_size=40,
    image_size=56,
    patch_size=14,
    tokens=4,
    layer_norm_eps=1e-6,
    start_token_id=509,
    end_token_id=510,
    soft_token_id=511,
)
PATIENCE_S = 20.0


def seeing_model(settings: Settings) -> Model:
    """The model of these settings, as one that takes images."""
    model = load_model(settings)
    checkpoint = copy.copy(model.checkpoint)
    checkpoint.config = replace(checkpoint.config, vision=VISION)
    return replace(model, checkpoint=checkpoint)


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
