"""Checks that every engine makes of a plan before it computes anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import EngineInfo, SequenceInput, StepPlan


def check_plan(plan: StepPlan, info: EngineInfo, host_slots: int | None = None) -> None:
    """Raise ValueError naming the sequence and the rule that the plan breaks.

    `host_slots` is how many the global pool's host memory has, None before it was asked for.
    """
    sequences = plan.sequences
    keys = [s.key for s in sequences]
    if len(set(keys)) != len(keys):
        raise ValueError(f"plan: a sequence occurs twice in {keys}")
    for sequence in sequences:
        _check_sequence(sequence, info, host_slots)
    if not _all_within(sequences, info, host_slots):
        for sequence in sequences:
            _check_ids(sequence, info, host_slots)


def _check_sequence(s: SequenceInput, info: EngineInfo, host_slots: int | None) -> None:
    block, window = info.layout.block_tokens, info.layout.window
    end = s.start + len(s.tokens)
    if not len(s.tokens) or s.start < 0 or end > info.max_context:
        raise ValueError(f"sequence {s.key}: positions {s.start}..{end} are not in 0..{info.max_context}")
    blocks = -(-end // block)
    if len(s.global_table) < blocks:
        raise ValueError(f"sequence {s.key}: {len(s.global_table)} global blocks, {blocks} needed")
    first_needed = max(0, s.start - window + 1) // block
    if s.window_first > first_needed or s.window_first + len(s.window_table) < blocks:
        raise ValueError(
            f"sequence {s.key}: window blocks {s.window_first}..{s.window_first + len(s.window_table)}, "
            f"needed {first_needed}..{blocks}"
        )
    if s.streamed:
        if host_slots is None:
            raise ValueError(f"sequence {s.key}: streamed blocks, and host_memory was not asked for")
        if not 0 < s.streamed * block <= s.start:
            raise ValueError(
                f"sequence {s.key}: {s.streamed} streamed blocks do not end before position {s.start}, "
                "the first that is written"
            )


def _all_within(sequences: Sequence[SequenceInput], info: EngineInfo, host_slots: int | None) -> bool:
    """Whether every id of every sequence is in range; all at once, for there are many."""
    return (
        _within([s.tokens for s in sequences], info.vocab_size)
        and _within([s.global_table[s.streamed :] for s in sequences], info.global_blocks)
        and _within([s.window_table for s in sequences], info.window_blocks)
        and _within([s.global_table[: s.streamed] for s in sequences if s.streamed], host_slots or 0)
    )


def _within(parts: Sequence[NDArray[np.int32]], limit: int) -> bool:
    ids = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < limit)


def _check_ids(s: SequenceInput, info: EngineInfo, host_slots: int | None) -> None:
    if s.tokens.min() < 0 or s.tokens.max() >= info.vocab_size:
        raise ValueError(f"sequence {s.key}: a token id is not in 0..{info.vocab_size - 1}")
    slots, blocks = s.global_table[: s.streamed], s.global_table[s.streamed :]
    for ids, limit, what in (
        (slots, host_slots or 0, "a slot of host memory"),
        (blocks, info.global_blocks, "a block id"),
        (s.window_table, info.window_blocks, "a block id"),
    ):
        if len(ids) and (ids.min() < 0 or ids.max() >= limit):
            raise ValueError(f"sequence {s.key}: {what} is not in 0..{limit - 1}")
