"""HMT, the hierarchical KV cache: who owns which block, and which blocks hold reusable prefixes.

Here is its device tier. `chain` names blocks by content, `pool` counts them, `policy` decides which
cached block goes first, `manager` joins them for the sequences being served. Nothing here touches the
memory that the blocks stand for: the engine owns it.
"""

from wicore.hmt.chain import TokenChain
from wicore.hmt.manager import CacheManager, CacheStats, PrefixMatch
from wicore.hmt.policy import LRU, EvictionPolicy
from wicore.hmt.pool import BlockPool, PoolStats

__all__ = [
    "LRU",
    "BlockPool",
    "CacheManager",
    "CacheStats",
    "EvictionPolicy",
    "PoolStats",
    "PrefixMatch",
    "TokenChain",
]
