"""RMS norms along the residual stream, and what begins and ends it. The kernels are in kernels/norms.cu."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from wicore.engine.tensorrt.device import Device
from wicore.errors import EngineError

if TYPE_CHECKING:
    from wicore.gemma3.config import Gemma3Config


_THREADS = 1344
"""Of the blocks on a multiprocessor that go through many rows, together: registers allow each at least 40."""


class Norms:
    """Enqueues the kernels; rows are of the model's hidden size H, a multiple of 8.

    Norm factors are float32 [H], 1 + the checkpoint's weight.
    """

    def __init__(self, device: Device, config: Gemma3Config) -> None:
        hidden = config.hidden_size
        if hidden <= 0 or hidden % 8:
            raise EngineError(f"hidden size {hidden}: expected a positive multiple of 8")
        self._eps = config.rms_norm_eps
        self._embedding_scale = np.float32(hidden**0.5)
        # Two vectors of four values a thread.
        self._threads = min(1024, -(-hidden // 8 // 32) * 32)
        blocks = min(32, max(1, _THREADS // self._threads))
        self._most_blocks, self._factors_bytes = blocks * device.sms, 2 * 4 * hidden
        module = device.compile("norms.cu", {"HIDDEN": hidden, "THREADS": self._threads, "BLOCKS": blocks})
        self._embed = module.function("embed")
        self._norm = module.function("norm_rows")
        self._add_float = module.function("add_norm_float")
        self._add_half = module.function("add_norm_half", self._factors_bytes)
        self._gather = module.function("gather")

    def embed(
        self, stream: Any, rows: int, ids: int, table: int, weight: int, residual: int, normed: int
    ) -> None:
        """residual float32 [rows][H] = table half [vocab][H] at ids int32 [rows], times sqrt(H); normed half
        [rows][H] = its RMS norm times weight. Ids must be below the table's rows; negative ones read row 0.
        """
        args = (ids, table, weight, residual, normed, self._embedding_scale, np.float32(self._eps))
        self._embed(stream, rows, self._threads, args)

    def norm(self, stream: Any, rows: int, residual: int, weight: int, normed: int) -> None:
        """normed half [rows][H] = the RMS norm of residual float32 [rows][H] times weight."""
        self._norm(stream, rows, self._threads, (residual, weight, normed, np.float32(self._eps)))

    def add(
        self,
        stream: Any,
        rows: int,
        delta: int,
        post: int,
        residual: int,
        next_weight: int,
        normed: int,
        delta_exponent: int = 0,
        half_delta: bool = False,
        dependent: bool = True,
    ) -> None:
        """residual += the RMS norm of delta times post; normed half = its RMS norm times next_weight.

        delta, float32 or half [rows][H], is the true one times 2 ** delta_exponent, which the norm undoes
        when its eps is scaled alike. Half deltas are for many rows.
        """
        delta_eps = np.float32(self._eps * 4.0**delta_exponent)
        args = (delta, post, residual, next_weight, normed, delta_eps, np.float32(self._eps))
        if half_delta:
            blocks, shared = min(rows, self._most_blocks), self._factors_bytes
            self._add_half(stream, blocks, self._threads, (*args, np.int32(rows)), shared, dependent)
        else:
            self._add_float(stream, rows, self._threads, args, 0, dependent)

    def gather(
        self, stream: Any, count: int, rows_address: int, source: int, target: int, row_bytes: int
    ) -> None:
        """target [count] = source at rows int32 [count], rows of `row_bytes`, a multiple of 16; zeros for
        negative rows."""
        self._gather(stream, count, self._threads, (rows_address, source, target, np.int32(row_bytes // 16)))
