"""What of a sequence the cache has, and how much of it is worth raising."""

from __future__ import annotations

from dataclasses import dataclass

from wicore.engine.base import KVLayout, Pool
from wicore.hmt.chain import TokenChain
from wicore.hmt.match import Costs, Place, PrefixMatch, longest_match
from wicore.hmt.moves import TIERS, Tier
from wicore.hmt.traffic import Traffic

_REMEMBERED = 8
"""Chains whose match is kept: of the waiting sequences only the first few are matched again and again."""


@dataclass(slots=True, eq=False)
class _Memo:
    """A match, and what it was made from but for the blocks."""

    made_from: tuple[int, int | None, Costs, tuple[bool, ...]]
    hashes: frozenset[bytes]
    """The blocks by which it would be another match."""
    match: PrefixMatch


class Prefixes:
    """Looks chains up in every tier. Changes nothing."""

    def __init__(self, layout: KVLayout, traffic: Traffic) -> None:
        self._layout, self._traffic = layout, traffic
        self._memos: dict[TokenChain, _Memo] = {}
        """By chain, the longest unused first."""
        for tier in traffic.pools.values():
            for pool in tier.values():
                pool.on_change = self._forget

    def match(self, chain: TokenChain, share: int | None = None) -> PrefixMatch:
        """The prefix to reuse: whole blocks, from any tier, short of the last token, and only as far as
        raising it is sooner than computing it.

        With a `share`, at most so many blocks from the end of the prefix go to the device; those before
        stay in host memory. A sequence that waits is matched in every step, so the last matches are kept for
        as long as nothing changes that they depend on.
        """
        costs = self._costs()
        passage = tuple(pool.available > 0 for pool in self._traffic.pools.get("host", {}).values())
        made_from = (chain.length, share, costs, passage)
        memo = self._memos.pop(chain, None)
        if memo is None or memo.made_from != made_from:
            match = self._match(chain, share, costs)
            memo = _Memo(made_from, frozenset(chain.hashes), match)
        self._memos[chain] = memo
        if len(self._memos) > _REMEMBERED:
            del self._memos[next(iter(self._memos))]
        return memo.match

    def _forget(self, hash: bytes) -> None:
        """This block has come to a tier, or gone."""
        for chain in [chain for chain, memo in self._memos.items() if hash in memo.hashes]:
            del self._memos[chain]

    def _match(self, chain: TokenChain, share: int | None, costs: Costs) -> PrefixMatch:
        places: list[Place] = []
        windows: list[Place | None] = []
        for hash in chain.hashes[: (len(chain) - 1) // self._layout.block_tokens]:
            place = self._locate("global", hash)
            if place is None:
                break
            places.append(place)
            windows.append(self._locate("window", hash))
        found = len(places)
        below = self._leading_below(chain, found) if share is not None else []
        if share is not None:
            del places[len(below) + share :], windows[len(below) + share :]
        match = longest_match(places, windows, self.first_window_block_after, costs)
        streamed = 0 if share is None else max(0, match.blocks - share)
        return PrefixMatch(
            (*below[:streamed], *match.global_places[streamed:]),
            match.window_places,
            match.window_first,
            streamed,
            found,
            match.slower,
        )

    def first_window_block(self, position: int) -> int:
        """The first logical block that a window query at `position` reads."""
        return max(0, position - self._layout.window + 1) // self._layout.block_tokens

    def first_window_block_after(self, blocks: int) -> int:
        """The same, at the first position after so many leading blocks."""
        return self.first_window_block(blocks * self._layout.block_tokens)

    def _locate(self, pool: Pool, hash: bytes) -> Place | None:
        place = self._traffic.locate(pool, hash)
        if place is not None and place.tier == "nvme" and not self._traffic.pools["host"][pool].available:
            return None  # what the file has comes through host memory, and sequences hold all of that
        return place

    def _leading_below(self, chain: TokenChain, most: int) -> list[Place]:
        """Where below the device the leading blocks lie, up to the first that is not there."""
        places: list[Place] = []
        for hash in chain.hashes[:most]:
            place = self._traffic.locate("global", hash, below="device")
            if place is None:
                break
            places.append(place)
        return places

    def _costs(self) -> Costs:
        rates, layout = self._traffic.rates, self._layout
        if rates.prefill is None:
            nothing = dict.fromkeys(TIERS, 0.0)
            return Costs(nothing, nothing, 0.0)

        def raising(pool: Pool) -> dict[Tier, float]:
            size = layout.block_bytes(pool)
            return {tier: rates.seconds_to_raise(tier, size) for tier in TIERS}

        return Costs(raising("global"), raising("window"), layout.block_tokens / rates.prefill)
