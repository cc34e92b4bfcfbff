"""Checks that every engine makes of a plan before it computes anything."""

from __future__ import annotations

from wicore.engine.base import EngineInfo, SequenceInput, StepPlan


def check_plan(plan: StepPlan, info: EngineInfo, host_slots: int | None = None) -> None:
    """Raise ValueError naming the sequence and the rule that the plan breaks.

    `host_slots` is how many the global pool's host memory has, None before it was asked for.
    """
    keys = [s.key for s in plan.sequences]
    if len(set(keys)) != len(keys):
        raise ValueError(f"plan: a sequence occurs twice in {keys}")
    for sequence in plan.sequences:
        _check_sequence(sequence, info)
        _check_ids(sequence, info, host_slots)


def _check_sequence(s: SequenceInput, info: EngineInfo) -> None:
    block, window = info.layout.block_tokens, info.layout.window
    end = s.start + len(s.tokens)
    if not len(s.tokens) or s.start < 0 or end > info.max_context:
        raise ValueError(f"sequence {s.key}: positions {s.start}..{end} are not in 0..{info.max_context}")
    if s.tokens.min() < 0 or s.tokens.max() >= info.vocab_size:
        raise ValueError(f"sequence {s.key}: a token id is not in 0..{info.vocab_size - 1}")
    blocks = -(-end // block)
    if len(s.global_table) < blocks:
        raise ValueError(f"sequence {s.key}: {len(s.global_table)} global blocks, {blocks} needed")
    first_needed = max(0, s.start - window + 1) // block
    if s.window_first > first_needed or s.window_first + len(s.window_table) < blocks:
        raise ValueError(
            f"sequence {s.key}: window blocks {s.window_first}..{s.window_first + len(s.window_table)}, "
            f"needed {first_needed}..{blocks}"
        )


def _check_ids(s: SequenceInput, info: EngineInfo, host_slots: int | None) -> None:
    if s.streamed:
        if host_slots is None:
            raise ValueError(f"sequence {s.key}: streamed blocks, and host_memory was not asked for")
        if not 0 < s.streamed * info.layout.block_tokens <= s.start:
            raise ValueError(
                f"sequence {s.key}: {s.streamed} streamed blocks do not end before position {s.start}, "
                "the first that is written"
            )
    slots, blocks = s.global_table[: s.streamed], s.global_table[s.streamed :]
    for ids, limit, what in (
        (slots, host_slots or 0, "a slot of host memory"),
        (blocks, info.global_blocks, "a block id"),
        (s.window_table, info.window_blocks, "a block id"),
    ):
        if len(ids) and (ids.min() < 0 or ids.max() >= limit):
            raise ValueError(f"sequence {s.key}: {what} is not in 0..{limit - 1}")
