"""The tiny model with eyes, and encoders for it; `python -m tests.seeing`, the worker process with them."""

from __future__ import annotations

import copy
import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np

from wicore.config import Settings
from wicore.gemma3.config import VisionConfig
from wicore.model import Model, load_model
from workers import gpu

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


class PatchEncoder:
    """Rows that depend on every part of an image, as a tower's do: means of its parts, spread at random."""

    def __init__(self, hidden: int = 64) -> None:
        spread = np.random.default_rng(5).normal(0, 1, (3, hidden))
        self._spread = spread.astype(np.float32)

    def encode(self, pixels: Any) -> Any:
        half = VISION.image_size // 2
        means = pixels.reshape(2, half, 2, half, 3).mean((1, 3)).reshape(VISION.tokens, 3)
        return (means / 127.5 - 1).astype(np.float32) @ self._spread

    def close(self) -> None:
        return


def serve() -> int:
    """The worker process on the model with eyes."""
    gpu.load_model = seeing_model
    gpu.create_vision = lambda settings, model, engine: PatchEncoder()
    return gpu.main()


if __name__ == "__main__":
    sys.exit(serve())
