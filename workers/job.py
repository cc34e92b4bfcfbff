"""What the worker knows of a job from when it was taken until it has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from wicore.errors import WicoreError
from wicore.generation import Generation
from wicore.queue.consumer import Delivery
from wicore.request import TerminalType
from wicore.scheduler import SequenceRequest
from wicore.telemetry.serving import Times


@dataclass(eq=False, slots=True)
class Job:
    """A job that the engine thread has."""

    delivery: Delivery
    generation: Generation
    requests: list[tuple[int, SequenceRequest]]
    """By choice index."""
    deadline: float | None
    """Monotonic time at which it expires."""
    times: Times
    keys: dict[int, int] = field(default_factory=dict)
    """Choice index by sequence key, of the choices that have not ended."""
    seeing: bool = False
    """Its images are being encoded: the scheduler has nothing of it yet."""
    ending: tuple[TerminalType, WicoreError | None] | None = None

    def told_of(self, key: int, waits: Callable[[int], bool]) -> dict[str, object] | None:
        """What others are told of a choice; None when it has ended meanwhile. For any thread."""
        if (index := self.keys.get(key)) is None:
            return None
        delivery, generation = self.delivery, self.generation
        return {
            "job": delivery.job_id,
            "index": index,
            "priority": delivery.level.name.lower(),
            "attempt": delivery.attempt,
            "prompt_tokens": len(generation.prompt.token_ids),
            "tokens": generation.generated(index),
            "max_tokens": generation.prompt.max_tokens,
            "waits": self.seeing or waits(key),
            "started_ms": delivery.popped_ms,
        }
