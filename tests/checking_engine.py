"""An engine that stores, in place of KV, what each slot must hold, and verifies every read.

Position p of a sequence stands for a hash of its tokens 0 .. p, and of all rows of the image that it is in.
A step recomputes it from the slot before, so a table that points at the wrong block, an evicted block, a
block overwritten while shared or a slot read before it was written is found at once, or changes the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from wicore.engine.base import (
    Completed,
    EngineInfo,
    ImageRows,
    KVLayout,
    PendingStep,
    SequenceInput,
    SequenceOutput,
    StepPlan,
    StepResult,
    WhenAsked,
)
from wicore.sampling import SampledToken, SamplingState, sample

VOCABULARY = 24
_EMPTY = -1


def checking_layout(block_tokens: int, window: int) -> KVLayout:
    """Two numbers of eight bytes a position: as many as two rows of two float32."""
    return KVLayout(block_tokens, 1, 1, 1, 2, window, "float32")


def next_state(state: int, token: int, position: int) -> int:
    """What a slot holds: a hash of everything up to its position."""
    mixed = (state ^ (token + 1) * 0x9E3779B97F4A7C15 ^ (position + 1) << 17) % 2**64
    mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 % 2**64
    return (mixed ^ mixed >> 32) % 2**62


def contents(tokens: Sequence[int], start: int, images: Sequence[ImageRows]) -> list[int]:
    """What counts of the tokens from position `start` on: their ids, and in images what all rows hold."""
    found = list(tokens)
    for image in images:
        digest = hashlib.blake2b(image.rows.tobytes(), digest_size=4).digest()
        for position in range(max(start, image.start), image.end):
            found[position - start] = int.from_bytes(digest, "little")
    return found


def draw(state: int, sampling: SamplingState) -> SampledToken:
    logits = np.random.default_rng(state).normal(0, 2, (1, VOCABULARY)).astype(np.float32)
    return sample(logits, [sampling])[0]


def undisturbed(
    prompt: Sequence[int], tokens: int, sampling: SamplingState, images: Sequence[ImageRows] = ()
) -> list[int]:
    """The output of a sequence that runs alone, without a cache. Advances `sampling`."""
    state = 0
    for position, token in enumerate(contents(prompt, 0, images)):
        state = next_state(state, token, position)
    output: list[int] = []
    for position in range(len(prompt), len(prompt) + tokens):
        token = draw(state, sampling).id
        sampling.observe(token)
        output.append(token)
        state = next_state(state, token, position)
    return output


class CheckingEngine:
    """Steps plans over two pools of `layout`. Any breach of the contract is an AssertionError.

    An `Engine` with a layout whose blocks take as many bytes as its slots do: `checking_layout`.
    """

    def __init__(self, layout: KVLayout, global_blocks: int, window_blocks: int) -> None:
        self.layout = layout
        self.computed = 0
        """Tokens computed since the start."""
        self.pools = {
            name: np.full((blocks, layout.block_tokens, 2), _EMPTY, np.int64)
            for name, blocks in (("global", global_blocks), ("window", window_blocks))
        }
        self.host: dict[str, np.ndarray] = {}
        """Host memory, as `pools`; streamed blocks are read from it."""
        self._under_way = False
        self.info = EngineInfo(
            "checking", "none", "none", layout, global_blocks, window_blocks, VOCABULARY, 2**20, "checking"
        )

    def host_memory(self, pool: str, slots: int) -> np.ndarray:
        self.host[pool] = np.full((slots, *self.pools[pool].shape[1:]), _EMPTY, np.int64)
        return self.host[pool].reshape(slots, -1).view(np.uint8)

    def copy_out(self, pool: str, blocks: Sequence[int], rows: Sequence[np.ndarray]) -> Completed:
        for block, row in zip(blocks, rows, strict=True):
            row[:] = self.pools[pool][block].reshape(-1).view(np.uint8)
        return Completed()

    def copy_in(self, pool: str, rows: Sequence[np.ndarray], blocks: Sequence[int]) -> Completed:
        for block, row in zip(blocks, rows, strict=True):
            self.pools[pool][block].reshape(-1).view(np.uint8)[:] = row
        return Completed()

    def close(self) -> None:
        """Holds nothing."""

    def start(self, plan: StepPlan) -> PendingStep:
        assert not self._under_way, "one step at a time"
        self._under_way = True
        return WhenAsked(lambda: self._compute(plan))

    def step(self, plan: StepPlan) -> StepResult:
        return self.start(plan).result()

    def _compute(self, plan: StepPlan) -> StepResult:
        self._under_way = False
        assert plan.sequences, "a step computes something"
        keys = [sequence.key for sequence in plan.sequences]
        assert len(set(keys)) == len(keys), "every sequence at most once"
        self._assert_writers_own_their_blocks(plan)
        return StepResult({sequence.key: self._run(sequence) for sequence in plan.sequences})

    def _assert_writers_own_their_blocks(self, plan: StepPlan) -> None:
        size = self.layout.block_tokens
        holders: dict[tuple[str, int], set[int]] = {}
        written: set[tuple[str, int]] = set()
        for s in plan.sequences:
            for pool, table, first in (
                ("global", s.global_table, 0),
                ("window", s.window_table, s.window_first),
            ):
                assert table.dtype == np.int32
                skipped = s.streamed if pool == "global" else 0
                assert s.streamed * size <= s.start, "a streamed block is written"
                assert len(set(table[skipped:].tolist())) == len(table) - skipped, (
                    "a table names a block once"
                )
                for index, block in list(enumerate(table.tolist()))[skipped:]:
                    holders.setdefault((pool, block), set()).add(s.key)
                    if (first + index + 1) * size > s.start:
                        written.add((pool, block))
        for place in written:
            assert len(holders[place]) == 1, f"{place} is written while {holders[place]} hold it"

    def _assert_images_are_whole(self, s: SequenceInput) -> None:
        end, before, inside = s.start + len(s.tokens), 0, set()
        for image in s.images:
            assert image.start >= before, "images come one after the other"
            assert s.start < image.end <= end, "an image has new positions, and ends with or before them"
            assert len(image.rows) <= self.layout.window, "an image fits in the window"
            inside |= set(range(max(s.start, image.start), image.end))
            before = image.end
        negative = {position for position, token in enumerate(s.tokens.tolist(), s.start) if token < 0}
        assert negative == inside, "every image that has a new position is there"

    def _run(self, s: SequenceInput) -> SequenceOutput:
        size, window = self.layout.block_tokens, self.layout.window
        end = s.start + len(s.tokens)
        blocks = -(-end // size)
        assert len(s.tokens) >= 1
        assert s.tokens.dtype == np.int32
        assert len(s.global_table) == blocks, "the global table covers the new positions and no more"
        assert s.window_first <= max(0, s.start - window + 1) // size, "the window table starts in time"
        assert s.window_first + len(s.window_table) >= blocks, "the window table covers the new positions"
        self._assert_images_are_whole(s)
        for ticket in s.arriving:
            ticket.wait()

        blocks_read = self.pools["global"][s.global_table[s.streamed :]]
        if s.streamed:
            blocks_read = np.concatenate([self.host["global"][s.global_table[: s.streamed]], blocks_read])
        past = blocks_read.reshape(-1, 2)[: s.start]
        np.testing.assert_array_equal(past[:, 0], np.arange(s.start), f"sequence {s.key}: global KV")
        state = int(past[-1, 1]) if s.start else 0
        first_seen = max(0, s.start - window + 1)
        window_slots = self.pools["window"][s.window_table].reshape(-1, 2)
        seen = window_slots[first_seen - s.window_first * size : s.start - s.window_first * size]
        np.testing.assert_array_equal(seen, past[first_seen:], f"sequence {s.key}: window KV")

        for position, token in enumerate(contents(s.tokens.tolist(), s.start, s.images), s.start):
            state = next_state(state, token, position)
            block, slot = divmod(position, size)
            self.pools["global"][s.global_table[block], slot] = position, state
            self.pools["window"][s.window_table[block - s.window_first], slot] = position, state
        self.computed += len(s.tokens)
        mass = np.full(blocks, 1 / blocks, np.float32)
        return SequenceOutput(None if s.sampling is None else draw(state, s.sampling), mass)
