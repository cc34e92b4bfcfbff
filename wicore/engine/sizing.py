"""How many blocks each tier holds, and so how long a sequence may be. From settings and shapes alone, so that
API and worker agree without an engine."""

from __future__ import annotations

from wicore.config import Settings
from wicore.engine.base import KVLayout, Pool
from wicore.gemma3.config import Gemma3Config
from wicore.hmt.tiers import POOLS, TierSizes, longest_sequence, split_bytes
from wicore.tiers.slot import slot_bytes


def kv_layout(settings: Settings, config: Gemma3Config) -> KVLayout:
    """The layout of the engine that `engine.kind` names."""
    if settings.engine.kind == "null":
        return KVLayout(settings.hmt.block_tokens, 1, 1, 1, 1, config.sliding_window, "uint8")
    return KVLayout(
        block_tokens=settings.hmt.block_tokens,
        global_layers=config.global_layers,
        window_layers=config.window_layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        window=config.sliding_window,
        dtype=settings.engine.kv,
    )


def tier_sizes(settings: Settings, config: Gemma3Config) -> TierSizes:
    """Blocks of every tier.

    The device's window pool holds the window of every sequence of a full batch and the step's new tokens,
    and never more than all positions would take. Sequences that have not reached their window leave room in
    it for cached prefixes. Host memory and the file are shared out by `hmt.window_share`.
    """
    hmt, layout = settings.hmt, kv_layout(settings, config)
    every = -(-hmt.device_tokens // hmt.block_tokens)
    a_sequence = -(-(config.sliding_window - 1) // hmt.block_tokens) + 1
    running = settings.scheduler.max_batch * a_sequence + -(
        -settings.scheduler.token_budget // hmt.block_tokens
    )
    device: dict[Pool, int] = {"global": every, "window": min(every, running)}
    in_memory = {pool: layout.block_bytes(pool) for pool in POOLS}
    on_file = {pool: slot_bytes(size) for pool, size in in_memory.items()}
    return TierSizes(
        device,
        split_bytes(in_memory, hmt.host_bytes, hmt.window_share),
        split_bytes(on_file, hmt.nvme_bytes if hmt.nvme_path is not None else 0, hmt.window_share),
    )


def longest(settings: Settings, config: Gemma3Config) -> int:
    """Most positions of one sequence that the tiers hold."""
    return longest_sequence(tier_sizes(settings, config)) * settings.hmt.block_tokens
