"""An engine that computes nothing, for measuring and testing the service around one.

No weights, no attention, no meaning: a token is a hash of the token before it and its position, each
step takes a fixed time, and sampling parameters are not applied. What it does keep is the contract:
the plan is validated, output depends on neither batch nor chunking nor preemption, and blocks can be
copied out and in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import (
    EngineInfo,
    KVLayout,
    PendingStep,
    Pool,
    SequenceInput,
    SequenceOutput,
    StepPlan,
    StepResult,
    Ticket,
)
from wicore.engine.copies import Copier, HostMemory
from wicore.engine.plans import check_pixels, check_plan
from wicore.gemma3.config import VisionConfig
from wicore.sampling import Constraint, SampledToken, philox

_OVERSLEEP_S = 0.0002
"""What a sleep may last too long; the rest of the step is waited out awake, in turns with other threads."""
_FIRST_TOKEN = 256
"""Lower ids are control and byte tokens in Gemma's vocabulary: never produced, so text never ends early."""


def null_layout(block_tokens: int, window: int) -> KVLayout:
    """One layer of each kind, with rows of a size that moving them costs something."""
    return KVLayout(block_tokens, 1, 1, 1, 128, window, "uint8")


class _Timed:
    """A result that is due at a time of the monotonic clock."""

    def __init__(self, result: StepResult, due: float) -> None:
        self._result, self._due = result, due

    def result(self) -> StepResult:
        time.sleep(max(0.0, self._due - time.monotonic() - _OVERSLEEP_S))
        while time.monotonic() < self._due:
            time.sleep(0)
        return self._result


class NullEngine:
    """Implements `wicore.engine.base.Engine`. A step lasts `step_ms` from its start, whatever is in it.

    Tokens lie in [256, vocab_size). Where logprobs are asked for the token has 0, being certain. The
    fingerprint is constant: what one null engine "computed" any other would have.
    """

    def __init__(
        self,
        *,
        step_ms: float,
        global_blocks: int,
        window_blocks: int,
        block_tokens: int = 32,
        window: int = 512,
        vocab_size: int = 262_144,
        max_context: int = 32_768,
    ) -> None:
        if vocab_size <= _FIRST_TOKEN:
            raise ValueError(f"vocab_size: got {vocab_size}; must exceed {_FIRST_TOKEN}")
        layout = null_layout(block_tokens, window)
        self._info = EngineInfo(
            name="null",
            device="none",
            weights="none",
            layout=layout,
            global_blocks=global_blocks,
            window_blocks=window_blocks,
            vocab_size=vocab_size,
            max_context=max_context,
            fingerprint="null",
        )
        self._step_s = step_ms / 1000
        self._host, self._copier = HostMemory(layout), Copier()
        self._memory: dict[Pool, NDArray[np.uint8]] = {
            "global": np.zeros((global_blocks, layout.block_bytes("global")), np.uint8),
            "window": np.zeros((window_blocks, layout.block_bytes("window")), np.uint8),
        }

    @property
    def info(self) -> EngineInfo:
        return self._info

    def start(self, plan: StepPlan) -> PendingStep:
        deadline = time.monotonic() + self._step_s
        check_plan(plan, self._info, self._host.slots("global"))
        sampled = [sequence for sequence in plan.sequences if sequence.sampling is not None]
        tokens = dict(zip((sequence.key for sequence in sampled), self._tokens(sampled), strict=True))
        outputs = {}
        for sequence in plan.sequences:
            blocks = len(sequence.global_table)
            mass = np.full(blocks, 1 / blocks, np.float32)
            outputs[sequence.key] = SequenceOutput(tokens.get(sequence.key), mass)
        return _Timed(StepResult(outputs), deadline)

    def step(self, plan: StepPlan) -> StepResult:
        return self.start(plan).result()

    def host_memory(self, pool: Pool, slots: int) -> NDArray[np.uint8]:
        return self._host.allocate(pool, slots)

    def copy_out(self, pool: Pool, blocks: Sequence[int], rows: Sequence[NDArray[np.uint8]]) -> Ticket:
        memory = self._memory[pool]

        def copy(block: int, row: NDArray[np.uint8]) -> None:
            row[:] = memory[block]

        return self._copier.start(copy, blocks, rows)

    def copy_in(self, pool: Pool, rows: Sequence[NDArray[np.uint8]], blocks: Sequence[int]) -> Ticket:
        return self._copier.start(self._memory[pool].__setitem__, blocks, rows)

    def close(self) -> None:
        self._copier.close()

    def _tokens(self, sequences: Sequence[SequenceInput]) -> list[SampledToken]:
        counters = np.zeros((len(sequences), 4), np.uint32)
        for row, sequence in enumerate(sequences):
            counters[row, :2] = sequence.tokens[-1], sequence.start + len(sequence.tokens)
        words = philox(counters, np.zeros((len(sequences), 2), np.uint32))[:, 0]
        span = self._info.vocab_size - _FIRST_TOKEN
        ids = (words % np.uint32(span) + np.uint32(_FIRST_TOKEN)).tolist()
        for row, sequence in enumerate(sequences):
            if sequence.sampling is not None and sequence.sampling.constraint is not None:
                ids[row] = _allowed(sequence.sampling.constraint, int(words[row]))
        return [_certain(token, sequence) for token, sequence in zip(ids, sequences, strict=True)]


class NullVision:
    """`VisionEncoder` whose rows are zeros: the null engine asks only how many there are."""

    def __init__(self, vision: VisionConfig, hidden: int) -> None:
        """`hidden` is the width of the text model."""
        self._side, self._shape = vision.image_size, (vision.tokens, hidden)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        check_pixels(pixels, self._side)
        return np.zeros(self._shape, np.float32)

    def close(self) -> None:
        return


def _allowed(constraint: Constraint, word: int) -> int:
    """One of the tokens that a constraint allows."""
    ids = np.flatnonzero(np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little"))
    return int(ids[word % len(ids)])


def _certain(token: int, sequence: SequenceInput) -> SampledToken:
    wanted = sequence.sampling.params.logprobs if sequence.sampling else None
    return SampledToken(token, None if wanted is None else 0.0, ((token, 0.0),) if wanted else ())
