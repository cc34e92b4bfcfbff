"""The way up: blocks brought from the tier where they lie to the device, or to host memory to stay there.

A restore is the lifts that one sequence waits for. What fails on its way is forgotten where it lay, and the
sequence then matches anew, without it. Where steps may read what is on its way to the device, a restore's
last stage is one move of each pool, the windows' first, which are small: the layers of a move arrive in the
order in which they are computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from wicore.engine.base import Pool, Ticket
from wicore.hmt.match import Place
from wicore.hmt.moves import Outcome
from wicore.hmt.rates import Route
from wicore.hmt.traffic import Traffic, Transfer


@dataclass(slots=True, eq=False)
class Restore:
    """The lifts that one sequence waits for."""

    left: int = 0
    failed: bool = False
    cancelled: bool = False
    """Nobody waits any more; what is not under way is not begun."""
    ahead: int = 0
    """Lifts, of those left, that steps may read already, if they name `arriving`."""
    ahead_bytes: int = 0
    arriving: list[Ticket] = field(default_factory=list)
    slots: dict[bytes, int] = field(default_factory=dict)
    """Host slots, by content, of lifts that end in host memory; held for the sequence."""


@dataclass(slots=True, eq=False)
class _Lift:
    """A block on its way up; it is pinned where it lies, and so is the device block it goes to."""

    pool: Pool
    hash: bytes
    parent: bytes
    place: Place
    device_block: int | None
    restore: Restore | None
    """None: nobody waits for it."""
    ahead: bool = False

    @property
    def cancelled(self) -> bool:
        return self.restore is not None and self.restore.cancelled


class Lifts:
    """What waits to be brought up, from the file and from host memory."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._loads: deque[_Lift] = deque()
        self._raises: deque[_Lift] = deque()
        self._prefetching: set[tuple[Pool, bytes]] = set()

    def add(
        self, restore: Restore, pool: Pool, hash: bytes, parent: bytes, place: Place, device_block: int | None
    ) -> None:
        """Bring content from `place` to `device_block`, which the caller holds, or (None) to host memory."""
        restore.left += 1
        self._traffic.pin(place.tier, pool, place.block)
        if device_block is not None:
            self._traffic.pin("device", pool, device_block)
        self._forward(_Lift(pool, hash, parent, place, device_block, restore))

    def prefetch(self, pool: Pool, hash: bytes, parent: bytes) -> bool:
        """Bring content that lies only in the file to host memory, for whoever will want it.

        False, and nothing done, when half of the ready host slots are to be taken by such already.
        """
        place = self._traffic.locate(pool, hash)
        if place is None or place.tier != "nvme" or (pool, hash) in self._prefetching:
            return True
        if len(self._prefetching) >= self._traffic.pools["host"][pool].ready // 2:
            return False
        self._prefetching.add((pool, hash))
        self._traffic.pin("nvme", pool, place.block)
        self._forward(_Lift(pool, hash, parent, place, None, None))
        return True

    def hand_over(self, restore: Restore) -> dict[bytes, int]:
        """The host slots of a complete restore; from here on the caller holds them."""
        for slot in restore.slots.values():
            self._traffic.disown("host", "global", slot)
        slots, restore.slots = restore.slots, {}
        return slots

    def cancel(self, restore: Restore) -> None:
        """Nobody waits for this restore any more. Idempotent."""
        restore.cancelled = True
        for slot in restore.slots.values():
            self._traffic.unpin("host", "global", slot)
        restore.slots = {}

    def advance(self) -> None:
        """Start what can be started."""
        self._start(("nvme", "host"), self._loads, self._loading, self._loaded)
        self._start(("host", "device"), self._raises, self._raising, self._raised)

    # --- stages -----------------------------------------------------------------------------------

    def _forward(self, lift: _Lift) -> None:
        """On to the next stage, or to the end."""
        if lift.place.tier == "nvme":
            self._loads.append(lift)
        elif lift.device_block is not None:
            self._raises.append(lift)
        else:
            self._end(lift)

    def _start(
        self,
        route: Route,
        queue: deque[_Lift],
        prepare: Callable[[_Lift], Transfer | None],
        ended: Callable[[list[_Lift], Outcome], None],
    ) -> None:
        """Make moves of what waits in the queue, each of one pool, until the route is full."""
        full = False
        while queue and not full and self._traffic.may_start(route):
            first = queue[0]
            lifts: list[_Lift] = []
            transfers: list[Transfer] = []
            while queue and self._joins(route, queue[0], first, len(lifts)):
                full = route[1] == "host" and self._must_wait(queue[0], transfers)
                if full:
                    break
                lift = queue.popleft()
                transfer = prepare(lift)
                if transfer is not None:
                    lifts.append(lift)
                    transfers.append(transfer)
            if transfers:
                full = False
                ticket = self._traffic.start(route, first.pool, transfers, partial(ended, lifts))
                if ticket is not None and first.restore is not None:
                    self._go_ahead(first.restore, lifts, ticket)

    def _joins(self, route: Route, lift: _Lift, first: _Lift, before: int) -> bool:
        """Whether a lift goes in the move that begins with `first` and has so many others."""
        if lift.pool != first.pool:
            return False
        if route[1] == "device" and self._traffic.by_layer:
            return lift.restore is first.restore
        return before < self._traffic.batch(route, lift.pool)

    def _go_ahead(self, restore: Restore, lifts: list[_Lift], ticket: Ticket) -> None:
        """Steps may read what these lifts bring."""
        for lift in lifts:
            lift.ahead = True
        restore.ahead += len(lifts)
        restore.ahead_bytes += len(lifts) * self._traffic.block_bytes(lifts[0].pool)
        restore.arriving.append(ticket)

    def _must_wait(self, lift: _Lift, before: list[Transfer]) -> bool:
        """Whether host memory is full, and a move under way may change that."""
        host = self._traffic.pools["host"][lift.pool]
        return not host.available and (bool(before) or self._traffic.busy)

    def _loading(self, lift: _Lift) -> Transfer | None:
        """The transfer to host memory, unless the content has come there, is not wanted, or has no room."""
        traffic, host = self._traffic, self._traffic.pools["host"][lift.pool]
        slot = host.lookup(lift.hash)
        if lift.cancelled:
            self._fail(lift)
        elif slot is not None:
            traffic.pin("host", lift.pool, slot)
            self._move_to(lift, Place("host", slot))
        elif not host.available:
            traffic.misses["no_room"] += 1
            self._fail(lift)
        else:
            return Transfer(lift.hash, lift.parent, lift.place.block, traffic.allocate("host", lift.pool))
        return None

    def _loaded(self, lifts: list[_Lift], outcome: Outcome) -> None:
        move, host = outcome.move, self._traffic.pools["host"][outcome.move.pool]
        for index, lift in enumerate(lifts):
            slot = move.targets[index]
            if index in outcome.faults:
                self._traffic.pools["nvme"][move.pool].discard(lift.hash)
                self._traffic.unpin("host", move.pool, slot)
                self._fail(lift)
                continue
            if not host.register(
                slot,
                lift.hash,
                lift.parent,
                heat=self._traffic.pools["nvme"][move.pool].heat(lift.place.block),
            ):
                # Another lift or save was first; that copy is the one to use.
                found = host.lookup(lift.hash)
                assert found is not None
                self._traffic.pin("host", move.pool, found)
                self._traffic.unpin("host", move.pool, slot)
                slot = found
            self._move_to(lift, Place("host", slot))

    def _raising(self, lift: _Lift) -> Transfer | None:
        if lift.cancelled:
            self._fail(lift)
            return None
        assert lift.device_block is not None
        return Transfer(lift.hash, lift.parent, lift.place.block, lift.device_block)

    def _raised(self, lifts: list[_Lift], outcome: Outcome) -> None:
        pool = outcome.move.pool
        device, host = self._traffic.pools["device"][pool], self._traffic.pools["host"][pool]
        for index, lift in enumerate(lifts):
            assert lift.device_block is not None
            if index in outcome.faults:
                self._fail(lift)
                continue
            device.register(lift.device_block, lift.hash, lift.parent, heat=host.heat(lift.place.block))
            self._end(lift)

    def _move_to(self, lift: _Lift, place: Place) -> None:
        """It lies at `place` now, pinned there."""
        self._traffic.unpin(lift.place.tier, lift.pool, lift.place.block)
        lift.place = place
        self._forward(lift)

    def _fail(self, lift: _Lift) -> None:
        if lift.restore is not None:
            lift.restore.failed = True
        self._end(lift)

    def _end(self, lift: _Lift) -> None:
        """The lift is over: let go of what it holds, but for a host slot that its sequence wants."""
        restore = lift.restore
        if restore is None:
            self._prefetching.discard((lift.pool, lift.hash))
        else:
            restore.left -= 1
            if lift.ahead:
                restore.ahead -= 1
                restore.ahead_bytes -= self._traffic.block_bytes(lift.pool)
                if not restore.ahead:
                    restore.arriving.clear()  # a ticket holds an event of the device for each layer
        for_host = restore is not None and lift.device_block is None and lift.place.tier == "host"
        if restore is not None and for_host and not (restore.cancelled or restore.failed):
            restore.slots[lift.hash] = lift.place.block
        else:
            self._traffic.unpin(lift.place.tier, lift.pool, lift.place.block)
        if lift.device_block is not None:
            self._traffic.unpin("device", lift.pool, lift.device_block)
