"""What a step is told of a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import ImageRows, SequenceInput
from wicore.hmt import CacheManager
from wicore.scheduler.sequence import ScheduledSequence


def share(sequence: ScheduledSequence, cache: CacheManager) -> SequenceInput:
    """A sequence's share of the step that is planned: what was prepared, if anything."""
    prepared = sequence.prepared
    if prepared is not None:
        sequence.prepared = None
        return prepared
    start = sequence.computed
    tokens = sequence.chain.tokens(start, start + sequence.chunk)
    given = _input(sequence, cache, tokens, start, sequence.samples)
    if sequence.arriving:
        # The first step that reads the blocks waits for all of them.
        given.arriving, sequence.arriving = cache.arriving(sequence.key), False
    return given


def prepare(sequence: ScheduledSequence, cache: CacheManager) -> None:
    """Make its share of the step after the one in flight, if that is sure to be one more token on the blocks
    that it has."""
    end, chain = sequence.computed + sequence.chunk, sequence.chain
    if end == chain.length and sequence.left > 1 and cache.quiet(sequence.key, end):
        sequence.prepared = _input(sequence, cache, chain.coming(), end, True)


def _input(
    sequence: ScheduledSequence, cache: CacheManager, tokens: NDArray[np.int32], start: int, samples: bool
) -> SequenceInput:
    global_table, window_table, first, streamed = cache.tables(sequence.key)
    blocks = -(-(start + len(tokens)) // cache.layout.block_tokens)
    if len(global_table) > blocks:
        global_table = global_table[:blocks]
    if len(window_table) > blocks - first:
        window_table = window_table[: blocks - first]
    sampling = sequence.sampling if samples else None
    images: Sequence[ImageRows] = ()
    if start < sequence.image_end:
        end = start + len(tokens)
        images = [image for image in sequence.images if image.start < end and image.end > start]
    return SequenceInput(
        sequence.key, tokens, start, global_table, window_table, first, sampling, streamed, images
    )
