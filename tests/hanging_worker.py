"""`python -m tests.hanging_worker`: the worker process, its engine never coming back from its fifth step."""

from __future__ import annotations

import sys
import threading
from typing import Any

from wicore.engine.base import WhenAsked
from workers import gpu


class HangingEngine:
    def __init__(self, engine: Any) -> None:
        self._engine, self._steps = engine, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def start(self, plan: Any) -> Any:
        self._steps += 1
        if self._steps == 5:
            return WhenAsked(lambda: threading.Event().wait())  # type: ignore[arg-type,return-value]
        return self._engine.start(plan)


if __name__ == "__main__":
    create_engine = gpu.create_engine
    gpu.create_engine = lambda settings, model: HangingEngine(create_engine(settings, model))  # type: ignore
    sys.exit(gpu.main())
