"""What an engine's memory is laid out for."""

from __future__ import annotations

from dataclasses import dataclass

from wicore.engine.base import KVLayout
from wicore.engine.tensorrt.block_tables import entry_capacity
from wicore.engine.tensorrt.passes import SLICE

_MOST_ROWS = 8192
"""A longer prompt's products are no faster for more rows, and their memory is better used for KV."""

MASS_ROWS = 4
"""Rows of a prompt chunk whose attention mass stands for all of it, the last among them."""


@dataclass(frozen=True)
class Limits:
    """Of a pass over the layers, and of the tables of a step."""

    rows: int
    """Of a pass."""
    decode_rows: tuple[int, ...]
    """What decode passes are padded to, ascending; no pass has more sequences than the last."""
    entries: int
    """Of all block tables of a step together."""
    image_rows: int = 0
    """Of an image, which one pass has whole."""

    @property
    def samples(self) -> int:
        """Rows of a step that sample."""
        return self.decode_rows[-1]

    @property
    def listed(self) -> int:
        """Rows of a prompt pass that go through the kernels for single rows."""
        return max(MASS_ROWS * self.samples, self.image_rows)

    def bucket(self, rows: int) -> int:
        """What a decode pass of so many rows is padded to."""
        return next(size for size in self.decode_rows if size >= rows)

    @classmethod
    def of(
        cls,
        layout: KVLayout,
        *,
        max_batch: int,
        token_budget: int,
        max_context: int,
        invariant: bool,
        image_tokens: int = 0,
    ) -> Limits:
        """For steps as the scheduler makes them: `max_batch` sequences, `token_budget` new tokens, images of
        `image_tokens`."""
        decode = buckets(max(max_batch, SLICE) if invariant else max_batch)
        rows = decode[-1]
        if not invariant:
            rows = max(rows, min(-(-token_budget // SLICE) * SLICE, _MOST_ROWS))
        entries = entry_capacity(layout, decode[-1], max_context, max(token_budget, image_tokens))
        return cls(max(rows, image_tokens), decode, entries, image_tokens)


def buckets(most: int) -> tuple[int, ...]:
    """Row counts that decode passes are padded to: 1, 2, 4, multiples of 8 up to 64, then of 16; the last is
    the first that `most` rows fit in."""
    found = [1, 2, 4, *range(8, SLICE + 1, 8)]
    while found[-1] < most:
        found.append(found[-1] + 16)
    return tuple(rows for below, rows in zip((0, *found), found, strict=False) if below < most)
