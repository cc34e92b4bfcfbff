"""What a model's steps must read and compute at least, and how long that takes at a device's bounds."""

from __future__ import annotations

from dataclasses import dataclass

from wicore.bench.hardware import Bounds
from wicore.engine.base import EngineInfo
from wicore.gemma3.config import Gemma3Config
from wicore.hmt.tiers import POOLS

_WEIGHT_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1 + 4 / 32}
"""Bytes a weight; 8-bit ones have a float32 scale for every 32."""


@dataclass(frozen=True, slots=True)
class Work:
    """One model in one engine. Bounds that are not known give None."""

    config: Gemma3Config
    info: EngineInfo
    bounds: Bounds

    def decode_bytes(self, batch: int, context: float) -> float:
        """Of a step of `batch` sequences that have so many tokens: all weights, and what each query sees."""
        layout = self.info.layout
        seen = {"global": context, "window": min(context, layout.window)}
        kv = sum(layout.block_bytes(pool) * seen[pool] / layout.block_tokens for pool in POOLS)
        return self.config.parameters * _WEIGHT_BYTES.get(self.info.weights, 0.0) + batch * kv

    def prefill_flops(self, tokens: int) -> float:
        """Of one prompt: matrix products, and attention to what each token sees; of the head one row."""
        config = self.config
        head = config.vocab_size * config.hidden_size
        window = min(tokens, self.info.layout.window)
        seen_global = tokens * (tokens + 1) / 2
        seen_window = window * (window + 1) / 2 + (tokens - window) * window
        pairs = config.global_layers * seen_global + config.window_layers * seen_window
        return 2 * (config.parameters - head) * tokens + 2 * head + 4 * config.heads * config.head_dim * pairs

    def decode_s(self, batch: int, context: float) -> float | None:
        """Least time of a step, bound by memory or by the products."""
        bounds = self.bounds
        if not bounds.bytes_s or not bounds.flop_s:
            return None
        flops = 2 * self.config.parameters * batch
        return max(self.decode_bytes(batch, context) / bounds.bytes_s, flops / bounds.flop_s)

    def prefill_s(self, tokens: int) -> float | None:
        """Least time of a prompt."""
        return self.prefill_flops(tokens) / self.bounds.flop_s if self.bounds.flop_s else None

    def run_s(self, batch: int, prompt: int, output: int) -> float | None:
        """Least time from submitting all to the last token: prompts one after the other, then decoding."""
        prefill, decode = self.prefill_s(prompt), self.decode_s(batch, prompt + output / 2)
        if prefill is None or decode is None:
            return None
        return batch * prefill + (output - 1) * decode
