"""Checks that every engine makes of a plan, and a vision encoder of an image, before it computes anything."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import EngineInfo, SequenceInput, StepPlan


def check_plan(
    plan: StepPlan, info: EngineInfo, host_slots: int | None = None, width: int | None = None
) -> None:
    """Raise ValueError naming the sequence and the rule that the plan breaks.

    `host_slots` is how many the global pool's host memory has, None before it was asked for; `width` what
    rows of images must have, None: any. The device waits for this, so ids are looked at all together, and
    one by one only if one is bad.
    """
    sequences = plan.sequences
    keys = {s.key for s in sequences}
    if len(keys) != len(sequences):
        raise ValueError(f"plan: a sequence occurs twice in {[s.key for s in sequences]}")
    block, window, longest = info.layout.block_tokens, info.layout.window, info.max_context
    streamed = pictured = False
    for s in sequences:
        count, first = len(s.tokens), s.window_first
        end = s.start + count
        if not count or s.start < 0 or end > longest:
            raise ValueError(f"sequence {s.key}: positions {s.start}..{end} are not in 0..{longest}")
        blocks = -(-end // block)
        if len(s.global_table) < blocks:
            raise ValueError(f"sequence {s.key}: {len(s.global_table)} global blocks, {blocks} needed")
        needed = max(0, s.start - window + 1) // block
        if first > needed or first + len(s.window_table) < blocks:
            raise ValueError(
                f"sequence {s.key}: window blocks {first}..{first + len(s.window_table)}, "
                f"needed {needed}..{blocks}"
            )
        if s.streamed:
            streamed = True
            _check_streamed(s, block, host_slots)
        if s.images:
            pictured = True
            _check_images(s, window, width)
    if not sequences:
        return
    tables = (
        [s.global_table[s.streamed :] for s in sequences] if streamed else [s.global_table for s in sequences]
    )
    tokens = [_text(s) for s in sequences] if pictured else [s.tokens for s in sequences]
    if not (
        _within(tokens, info.vocab_size)
        and _within(tables, info.global_blocks)
        and _within([s.window_table for s in sequences], info.window_blocks)
    ):
        for s in sequences:
            _check_ids(s, info)


def _check_streamed(s: SequenceInput, block: int, host_slots: int | None) -> None:
    if host_slots is None:
        raise ValueError(f"sequence {s.key}: streamed blocks, and host_memory was not asked for")
    if not 0 < s.streamed * block <= s.start:
        raise ValueError(
            f"sequence {s.key}: {s.streamed} streamed blocks do not end before position {s.start}, "
            "the first that is written"
        )
    if not _within([s.global_table[: s.streamed]], host_slots):
        raise ValueError(f"sequence {s.key}: a slot of host memory is not in 0..{host_slots - 1}")


def _check_images(s: SequenceInput, window: int, width: int | None) -> None:
    """That images come one after the other, have new positions, all to their end, and that these and no
    others have negative ids."""
    end, before = s.start + len(s.tokens), 0
    inside = np.zeros(len(s.tokens), np.bool_)
    for image in s.images:
        shape = image.rows.shape
        if len(shape) != 2 or width not in (None, shape[1]):
            raise ValueError(
                f"sequence {s.key}: rows of an image have shape {list(shape)}, not [tokens, {width}]"
            )
        if shape[0] > window:
            raise ValueError(f"sequence {s.key}: an image of {shape[0]} tokens, and the window has {window}")
        if image.start < before or not s.start < image.end <= end:
            raise ValueError(
                f"sequence {s.key}: an image at positions {image.start}..{image.end} does not end in"
                f" {s.start + 1}..{end}, the new ones, or overlaps the one before"
            )
        inside[max(0, image.start - s.start) : image.end - s.start] = True
        before = image.end
    wrong = np.flatnonzero((s.tokens < 0) != inside)
    if wrong.size:
        first = int(wrong[0])
        raise ValueError(
            f"sequence {s.key}: token id {s.tokens[first]} at position {s.start + first}, which is in"
            f" {'an' if inside[first] else 'no'} image; ids of images are negative, and no others"
        )


def _text(s: SequenceInput) -> NDArray[np.int32]:
    """The new ids without those of images, which name no embedding."""
    return np.maximum(s.tokens, 0) if s.images else s.tokens


def _check_ids(s: SequenceInput, info: EngineInfo) -> None:
    if not _within([_text(s)], info.vocab_size):
        raise ValueError(f"sequence {s.key}: a token id is not in 0..{info.vocab_size - 1}")
    for ids, limit in (
        (s.global_table[s.streamed :], info.global_blocks),
        (s.window_table, info.window_blocks),
    ):
        if not _within([ids], limit):
            raise ValueError(f"sequence {s.key}: a block id is not in 0..{limit - 1}")


def _within(parts: list[NDArray[np.int32]], limit: int) -> bool:
    """Whether all ids are in 0 .. limit - 1."""
    ids = np.concatenate(parts)
    return not ids.size or bool(ids.min() >= 0 and ids.max() < limit)


def check_pixels(pixels: NDArray[np.uint8], side: int) -> None:
    """Raise ValueError unless they are uint8 [side, side, 3]."""
    if pixels.shape != (side, side, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"pixels: expected uint8 {(side, side, 3)}, found {pixels.dtype} {pixels.shape}")
