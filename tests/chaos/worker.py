"""The worker process of the chaos suite: `python -m tests.chaos.worker OWNER [BREAK]`.

As `workers.gpu`, save that its owner is given, its accounts are checked when it ends (it fails if they are
wrong), and a sequence marked as poison kills the process as a fault in a kernel would.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from tests.chaos import breaks
from tests.chaos.jobs import POISON_SEED, POISON_TOKENS
from wicore.engine.base import Engine, PendingStep, SequenceInput, StepPlan
from workers import gpu
from workers.worker import Worker

POISONED = "poisoned"
"""The last line of the log of a worker that ran poison."""


class Mortal:
    """An engine whose process dies of poison."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def start(self, plan: StepPlan) -> PendingStep:
        if any(map(_is_deadly, plan.sequences)):
            os.write(2, f"{POISONED}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        return self._engine.start(plan)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _is_deadly(sequence: SequenceInput) -> bool:
    drawn = sequence.sampling
    return drawn is not None and drawn.params.seed == POISON_SEED and drawn.position >= POISON_TOKENS


class CheckedWorker(Worker):
    def run(self) -> None:
        super().run()
        self.check()


def main(owner: str, broken: str | None = None) -> int:
    create_engine = gpu.create_engine
    gpu.create_engine = lambda settings, model: Mortal(create_engine(settings, model))  # type: ignore
    gpu.new_owner = lambda: owner
    gpu.Worker = CheckedWorker  # type: ignore[misc]
    if broken:
        breaks.apply(broken)
    return gpu.main()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
