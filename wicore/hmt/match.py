"""The longest prefix of a sequence that need not be computed, wherever its blocks lie.

A prefix of P positions can be resumed when the global blocks of [0, P) and the window blocks of
[max(0, P - window + 1), P) are to be had, each from any tier. Of all such P the one is taken that gives
the first token soonest: blocks below the device take time to raise, and what is not raised takes time to
compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from wicore.engine.base import Pool
from wicore.hmt.moves import Tier


class Place(NamedTuple):
    """Where a block's content lies."""

    tier: Tier
    block: int


@dataclass(frozen=True)
class PrefixMatch:
    """A reusable prefix, as the cache stands now. It holds until a block is taken or evicted. In blocks."""

    global_places: tuple[Place, ...] = ()
    """By logical block; as many as the prefix has."""
    window_places: tuple[Place, ...] = ()
    window_first: int = 0
    """Logical index of window_places[0]."""
    streamed: int = 0
    """Leading global blocks that stay in host memory, as the sequence is longer than its device share."""
    found: int = 0
    """Leading blocks whose global part was found, though window, speed or room may forbid their use."""
    slower: bool = False
    """Whether more could have been raised, but computing it is sooner."""

    @property
    def blocks(self) -> int:
        """Blocks that need not be computed."""
        return len(self.global_places)

    @cached_property
    def on_device(self) -> dict[Pool, frozenset[int]]:
        """The device's blocks among the places, without those of the streamed part."""
        places: dict[Pool, Sequence[Place]] = {
            "global": self.global_places[self.streamed :],
            "window": self.window_places,
        }
        return {
            pool: frozenset(place.block for place in found if place.tier == "device")
            for pool, found in places.items()
        }

    @property
    def resident(self) -> int:
        """Leading blocks whose global part is on the device already."""
        places = self.global_places
        return next((k for k, place in enumerate(places) if place.tier != "device"), len(places))


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that raising a block of each tier takes, and computing one (0: not known)."""

    global_block: dict[Tier, float]
    window_block: dict[Tier, float]
    compute: float


def longest_match(
    global_places: Sequence[Place],
    window_places: Sequence[Place | None],
    first_window_block: Callable[[int], int],
    costs: Costs,
) -> PrefixMatch:
    """The prefix to reuse.

    `global_places` are the leading global blocks found, `window_places` the window block of each (None
    where there is none), `first_window_block(k)` the first window block that a prefix of k blocks needs.
    """
    runs, raised, windows = _sums(global_places, window_places, costs)
    best, best_cost, deepest = 0, 0.0, 0
    for count in range(1, len(global_places) + 1):
        first = first_window_block(count)
        if runs[count] < count - first:
            continue
        deepest = count
        cost = raised[count] + windows[count] - windows[first] - count * costs.compute
        if cost <= best_cost:
            best, best_cost = count, cost
    first = first_window_block(best) if best else 0
    return PrefixMatch(
        global_places=tuple(global_places[:best]),
        window_places=tuple(place for place in window_places[first:best] if place is not None),
        window_first=first,
        found=len(global_places),
        slower=best < deepest,
    )


def _sums(
    global_places: Sequence[Place], window_places: Sequence[Place | None], costs: Costs
) -> tuple[list[int], list[float], list[float]]:
    """By number of leading blocks k: the run of window blocks that ends at k, and the seconds to raise
    all global, and all window blocks, before k."""
    runs, raised, windows = [0], [0.0], [0.0]
    for place, window in zip(global_places, window_places, strict=True):
        runs.append(0 if window is None else runs[-1] + 1)
        raised.append(raised[-1] + costs.global_block[place.tier])
        windows.append(windows[-1] + (0.0 if window is None else costs.window_block[window.tier]))
    return runs, raised, windows
