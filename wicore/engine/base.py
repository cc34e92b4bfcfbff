"""The engine contract.

An engine owns the weights and the device pool, the memory that the KV blocks live in. It knows
nothing of jobs, queues or priorities: each step it is told which blocks belong to which sequence,
which tokens are new, and where a token must be sampled.

Terms
    token     one id; position p is its 0-based index in its sequence.
    block     `block_tokens` consecutive positions of one sequence, all layers of one pool.
    pool      "global" holds the layers that attend to every position, "window" the layers that
              attend to the last `window` positions. The two are sized and numbered apart.
    table     physical block ids by logical block index (position // block_tokens).

What is made for each sequence in each step is not to be changed by anybody, and not frozen all the same: that
would take five times as long to make, while the device waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wicore.sampling import SampledToken, SamplingState

Pool = Literal["global", "window"]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of the KV cache, as HMT needs it to size, move and fingerprint blocks."""

    block_tokens: int
    global_layers: int
    window_layers: int
    kv_heads: int
    head_dim: int
    window: int
    """A query at position q of a window layer sees positions > q - window."""
    dtype: str
    """numpy name of a stored element, e.g. "float32"; "int8" are codes, with a float32 scale a vector."""

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector: K or V of one head at one position."""
        return self.head_dim * np.dtype(self.dtype).itemsize + (4 if self.dtype == "int8" else 0)

    def block_bytes(self, pool: Pool) -> int:
        """Bytes of one block: K and V, every layer of the pool."""
        layers = self.global_layers if pool == "global" else self.window_layers
        return 2 * layers * self.block_tokens * self.kv_heads * self.vector_bytes


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is and what it can hold; constant for its lifetime."""

    name: str
    device: str
    weights: str
    """Weight format in use, e.g. "int8" or "float32"."""
    layout: KVLayout
    global_blocks: int
    window_blocks: int
    vocab_size: int
    max_context: int
    """Longest sequence, in tokens."""
    fingerprint: str
    """Changes whenever KV computed before can no longer be used (weights, dtype, layout, RoPE)."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Bytes of device memory by what they are for; empty where the device is main memory."""
    copies_by_layer: bool = False
    """Whether a step may read blocks of copies in that are still under way (`SequenceInput.arriving`)."""


@dataclass(frozen=True, slots=True)
class ImageRows:
    """An image in a sequence: what enters the first layer in place of its tokens' embeddings.

    Its tokens see each other, all of them, beside what comes before: no step computes some of them and leaves
    the rest to a later one, though the KV of leading ones may be in the pool already.
    """

    start: int
    """Position of its first token."""
    rows: NDArray[np.float32]
    """[tokens, hidden], as a vision encoder gives them: not scaled as embeddings are."""

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + len(self.rows)


@dataclass(slots=True)
class SequenceInput:
    """One sequence's share of a step. A table that is the same array as in an earlier plan holds the same.

    Positions `start .. start + len(tokens) - 1` are computed and their KV written. Both tables must
    already cover them. Blocks that other sequences share are only ever read: a writer owns the
    blocks its new positions fall in.
    """

    key: int
    """The caller's name for the sequence."""
    tokens: NDArray[np.int32]
    """New token ids, shape [n], n >= 1. A negative one is an image's: it only names content, and its position
    lies in one of `images`."""
    start: int
    """Position of tokens[0]; earlier positions are in the pool already."""
    global_table: NDArray[np.int32]
    """Physical blocks of the global pool, logical blocks 0 .. ceil((start + n) / block_tokens) - 1."""
    window_table: NDArray[np.int32]
    """Physical blocks of the window pool, from logical block `window_first` on, covering at least
    positions max(0, start - window + 1) .. start + n - 1."""
    window_first: int
    sampling: SamplingState | None
    """Sample a token after the last new position; None for a prompt chunk that is not the last."""
    streamed: int = 0
    """The first `streamed` entries of the global table are not blocks of the device pool but slots of host
    memory, which attention reads from there: a sequence may be longer than the device pool. Never blocks
    that the step writes."""
    images: Sequence[ImageRows] = ()
    """Those that have any of the new positions, by position. Each ends at or before the last of these."""
    arriving: Sequence[Ticket] = ()
    """Copies in, begun before the step, of blocks in these tables that need not be complete: each layer waits
    for its own part of them. Only for an engine whose `info.copies_by_layer` says so."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: every sequence at most once, in any order."""

    sequences: tuple[SequenceInput, ...]


@dataclass(slots=True)
class SequenceOutput:
    """What a step did for one sequence."""

    token: SampledToken | None
    """None when the input asked for no sample."""
    mass: NDArray[np.float32]
    """Attention mass by logical block, shape [blocks of global_table]: the share of attention that
    this step's queries gave each block, averaged over heads, global layers and queries. Sums to 1."""


@dataclass(frozen=True, slots=True)
class StepResult:
    outputs: Mapping[int, SequenceOutput] = field(default_factory=dict)
    """By the `key` of the input; one for every input."""


class Ticket(Protocol):
    """An asynchronous copy under way."""

    def done(self) -> bool:
        """Whether the copy is complete; never blocks."""

    def wait(self) -> None:
        """Block until the copy is complete. Raises EngineError when it failed."""


class Completed:
    """The ticket of a copy that was made at once."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return


class PendingStep(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Block until the step is computed: its KV is in the pool then, and its tokens are sampled. To be
        called once. Raises EngineError when the device failed: the pool is then undefined."""


class WhenAsked:
    """The pending step of an engine that computes on the caller's thread: in `result`, so that what the
    caller does between `start` and `result` comes first."""

    def __init__(self, compute: Callable[[], StepResult]) -> None:
        self._compute = compute

    def result(self) -> StepResult:
        return self._compute()


class VisionEncoder(Protocol):
    """The vision tower and the projector that follows it. Calls may come from any thread, beside steps."""

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The rows of one image, [VisionConfig.tokens, hidden]; the same for the same pixels.

        `pixels` is RGB, uint8 [size, size, 3] with size = VisionConfig.image_size. Raises ValueError for
        another shape and EngineError when the device failed.
        """

    def close(self) -> None:
        """Release what it holds; idempotent."""


@runtime_checkable
class Engine(Protocol):
    """What the worker drives. Calls come from one thread, except `close`."""

    @property
    def info(self) -> EngineInfo:
        """Constant for the engine's lifetime."""

    def start(self, plan: StepPlan) -> PendingStep:
        """Begin to compute the plan; `result` of what is returned ends it, and must come before the next
        `start`.

        Meanwhile blocks may be copied, and the caller does what need not wait for the tokens; it does not
        change the plan, its tables or its sampling states. The text of a sequence does not depend on what
        else is in the plan, nor on how its prompt is cut into chunks. Raises ValueError for a plan that
        breaks the contract, before anything is written, and EngineError when the device failed.
        """

    def step(self, plan: StepPlan) -> StepResult:
        """`start(plan).result()`."""

    def host_memory(self, pool: Pool, slots: int) -> NDArray[np.uint8]:
        """The host tier's memory, uint8 [slots, layout.block_bytes(pool)], to be asked for once a pool.

        Page-aligned and contiguous, of the kind that copies are fastest from, and untouched pages take no
        memory where the system allows it. `streamed` table entries are its rows. It lives as long as the
        engine. Raises ValueError when asked twice for a pool.
        """

    def copy_out(self, pool: Pool, blocks: Sequence[int], rows: Sequence[NDArray[np.uint8]]) -> Ticket:
        """Copy blocks of the device pool to as many rows, each uint8 [layout.block_bytes(pool)] (a 2-D
        array is a sequence of rows; rows of `host_memory` copy fastest).

        Steps may run meanwhile. The blocks must not be written, nor the rows read, before the ticket is done.
        """

    def copy_in(self, pool: Pool, rows: Sequence[NDArray[np.uint8]], blocks: Sequence[int]) -> Ticket:
        """Copy rows (as `copy_out` filled them) into blocks that no step reads; not readable before the
        ticket is done, but for steps that name it as `arriving`, as the rows must not change before."""

    def close(self) -> None:
        """Release the device; the result of a step under way is lost. Idempotent."""
