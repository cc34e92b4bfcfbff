"""What the cache tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wicore.engine.base import Pool
from wicore.hmt.moves import Tier
from wicore.hmt.pool import PoolStats
from wicore.hmt.traffic import Traffic


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Every pool, and what prefix reuse has saved since the start."""

    pools: Mapping[Tier, Mapping[Pool, PoolStats]]
    hit_tokens: Mapping[Tier, int]
    """Tokens found in the cache, by the tier that their global block lay in."""
    opened_tokens: int
    """Tokens of all sequences opened."""

    @property
    def global_pool(self) -> PoolStats:
        return self.pools["device"]["global"]

    @property
    def window_pool(self) -> PoolStats:
        return self.pools["device"]["window"]

    @property
    def matched_tokens(self) -> int:
        return sum(self.hit_tokens.values())


def stats_of(traffic: Traffic, hit_tokens: Mapping[Tier, int], opened_tokens: int) -> CacheStats:
    pools = {
        tier: {name: pool.stats() for name, pool in pools.items()} for tier, pools in traffic.pools.items()
    }
    return CacheStats(pools, dict(hit_tokens), opened_tokens)


def report(stats: CacheStats, traffic: Traffic) -> dict[str, object]:
    """All of it as JSON: for heartbeats, `/status` and `/metrics`."""
    moved: dict[str, dict[str, int]] = {}
    # Copies, as heartbeats read them from another thread.
    for (route, pool), size in dict(traffic.moved_bytes).items():
        moved.setdefault(">".join(route), {})[pool] = size
    return {
        "tiers": {
            tier: {
                name: {"total": s.total, "free": s.free, "used": s.used, "cached": s.cached}
                for name, s in pools.items()
            }
            for tier, pools in stats.pools.items()
        },
        "evicted_blocks": {t: sum(s.evicted for s in p.values()) for t, p in stats.pools.items()},
        "lost_blocks": {t: sum(s.lost for s in p.values()) for t, p in stats.pools.items()},
        "moved_bytes": moved,
        "opened_tokens": stats.opened_tokens,
        "hit_tokens": dict(stats.hit_tokens),
        "miss_blocks": dict(traffic.misses),
        "move_seconds": {">".join(route): h.as_dict() for route, h in dict(traffic.move_seconds).items()},
        "victim_age_tokens": {
            tier: pools["global"].victim_ages.as_dict() for tier, pools in traffic.pools.items()
        },
    }
