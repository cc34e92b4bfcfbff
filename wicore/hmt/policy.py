"""Which cached block goes first.

A policy ranks the blocks of one pool in one tier by what it is told of them. The pool tells it what each
block holds, of every access and of the attention it received, and which blocks are evictable at the
moment (cached, and no cached block continues them); it asks for a victim when it must reuse one.

Time is whatever the clock given to a policy counts; in the service it is tokens, so that an idle night
ages nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from wicore.hmt.policies.a2cr import A2CR, A2CRParams
from wicore.hmt.policies.arc import ARC
from wicore.hmt.policies.base import Clock, EvictionPolicy, Heat
from wicore.hmt.policies.lfu import LFU
from wicore.hmt.policies.lru import LRU
from wicore.hmt.policies.slru import SLRU

__all__ = ["A2CR", "ARC", "LFU", "LRU", "POLICIES", "SLRU", "A2CRParams", "Clock", "EvictionPolicy", "Heat"]

POLICIES: dict[str, Callable[[int, Clock], EvictionPolicy]] = {
    "a2cr": A2CR,
    "arc": ARC,
    "lfu": LFU,
    "lru": LRU,
    "slru": SLRU,
}
