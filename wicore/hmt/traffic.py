"""The pools of every tier, and the moves under way between them.

Both ends of a move stay referenced until its outcome is known: `pins` says by whom else than a sequence a
block is held, so that the accounts of every pool add up at any moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from wicore.engine.base import KVLayout, Pool, Ticket
from wicore.hmt.histogram import Histogram
from wicore.hmt.match import Place
from wicore.hmt.moves import TIERS, Move, Mover, Outcome, Tier
from wicore.hmt.pool import BlockPool
from wicore.hmt.rates import Rates, Route

Pools = Mapping[Tier, Mapping[Pool, BlockPool]]

_BATCH_BYTES = 4 * 2**20
"""About what one move carries: enough for a disk's speed, few enough for reading and copying to overlap."""
_BUS_BATCH_BYTES = 32 * 2**20
"""The same between device and host memory: a bus takes this in a millisecond, less than beginning many moves
takes."""
_MOVES_IN_FLIGHT = 4
"""Moves of one route at a time, at least."""
_AHEAD_S = 0.02
"""A route has as much to do as it is thought to carry in this time: moves are begun once a step, and a fast
bus should not idle until the next."""
_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True, slots=True)
class Transfer:
    """One block of a move; its source is pinned, its target allocated and pinned."""

    hash: bytes
    parent: bytes
    source: int
    target: int


class Traffic:
    """Pools by tier, uppermost first, and what is on its way between two of them."""

    def __init__(self, layout: KVLayout, pools: Pools, mover: Mover | None) -> None:
        """Raises ValueError when there are tiers and nothing that moves blocks between them."""
        if len(pools) > 1 and mover is None:
            raise ValueError("tiers below the device need a mover")
        self.pools = pools
        self.rates = Rates()
        self.moved_bytes: Counter[tuple[Route, Pool]] = Counter()
        self.move_seconds: dict[Route, Histogram] = {}
        self.misses: Counter[str] = Counter()
        """Blocks that could not be moved, by reason."""
        self._mover = mover
        self._size: dict[Pool, int] = {pool: layout.block_bytes(pool) for pool in pools["device"]}
        self._pins: dict[tuple[Tier, Pool], Counter[int]] = {
            (tier, pool): Counter() for tier in pools for pool in pools[tier]
        }
        self._under_way: dict[Move, Callable[[Outcome], None]] = {}
        self._flying: Counter[Route] = Counter()
        self._flying_bytes: Counter[Route] = Counter()

    # --- looking ----------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a move is under way, whose outcome may change what can be done."""
        return bool(self._under_way)

    def flying(self, route: Route) -> int:
        """Moves of this route under way."""
        return self._flying[route]

    def may_start(self, route: Route) -> bool:
        if self._flying[route] < _MOVES_IN_FLIGHT:
            return True
        rate = self.rates.bytes_per_second(route)
        return rate is not None and self._flying_bytes[route] < rate * _AHEAD_S

    @property
    def by_layer(self) -> bool:
        """Whether steps may read what is on its way to the device (`Mover.by_layer`)."""
        return self._mover is not None and self._mover.by_layer

    def block_bytes(self, pool: Pool) -> int:
        return self._size[pool]

    def batch(self, route: Route, pool: Pool) -> int:
        """Blocks of one move, at most."""
        size = _BUS_BATCH_BYTES if "device" in route else _BATCH_BYTES
        return max(1, size // self._size[pool])

    def below(self, tier: Tier) -> Tier | None:
        """The next lower tier, if there is one."""
        index = TIERS.index(tier) + 1
        return TIERS[index] if index < len(self.pools) else None

    def locate(self, pool: Pool, hash: bytes, *, below: Tier | None = None) -> Place | None:
        """The highest tier, of those below the one named, that has the content."""
        for tier in TIERS[0 if below is None else TIERS.index(below) + 1 : len(self.pools)]:
            block = self.pools[tier][pool].lookup(hash)
            if block is not None:
                return Place(tier, block)
        return None

    def pins(self, tier: Tier, pool: Pool) -> Counter[int]:
        """References that moves and lifts hold, by block."""
        return self._pins[tier, pool]

    # --- holding ----------------------------------------------------------------------------------

    def pin(self, tier: Tier, pool: Pool, block: int) -> None:
        """Hold a registered or used block."""
        self.pools[tier][pool].hold(block)
        self._pins[tier, pool][block] += 1

    def unpin(self, tier: Tier, pool: Pool, block: int) -> None:
        self.disown(tier, pool, block)
        self.pools[tier][pool].release(block)

    def disown(self, tier: Tier, pool: Pool, block: int) -> None:
        """The pin's reference is the caller's from now on."""
        pins = self._pins[tier, pool]
        pins[block] -= 1
        if not pins[block]:
            del pins[block]

    def allocate(self, tier: Tier, pool: Pool) -> int:
        """A pinned block without content. Raises LookupError when the pool has none."""
        block = self.pools[tier][pool].allocate()
        self._pins[tier, pool][block] += 1
        return block

    # --- moving -----------------------------------------------------------------------------------

    def start(
        self, route: Route, pool: Pool, transfers: Sequence[Transfer], ended: Callable[[Outcome], None]
    ) -> Ticket | None:
        """Copy blocks of one pool; `ended` is called by a later `advance`. What `Mover.start` gives."""
        assert self._mover is not None
        move = Move(
            pool,
            *route,
            tuple(t.source for t in transfers),
            tuple(t.target for t in transfers),
            tuple(t.hash for t in transfers),
            tuple(t.parent for t in transfers),
        )
        self._under_way[move] = ended
        self._flying[route] += 1
        self._flying_bytes[route] += len(move.contents) * self._size[pool]
        return self._mover.start(move)

    def advance(self) -> None:
        """Take in the moves that have ended. Never waits."""
        for outcome in self._mover.finished() if self._mover is not None else ():
            move = outcome.move
            route = (move.source, move.target)
            self._flying[route] -= 1
            self._flying_bytes[route] -= len(move.contents) * self._size[move.pool]
            moved = (len(move.contents) - len(outcome.faults)) * self._size[move.pool]
            self.moved_bytes[route, move.pool] += moved
            self.move_seconds.setdefault(route, Histogram(_SECONDS)).add(outcome.seconds)
            self.rates.observe_move(outcome, moved)
            self.misses.update(fault.value for fault in outcome.faults.values())
            self._under_way.pop(move)(outcome)
