"""What the scheduler is given and gives, and what it knows of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wicore.engine.base import ImageRows, SequenceInput
from wicore.errors import ConfigError, TooLarge
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
    image_tokens: int = 0
    """Of an image, which one step computes whole; 0: the model takes text alone."""

    @property
    def prompt_budget(self) -> int:
        """New tokens that prompts have in a step at least, however many sequences decode."""
        return self.token_budget - self.max_batch

    def __post_init__(self) -> None:
        if self.token_budget <= self.max_batch:
            raise ConfigError(
                f"scheduler.token_budget: {self.token_budget} must exceed scheduler.max_batch"
                f" ({self.max_batch}), or prompts would stand still while all slots decode",
                param="scheduler.token_budget",
            )
        if self.prompt_budget < self.image_tokens:
            raise ConfigError(
                f"scheduler.token_budget: {self.token_budget} less scheduler.max_batch ({self.max_batch})"
                f" leaves {self.prompt_budget} tokens for prompts, and an image takes {self.image_tokens} in"
                f" one step; raise it to {self.max_batch + self.image_tokens} or more",
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

    @property
    def at_once(self) -> int:
        """Most positions that one step must compute together: the largest image's, or one."""
        return max((len(image.rows) for image in self.images), default=1)


def check_images(request: SequenceRequest, limits: Limits) -> None:
    """Raise ValueError for images that do not lie in the prompt one after the other, and TooLarge for one
    that steps need not have room for."""
    before = 0
    for image in request.images:
        tokens = len(image.rows)
        if not tokens or image.start < before or image.end > len(request.prompt):
            raise ValueError(
                f"sequence {request.key}: an image at positions {image.start}..{image.end} does not lie in"
                f" {before}..{len(request.prompt)}, the rest of the prompt"
            )
        if tokens > limits.prompt_budget:
            raise TooLarge(
                f"messages: an image takes {tokens} tokens in one step, and scheduler.token_budget leaves"
                f" {limits.prompt_budget} for prompts beside scheduler.max_batch decodes; raise it",
                param="messages",
            )
        before = image.end


@dataclass(slots=True)
class TokenOut:
    """A token that a step added to a sequence."""

    key: int
    token: SampledToken


class ScheduledSequence:
    """A sequence present. `chain` is prompt and output so far; `computed` counts those with KV."""

    __slots__ = (
        "arrival",
        "arriving",
        "at_once",
        "cached",
        "chain",
        "chunk",
        "computed",
        "image_end",
        "images",
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
        self.images, self.at_once = request.images, request.at_once
        self.image_end = request.images[-1].end if request.images else 0
        """The position after its last image: from there on it is as a sequence without any."""
        self.computed = 0
        self.cached: int | None = None
        """Tokens whose KV was there when it first started; None: it has not started."""
        self.running = False
        """Admitted: it has a slot and blocks."""
        self.restoring = False
        """Admitted, with blocks still on their way to where a step may read them."""
        self.arriving = False
        """Its next step reads blocks that may still be on their way."""
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
    def least(self) -> int:
        """New tokens of its next chunk at least: what is left of the image that it begins in, or one."""
        ends = (image.end for image in self.images if image.start <= self.computed < image.end)
        return next(ends, self.computed + 1) - self.computed

    def uncut(self, count: int) -> int:
        """The most new tokens, up to `count`, after which no image is cut; 0 when only `least` would do."""
        end = self.computed + count
        cut = (image.start for image in self.images if image.start < end < image.end)
        return max(0, next(cut, end) - self.computed)

    @property
    def samples(self) -> bool:
        """Whether the planned chunk reaches the end, so that a token is drawn."""
        return self.computed + self.chunk == self.chain.length


def rank(sequence: ScheduledSequence) -> tuple[int, int]:
    return sequence.level, sequence.arrival
