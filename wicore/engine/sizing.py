"""How many blocks each tier holds, and so how long a sequence may be. From settings and shapes alone, so that
API and worker agree without an engine."""

from __future__ import annotations

from collections.abc import Mapping

from wicore.config import EngineSettings, Settings
from wicore.engine.base import KVLayout, Pool
from wicore.engine.null import null_layout
from wicore.errors import ConfigError
from wicore.gemma3.config import Gemma3Config
from wicore.hmt.tiers import POOLS, TierSizes, longest_sequence, split_bytes
from wicore.tiers.slot import slot_bytes

_HOST_BYTES = 512 * 2**20
_DEVICE_TOKENS = 16_384


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


_FORMATS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("cpu", "weights"): ("int8", "float32"),
    ("cpu", "kv"): ("float32", "int8"),
    ("tensorrt", "weights"): ("float16",),
    ("tensorrt", "kv"): ("float16", "int8"),
}
"""What an engine knows, the default first."""


def weight_format(engine: EngineSettings) -> str:
    """`engine.weights`, or what the engine takes when it is unset. Raises ConfigError for a foreign one."""
    return _format(engine, "weights", engine.weights)


def kv_format(engine: EngineSettings) -> str:
    """The same of `engine.kv`."""
    return _format(engine, "kv", engine.kv)


def _format(engine: EngineSettings, name: str, value: str | None) -> str:
    known = _FORMATS.get((engine.kind, name), ())
    if value is None or not known:
        return known[0] if known else "none"
    if value not in known:
        raise ConfigError(
            f"engine.{name}: {value} is not for engine.kind {engine.kind}, which takes {' or '.join(known)}",
            param=f"engine.{name}",
        )
    return value


def kv_layout(settings: Settings, config: Gemma3Config) -> KVLayout:
    """The layout of the engine that `engine.kind` names."""
    if settings.engine.kind == "null":
        return null_layout(settings.hmt.block_tokens, config.sliding_window)
    return layout_of(config, settings.hmt.block_tokens, kv_format(settings.engine))


def tier_sizes(settings: Settings, layout: KVLayout, device: Mapping[Pool, int] | None = None) -> TierSizes:
    """Blocks of every tier, of an engine with this layout; `device`: as the engine has them, if there is one.

    Host memory and the file are shared out by `hmt.window_share`.
    """
    hmt, size = settings.hmt, layout.block_tokens
    if device is None:
        device = device_blocks(settings, layout, -(-(hmt.device_tokens or _DEVICE_TOKENS) // size))
    in_memory: dict[Pool, int] = {pool: layout.block_bytes(pool) for pool in POOLS}
    on_file = {pool: slot_bytes(size) for pool, size in in_memory.items()}
    host_bytes = hmt.host_bytes
    if host_bytes is None:  # what any model can work with
        host_bytes = max(_HOST_BYTES, 8 * _window_blocks(layout) * in_memory["window"])
    return TierSizes(
        device,
        split_bytes(in_memory, host_bytes, hmt.window_share),
        split_bytes(on_file, hmt.nvme_bytes if hmt.nvme_path is not None else 0, hmt.window_share),
    )


def device_blocks(settings: Settings, layout: KVLayout, blocks: int) -> dict[Pool, int]:
    """The device's pools, with so many blocks in the global one.

    The window pool holds the window of every sequence of a full batch and the step's new tokens, and never
    more than all positions would take. Sequences that have not reached their window leave room in it for
    cached prefixes.
    """
    a_step = -(-settings.scheduler.token_budget // layout.block_tokens)
    running = settings.scheduler.max_batch * _window_blocks(layout) + a_step
    return {"global": blocks, "window": min(blocks, running)}


def fitting_blocks(settings: Settings, layout: KVLayout, size: int) -> dict[Pool, int]:
    """The largest such pools that fit in `size` bytes; pools of no blocks when none do."""
    low, high = 0, max(0, size) // layout.block_bytes("global")
    while low < high:
        middle = (low + high + 1) // 2
        if pool_bytes(layout, device_blocks(settings, layout, middle)) <= size:
            low = middle
        else:
            high = middle - 1
    return device_blocks(settings, layout, low)


def pool_bytes(layout: KVLayout, blocks: Mapping[Pool, int]) -> int:
    """Bytes of both pools."""
    return sum(blocks[pool] * layout.block_bytes(pool) for pool in POOLS)


def longest(settings: Settings, config: Gemma3Config) -> int | None:
    """Most positions of one sequence that the tiers hold.

    None where only the card says how much that is (tensorrt with `hmt.device_tokens` unset): what is served
    is then what the model and `model.max_context` allow, and the engine does not start on a card with less.
    """
    if settings.engine.kind == "tensorrt" and settings.hmt.device_tokens is None:
        return None
    layout = kv_layout(settings, config)
    return longest_sequence(tier_sizes(settings, layout)) * layout.block_tokens


def _window_blocks(layout: KVLayout) -> int:
    """Blocks that the window of one sequence touches, wherever it begins."""
    return -(-(layout.window - 1) // layout.block_tokens) + 1
