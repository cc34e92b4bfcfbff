"""RoPE rows by position, computed once and kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import Pool
from wicore.gemma3.config import Gemma3Config
from wicore.gemma3.rope import rope_table

Float = NDArray[np.float32]


class RopeTables:
    """Tables that grow with the longest position seen, so a short context stays small in memory."""

    def __init__(self, config: Gemma3Config) -> None:
        self._config = config
        self._tables: dict[Pool, tuple[Float, Float]] = {}

    def rows(self, pool: Pool, positions: NDArray[np.int64]) -> tuple[Float, Float]:
        """(cos, sin) of `positions`, each [n, head_dim / 2]."""
        longest = int(positions.max()) + 1
        cos, sin = self._tables.get(pool, (np.empty((0, 0), np.float32),) * 2)
        if len(cos) < longest:
            size = max(1024, 1 << (longest - 1).bit_length())
            half = self._config.head_dim // 2
            full = rope_table(self._config, pool, np.arange(size))
            cos, sin = (np.ascontiguousarray(table[:, :half]) for table in full)
            self._tables[pool] = cos, sin
        return cos[positions], sin[positions]
