"""`python -m tests.hanging_encoder`: the worker process, its encoder never coming back from an image."""

from __future__ import annotations

import sys
import threading
from typing import Any

from tests.seeing import seeing_model
from workers import gpu


class HangingEncoder:
    def encode(self, pixels: Any) -> Any:
        threading.Event().wait()


if __name__ == "__main__":
    gpu.load_model = seeing_model
    gpu.create_vision = lambda settings, model, engine: HangingEncoder()  # type: ignore
    sys.exit(gpu.main())
