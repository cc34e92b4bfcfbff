"""`python -m tests.failing_engine`: the worker process, its engine failing amid a poisoned step."""

from __future__ import annotations

import sys
from typing import Any

from wicore.engine.base import Engine, PendingStep, StepPlan, StepResult, WhenAsked
from wicore.errors import EngineError
from workers import gpu

POISON = 666
"""The seed of a sequence that the device does not survive."""


class FailingEngine:
    """Fails amid a step in which a poisoned sequence has got to its fourth token, and ever after."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.failed = self.closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def start(self, plan: StepPlan) -> PendingStep:
        drawn = [sequence.sampling for sequence in plan.sequences if sequence.sampling is not None]
        self.failed |= any(state.params.seed == POISON and state.position >= 3 for state in drawn)
        return WhenAsked(self._fail) if self.failed else self._engine.start(plan)

    def close(self) -> None:
        self._engine.close()
        self.closed = True
        if self.failed:
            raise EngineError("the device is still gone")

    def _fail(self) -> StepResult:
        raise EngineError("the device is gone")


if __name__ == "__main__":
    create_engine = gpu.create_engine
    gpu.create_engine = lambda settings, model: FailingEngine(create_engine(settings, model))  # type: ignore
    sys.exit(gpu.main())
