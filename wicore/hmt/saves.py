"""The way down: content worth keeping is copied to the tier below as soon as it is final.

So a block that must be reused has, nearly always, been saved before, and no step waits for a demotion.
Copies above stay: a block lies in every tier that has room for it.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from wicore.engine.base import Pool
from wicore.hmt.moves import Outcome, Tier
from wicore.hmt.traffic import Traffic, Transfer


class _Save(NamedTuple):
    pool: Pool
    hash: bytes
    needed: bool = False
    """Wanted in the next tier, even where a tier further below has it."""


class Saves:
    """What waits to be copied down, by the tier where it lies."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._queues: dict[Tier, deque[_Save]] = {
            tier: deque() for tier in traffic.pools if traffic.below(tier) is not None
        }
        self._needed: set[_Save] = set()
        self._flying: set[tuple[Tier, Pool, bytes]] = set()
        """What is on its way down, and from where: it is not sent twice."""
        self.pressed = False
        """Whether room above matters more than what the tier below loses by it: a slow disk must not hold up
        whom host memory has room for, if only by dropping what the disk was too slow for."""

    @property
    def pending(self) -> bool:
        """Whether content waits to be saved, or is on its way down."""
        flying = self._traffic.flying
        return any(self._queues.values()) or any(flying(self._route(tier)) for tier in self._queues)

    def add(self, tier: Tier, pool: Pool, hash: bytes, *, needed: bool = False) -> None:
        """Have registered content of `tier` copied to the tier below, where there is one: if no lower tier
        has it, or if it is `needed` there, and that at once."""
        if (tier, pool, hash) in self._flying:
            return
        save = _Save(pool, hash, needed)
        if needed and save not in self._needed:
            self._queues[tier].appendleft(save)
            self._needed.add(save)
        elif tier in self._queues and not needed:
            self._queues[tier].append(save)

    def advance(self) -> None:
        """Start what can be started; the lowest tier first, as that makes room in the one above."""
        for tier in reversed(self._queues):
            route = self._route(tier)
            while self._traffic.may_start(route):
                pool, transfers = self._next(tier, route[1])
                if not transfers:
                    break
                self._traffic.start(route, pool, transfers, self._ended)

    def _route(self, tier: Tier) -> tuple[Tier, Tier]:
        below = self._traffic.below(tier)
        assert below is not None
        return tier, below

    def _next(self, source: Tier, target: Tier) -> tuple[Pool, list[Transfer]]:
        """The blocks of the next move; none while the tier below has no room."""
        traffic, queue = self._traffic, self._queues[source]
        pool: Pool = queue[0].pool if queue else "global"
        above, below = traffic.pools[source][pool], traffic.pools[target][pool]
        transfers: list[Transfer] = []
        while queue and queue[0].pool == pool and len(transfers) < traffic.batch((source, target), pool):
            save = queue[0]
            flying = (source, pool, save.hash)
            block = None if flying in self._flying else above.lookup(save.hash)
            if block is not None and self._is_due(save, block, source, target):
                if below.ready or (self.pressed and below.available):
                    traffic.pin(source, pool, block)
                    slot = traffic.allocate(target, pool)
                    transfers.append(Transfer(save.hash, above.content(block)[1], block, slot))
                    self._flying.add(flying)
                elif transfers or traffic.busy:
                    break  # a move under way may make room
                else:
                    traffic.misses["no_room"] += 1
                    above.saved(block)
            elif block is not None:
                above.saved(block)
            self._needed.discard(queue.popleft())
        return pool, transfers

    def _is_due(self, save: _Save, block: int, source: Tier, target: Tier) -> bool:
        """Whether the content still has to be copied."""
        if save.needed:
            return self._traffic.pools[target][save.pool].lookup(save.hash) is None
        saved = self._traffic.pools[source][save.pool].is_saved(block)
        return not saved and self._traffic.locate(save.pool, save.hash, below=source) is None

    def _ended(self, outcome: Outcome) -> None:
        traffic, move = self._traffic, outcome.move
        above, below = traffic.pools[move.source][move.pool], traffic.pools[move.target][move.pool]
        last = traffic.below(move.target) is None
        for index, (block, slot) in enumerate(zip(move.sources, move.targets, strict=True)):
            hash = move.contents[index]
            self._flying.discard((move.source, move.pool, hash))
            if index not in outcome.faults and above.lookup(hash) == block:
                below.register(slot, hash, move.parents[index], saved=last, heat=above.heat(block))
                self.add(move.target, move.pool, hash)
            # Saved or not, it may be evicted now: a tier that fails must not hold up the one above.
            above.saved(block)
            traffic.unpin(move.source, move.pool, block)
            traffic.unpin(move.target, move.pool, slot)
