"""What the scheduler is given and gives, and what it knows of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wicore.engine.base import ImageRows, SequenceInput
from wicore.errors import ConfigError
from wicore.hmt import CacheManager
from wicore.hmt.chain import TokenChain
from wicore.request import Priority
from wicore.sampling import SampledToken, SamplingState


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a step. Raises ConfigError when they leave no room for prompts."""

    max_batch: int
    """Sequences that run together."""
    token_budget: int
    """New tokens a step, decodes and prompt chunks together."""
    prompt_chunks: int = 4
    """Sequences whose prompt advances in one step: an engine computes these one by one."""

    def __post_init__(self) -> None:
        if self.token_budget <= self.max_batch:
            raise ConfigError(
                f"scheduler.token_budget: {self.token_budget} must exceed scheduler.max_batch"
                f" ({self.max_batch}), or prompts would stand still while all slots decode",
                param="scheduler.token_budget",
            )


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """A sequence to run: one choice of one job."""

    key: int
    """The caller's name for it, unique among the sequences present."""
    prompt: Sequence[int]
    """At least one token."""
    generated: Sequence[int]
    """Output tokens of an earlier attempt; `sampling` has observed them already."""
    max_tokens: int
    """Output tokens in all, those in `generated` included."""
    sampling: SamplingState
    priority: Priority
    images: Sequence[ImageRows] = ()
    """Those of the prompt, by position."""
    chain: TokenChain | None = None
    """Of prompt and `generated`, by the cache's `chain`, if it was made before, on a thread that has time for
    it. The scheduler appends to it."""


@dataclass(slots=True)
class TokenOut:
    """A token that a step added to a sequence."""

    key: int
    token: SampledToken


class ScheduledSequence:
    """A sequence present. `chain` is prompt and output so far; `computed` counts those with KV."""

    __slots__ = (
        "arrival",
        "cached",
        "chain",
        "chunk",
        "computed",
        "key",
        "left",
        "level",
        "passed",
        "positions",
        "prepared",
        "restoring",
        "running",
        "sampling",
    )

    def __init__(self, request: SequenceRequest, cache: CacheManager, arrival: int) -> None:
        self.key = request.key
        self.sampling = request.sampling
        self.level = int(request.priority)
        self.arrival = arrival
        chain = request.chain
        self.chain = cache.chain([*request.prompt, *request.generated]) if chain is None else chain
        self.left = request.max_tokens - len(request.generated)
        """Output tokens still to come."""
        self.positions = len(request.prompt) + request.max_tokens - 1
        """Positions it will have computed at the end: all but the last token's."""
        self.computed = 0
        self.cached: int | None = None
        """Tokens whose KV was there when it first started; None: it has not started."""
        self.running = False
        """Admitted: it has a slot and blocks."""
        self.restoring = False
        """Admitted, with blocks still on their way."""
        self.chunk = 0
        """New tokens in the step being planned or in flight."""
        self.prepared: SequenceInput | None = None
        """Its share of the next step, made while the one before runs: the token which that one gives."""
        self.passed = 0

    @property
    def pending(self) -> int:
        """Tokens without KV: one when decoding, more when prefilling, none when nothing may follow."""
        return self.chain.length - self.computed if self.left and not self.restoring else 0

    @property
    def samples(self) -> bool:
        """Whether the planned chunk reaches the end, so that a token is drawn."""
        return self.computed + self.chunk == self.chain.length


def rank(sequence: ScheduledSequence) -> tuple[int, int]:
    return sequence.level, sequence.arrival
