"""Tiers in memory: moves carried out in any order, with delays and faults, over the checking engine."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from tests.checking_engine import CheckingEngine
from wicore.hmt.moves import Fault, Move, Outcome
from wicore.hmt.rates import Route
from wicore.hmt.tiers import TierSizes


class Arriving:
    """The ticket of a move to the device: to wait is to carry it out, and those of its route before it."""

    def __init__(self, mover: MemoryMover, move: Move) -> None:
        self._mover, self._move = mover, move

    def done(self) -> bool:
        return self._move not in self._mover.moves

    def wait(self) -> None:
        self._mover.hurry(self._move)


class MemoryMover:
    """Carries moves out when `finished` is called: those of a route in order, as many as it likes.

    `patience` is how many calls a move may take; `fault_rate` the share of blocks that do not arrive, but for
    those that steps may follow to the device, where it is `by_layer`.
    """

    def __init__(
        self,
        engine: CheckingEngine,
        sizes: TierSizes,
        *,
        seed: int = 0,
        patience: int = 0,
        fault_rate: float = 0,
        by_layer: bool = False,
    ) -> None:
        self.by_layer = by_layer
        self.random = random.Random(seed)
        self.patience, self.fault_rate = patience, fault_rate
        self.stores = {"device": engine.pools}
        for tier, slots in (("host", sizes.host), ("nvme", sizes.nvme)):
            if slots is not None:
                self.stores[tier] = {
                    name: np.full((count, *engine.pools[name].shape[1:]), -7, np.int64)
                    for name, count in slots.items()
                }
        engine.host = self.stores.get("host", {})
        self.moves: list[Move] = []
        self.early: list[Outcome] = []
        self.started = 0
        self.faults: Counter[Route] = Counter()
        """Blocks that did not arrive."""

    def start(self, move: Move) -> Arriving | None:
        self.moves.append(move)
        self.started += len(move.contents)
        return Arriving(self, move) if self.by_layer and move.target == "device" else None

    def hurry(self, last: Move | None = None) -> None:
        """Copy now all that was begun, or what its route has up to `last`; the outcomes come when they are
        asked for."""
        for move in list(self.moves):
            if last is None or (move.source, move.target) == (last.source, last.target):
                self.moves.remove(move)
                self.early.append(self._carry_out(move))
            if move is last:
                return

    def finished(self) -> Sequence[Outcome]:
        outcomes, self.early = self.early, []
        blocked = set()
        for move in list(self.moves):
            route = (move.source, move.target)
            if route in blocked or (self.patience and self.random.randrange(self.patience + 1)):
                blocked.add(route)
                continue
            self.moves.remove(move)
            outcomes.append(self._carry_out(move))
        return outcomes

    def _carry_out(self, move: Move) -> Outcome:
        source, target = (self.stores[tier][move.pool] for tier in (move.source, move.target))
        faults = {}
        fault_rate = 0 if self.by_layer and move.target == "device" else self.fault_rate
        for index, (read, written) in enumerate(zip(move.sources, move.targets, strict=True)):
            if self.random.random() < fault_rate:
                faults[index] = self.random.choice(list(Fault))
                self.faults[move.source, move.target] += 1
                target[written] = self.random.randrange(-9, -5)
            else:
                target[written] = source[read]
        return Outcome(move, 0.001, faults)
