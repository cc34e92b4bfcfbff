"""Checks that every engine makes of a plan before it computes anything."""

from __future__ import annotations

from wicore.engine.base import EngineInfo, SequenceInput, StepPlan


def check_plan(plan: StepPlan, info: EngineInfo) -> None:
    """Raise ValueError naming the sequence and the rule that the plan breaks."""
    keys = [s.key for s in plan.sequences]
    if len(set(keys)) != len(keys):
        raise ValueError(f"plan: a sequence occurs twice in {keys}")
    for sequence in plan.sequences:
        _check_sequence(sequence, info)


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
    for table, limit in ((s.global_table, info.global_blocks), (s.window_table, info.window_blocks)):
        if table.min() < 0 or table.max() >= limit:
            raise ValueError(f"sequence {s.key}: a block id is not in 0..{limit - 1}")
