"""What engines in main memory share: the host tier's memory, and a thread that copies while steps run."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import KVLayout, Pool
from wicore.errors import EngineError

Bytes = NDArray[np.uint8]
Copy = Callable[[int, Bytes], None]
"""Copies one block from or to its row."""


class HostMemory:
    """The host tier's memory by pool, as `Engine.host_memory` gives it."""

    def __init__(self, layout: KVLayout, memory: Callable[[int], Bytes] | None = None) -> None:
        """`memory` gives so many bytes, page-aligned; without it they are pages that nothing has touched."""
        self._layout = layout
        self._memory = memory or _untouched
        self._rows: dict[Pool, Bytes] = {}

    def allocate(self, pool: Pool, slots: int) -> Bytes:
        """uint8 [slots, block_bytes], page-aligned.

        Raises ValueError when the pool has its memory already, or for a negative number of slots.
        """
        if pool in self._rows:
            raise ValueError(f"host memory of the {pool} pool: asked for twice")
        if slots < 0:
            raise ValueError(f"host memory of the {pool} pool: {slots} slots")
        size = self._layout.block_bytes(pool)
        rows = self._memory(max(1, slots * size))[: slots * size].reshape(slots, size)
        self._rows[pool] = rows
        return rows

    def slots(self, pool: Pool) -> int | None:
        """How many the pool has; None before it was asked for."""
        return len(self._rows[pool]) if pool in self._rows else None


def _untouched(size: int) -> Bytes:
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


class CopyTicket:
    """`Ticket` of copies that the copier thread makes."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        error = self._future.exception()
        if error is not None:
            raise EngineError(f"a copy of KV blocks failed: {error}") from error


class Copier:
    """One thread that copies blocks, in the order of the calls, while steps run beside it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "kv-copier")

    def start(self, copy: Copy, blocks: Sequence[int], rows: Sequence[Bytes]) -> CopyTicket:
        """Copy every block and its row by `copy`. Raises ValueError unless there are as many of both."""
        if len(blocks) != len(rows):
            raise ValueError(f"{len(blocks)} blocks and {len(rows)} rows: expected as many of both")
        return CopyTicket(self._thread.submit(_copy_all, copy, list(blocks), list(rows)))

    def close(self) -> None:
        """Finish what has been started, and end the thread. Idempotent."""
        self._thread.shutdown()


def _copy_all(copy: Copy, blocks: Sequence[int], rows: Sequence[Bytes]) -> None:
    for block, row in zip(blocks, rows, strict=True):
        copy(block, row)
