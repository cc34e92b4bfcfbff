"""How large the tiers are, and their pools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wicore.engine.base import KVLayout, Pool
from wicore.errors import ConfigError
from wicore.hmt.moves import Tier
from wicore.hmt.policy import Clock
from wicore.hmt.pool import BlockPool, PolicyFactory

POOLS: tuple[Pool, Pool] = ("global", "window")

Stored = Mapping[Pool, Sequence[tuple[int, bytes, bytes]]]
"""What the file tier holds from earlier, oldest first: (slot, hash, its parent's) by pool."""


@dataclass(frozen=True, slots=True)
class TierSizes:
    """Blocks of each pool, by tier; a tier without blocks is not there."""

    device: Mapping[Pool, int]
    host: Mapping[Pool, int] | None = None
    nvme: Mapping[Pool, int] | None = None


def split_bytes(slot_bytes: Mapping[Pool, int], size: int, window_share: float) -> dict[Pool, int] | None:
    """Slots of each pool in `size` bytes, `window_share` of them for windows; None for 0 bytes."""
    window = int(size * window_share) // slot_bytes["window"]
    rest = size - window * slot_bytes["window"]
    slots: dict[Pool, int] = {"global": rest // slot_bytes["global"], "window": window}
    return slots if size else None


def device_share(sizes: TierSizes) -> int:
    """Global blocks on the device that a sequence longer than it may use."""
    return max(1, sizes.device["global"] // 2)


def longest_sequence(sizes: TierSizes) -> int:
    """Most global blocks of one sequence: those of the device, or a share of them and what host memory holds.

    An eighth of host memory is left for what passes through it.
    """
    streamed = 0 if sizes.host is None else device_share(sizes) + sizes.host["global"] * 7 // 8
    return max(sizes.device["global"], streamed)


def check_sizes(layout: KVLayout, sizes: TierSizes) -> None:
    """Raise ConfigError, naming the setting, for a device pool without blocks, a file without host memory to
    go through, and host memory that holds less than one window and one other block."""
    if min(sizes.device.values()) < 1:
        raise ConfigError(
            f"hmt.device_tokens: gives {sizes.device['global']} global and {sizes.device['window']} window"
            f" blocks of {layout.block_tokens} tokens; each pool needs at least 1",
            param="hmt.device_tokens",
        )
    if sizes.nvme is not None and sizes.host is None:
        raise ConfigError(
            "hmt.nvme_path: the file is reached through host memory, and there is none; raise hmt.host_bytes",
            param="hmt.host_bytes",
        )
    window = -(-(layout.window - 1) // layout.block_tokens) + 1
    if sizes.host is not None and (sizes.host["window"] < window or not sizes.host["global"]):
        raise ConfigError(
            f"hmt.host_bytes: leaves {sizes.host['window']} window blocks, and one window takes {window}"
            f" ({window * layout.block_bytes('window'):,} bytes); raise it, or set it to 0",
            param="hmt.host_bytes",
        )


def build_pools(
    layout: KVLayout, sizes: TierSizes, policy: PolicyFactory, clock: Clock, stored: Stored | None
) -> dict[Tier, dict[Pool, BlockPool]]:
    """The pools of every tier there is, uppermost first. Raises ConfigError as `check_sizes` does."""
    check_sizes(layout, sizes)
    counts: dict[Tier, Mapping[Pool, int] | None] = {
        "device": sizes.device,
        "host": sizes.host,
        "nvme": sizes.nvme,
    }
    pools: dict[Tier, dict[Pool, BlockPool]] = {}
    for tier, blocks in counts.items():
        if blocks is not None:
            pools[tier] = {
                # A window has no leaves: of a chain's windows the old ones lose their use first.
                name: BlockPool(f"{tier} {name}", blocks[name], policy, clock, leaves_first=name == "global")
                for name in POOLS
            }
    if stored is not None and "nvme" in pools:
        for name in POOLS:
            pools["nvme"][name].preload(stored[name])
    return pools
