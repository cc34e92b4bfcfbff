"""HMT, the hierarchical KV cache: who owns which block, in which tier, and which hold reusable prefixes.

`chain` names blocks by content, `pool` counts those of one pool in one tier, `policy` decides which cached
block goes first, `match` and `prefixes` find what need not be computed, `saves` and `lifts` plan what moves
down and up, `manager` joins them for the sequences being served. Nothing here touches the memory that the
blocks stand for: the engine owns the device's, and a `Mover` carries out what is planned.
"""

from wicore.hmt.chain import TokenChain
from wicore.hmt.manager import CacheManager
from wicore.hmt.match import PrefixMatch
from wicore.hmt.policy import LRU, EvictionPolicy
from wicore.hmt.pool import BlockPool, PoolStats
from wicore.hmt.sequence import Tables
from wicore.hmt.stats import CacheStats
from wicore.hmt.tiers import TierSizes

__all__ = [
    "LRU",
    "BlockPool",
    "CacheManager",
    "CacheStats",
    "EvictionPolicy",
    "PoolStats",
    "PrefixMatch",
    "Tables",
    "TierSizes",
    "TokenChain",
]
