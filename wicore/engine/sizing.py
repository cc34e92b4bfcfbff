"""How many blocks each tier holds, and so how long a sequence may be. From settings and shapes alone, so that
API and worker agree without an engine."""

from __future__ import annotations

from wicore.config import Settings
from wicore.engine.base import KVLayout, Pool
from wicore.engine.null import null_layout
from wicore.gemma3.config import Gemma3Config
from wicore.hmt.tiers import POOLS, TierSizes, longest_sequence, split_bytes
from wicore.tiers.slot import slot_bytes

_HOST_BYTES = 512 * 2**20


def layout_of(config: Gemma3Config, block_tokens: int, dtype: str) -> KVLayout:
    """The layout of a model's KV in blocks of so many positions."""
    return KVLayout(
        block_tokens,
        config.global_layers,
        config.window_layers,
        config.kv_heads,
        config.head_dim,
        config.sliding_window,
        dtype,
    )


def kv_layout(settings: Settings, config: Gemma3Config) -> KVLayout:
    """The layout of the engine that `engine.kind` names."""
    if settings.engine.kind == "null":
        return null_layout(settings.hmt.block_tokens, config.sliding_window)
    return layout_of(config, settings.hmt.block_tokens, settings.engine.kv)


def tier_sizes(settings: Settings, layout: KVLayout) -> TierSizes:
    """Blocks of every tier, of an engine with this layout.

    The device's window pool holds the window of every sequence of a full batch and the step's new tokens,
    and never more than all positions would take. Sequences that have not reached their window leave room in
    it for cached prefixes. Host memory and the file are shared out by `hmt.window_share`.
    """
    hmt, size = settings.hmt, layout.block_tokens
    every = -(-hmt.device_tokens // size)
    a_sequence = -(-(layout.window - 1) // size) + 1
    a_step = -(-settings.scheduler.token_budget // size)
    running = settings.scheduler.max_batch * a_sequence + a_step
    device: dict[Pool, int] = {"global": every, "window": min(every, running)}
    in_memory: dict[Pool, int] = {pool: layout.block_bytes(pool) for pool in POOLS}
    on_file = {pool: slot_bytes(size) for pool, size in in_memory.items()}
    host_bytes = hmt.host_bytes
    if host_bytes is None:  # what any model can work with
        host_bytes = max(_HOST_BYTES, 8 * a_sequence * in_memory["window"])
    return TierSizes(
        device,
        split_bytes(in_memory, host_bytes, hmt.window_share),
        split_bytes(on_file, hmt.nvme_bytes if hmt.nvme_path is not None else 0, hmt.window_share),
    )


def longest(settings: Settings, config: Gemma3Config) -> int:
    """Most positions of one sequence that the tiers hold."""
    layout = kv_layout(settings, config)
    return longest_sequence(tier_sizes(settings, layout)) * layout.block_tokens
