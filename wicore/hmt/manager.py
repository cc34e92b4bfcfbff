"""The blocks of the sequences being served: prefix reuse, block tables, growth, sliding, release, return.

Every change is asked for before it is made: `match` and `room` look, `open` and `reserve` take. Shared
blocks are only ever read: a match is whole blocks, and it always leaves at least one token to compute,
so new positions fall in blocks that the sequence owns alone.

The window pool keeps, of each sequence, the blocks that hold any of the last `window - 1` positions
computed. Older ones are released as the sequence advances, and are expendable but for checkpoints.

A sequence that needs more global blocks than the device has gets half of them: the leading ones it does not
write any more stay in host memory, and attention reads them there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import KVLayout, Pool, Ticket
from wicore.errors import EngineError, TooLarge
from wicore.hmt.chain import Grow, TokenChain
from wicore.hmt.checkpoints import Checkpoints
from wicore.hmt.lifts import Lifts, Restore
from wicore.hmt.match import Place, PrefixMatch
from wicore.hmt.moves import Mover, Tier
from wicore.hmt.policy import LRU
from wicore.hmt.pool import BlockPool, PolicyFactory
from wicore.hmt.prefixes import Prefixes
from wicore.hmt.saves import Saves
from wicore.hmt.sequence import OpenSequence, Tables
from wicore.hmt.stats import CacheStats, report, stats_of
from wicore.hmt.tiers import Stored, TierSizes, build_pools, device_share, longest_sequence
from wicore.hmt.traffic import Traffic


class CacheManager:
    """The pools of every tier and the sequences that use them.

    `salt` is the engine's fingerprint. `stored` is what the file tier holds from earlier. Raises
    ConfigError when the device pool cannot hold even one block, or a tier lacks what it needs.
    """

    def __init__(
        self,
        layout: KVLayout,
        sizes: TierSizes,
        salt: str,
        *,
        mover: Mover | None = None,
        stored: Stored | None = None,
        prefix_cache: bool = True,
        policy: PolicyFactory = LRU,
        checkpoint_tokens: int = 0,
    ) -> None:
        self.layout = layout
        self.prefix_cache = prefix_cache
        self._salt = salt.encode()
        self._time = 0
        """Tokens of all prompts opened and of all output: the clock of the policies."""
        self._share = device_share(sizes)
        self._longest = longest_sequence(sizes)
        pools = build_pools(layout, sizes, policy, self._clock, stored)
        self.traffic = Traffic(layout, pools, mover)
        self._prefixes = Prefixes(layout, self.traffic)
        self._saves, self._lifts = Saves(self.traffic), Lifts(self.traffic)
        self._pools = pools["device"]
        self._host = pools.get("host")
        every = checkpoint_tokens // layout.block_tokens
        self._checkpoints = Checkpoints(
            self._pools["window"], self._prefixes, self._saves, every, save=self._host is not None
        )
        self._open: dict[int, OpenSequence] = {}
        self._hits: Counter[Tier] = Counter()
        self._opened_tokens = 0

    # --- looking ----------------------------------------------------------------------------------

    def chain(self, tokens: Sequence[int] | NDArray[np.int32]) -> TokenChain:
        """The chain under which a sequence of these tokens is matched and opened. For any thread."""
        return TokenChain(self._salt, self.layout.block_tokens, tokens)

    def blocks(self, positions: int) -> int:
        """Blocks that hold this many positions from 0 on."""
        return -(-positions // self.layout.block_tokens)

    def window_span(self, positions: int, at_once: int = 1) -> int:
        """Most window blocks that a sequence of this many positions needs to advance by `at_once` tokens."""
        return min(self.blocks(positions), self.blocks(self.layout.window + at_once - 2) + 1)

    def require(self, positions: int, at_once: int = 1) -> None:
        """Raise TooLarge when a sequence of this many positions could not run even alone; `at_once` of them
        must be computed in one step."""
        needs = [
            ("global", self.blocks(positions), self._longest),
            ("window", self.window_span(positions, at_once), self._pools["window"].total),
        ]
        if self.is_long(positions):
            needs.append(("device", self.blocks(at_once - 1) + 1, self._share))
        for pool, need, most in needs:
            if need > most:
                together = f", {at_once} of them for an image," if at_once > 1 else ","
                raise TooLarge(
                    f"prompt and max_tokens need {positions} positions{together} which is {need} {pool}"
                    f" blocks of {self.layout.block_tokens}; the cache has {most}. Ask for fewer, or raise"
                    " hmt.device_tokens or hmt.host_bytes",
                    param="max_tokens",
                )

    def is_long(self, positions: int) -> bool:
        """Whether a sequence that grows to so many positions is kept to its share of the device."""
        return self._host is not None and self.blocks(positions) > self._pools["global"].total

    def match(self, chain: TokenChain, positions: int = 0) -> PrefixMatch:
        """The prefix to reuse of a sequence that will grow to `positions`: whole blocks, from any tier, short
        of the last token, and only as far as raising it is sooner than computing it."""
        if not self.prefix_cache:
            return PrefixMatch()
        return self._prefixes.match(chain, self._share if self.is_long(positions) else None)

    def can_open(
        self,
        match: PrefixMatch,
        positions: int,
        *,
        at_once: int = 1,
        long: bool = False,
        spare: int = 0,
        closing: Sequence[int] = (),
    ) -> bool:
        """Whether, taking `match`, blocks for `positions` positions could be had and `spare` more be left,
        without losing anything worth keeping. A `long` sequence takes its share at most.

        Of the window pool as many are asked for as let the sequence advance by `at_once`. `closing` are keys
        to be reckoned as closed first; of their blocks only those count that nobody else holds. Where only
        saving is waited for, it is hurried.
        """
        resident = self.blocks(positions) - match.streamed
        wanted: dict[Pool, int] = {
            "global": min(resident, self._share) if long else resident,
            "window": self.window_span(positions, at_once),
        }
        for name, pool in self._pools.items():
            taken = match.on_device[name]
            have = pool.ready
            least = max(0, wanted[name] - len(taken)) + spare - have
            if least > pool.available - have and not closing:
                return False  # whatever of the match is idle, and nothing that waits to be saved would help
            idle = pool.idle(taken)
            for key in closing:
                # What the match takes over from a closing sequence does not become available.
                have += sum(
                    pool.references(block) == 1 and block not in taken for block in self._open[key].held(name)
                )
            short = max(0, wanted[name] - len(taken)) + idle + spare - have
            if short > 0:
                # As many blocks wait only to be saved: let them not wait long.
                self._saves.pressed |= short <= pool.available - pool.ready
                return False
        return True

    def scarce(self, blocks: int) -> bool:
        """Whether the device has fewer global blocks than that to give without losing anything: window blocks
        wait for moves only where they are checkpoints."""
        return self._pools["global"].ready < blocks

    def room(self, key: int) -> int:
        """The most positions that `reserve` could cover for this sequence now."""
        sequence = self._open[key]
        more = self._pools["global"].available
        if sequence.long:
            more = min(more, max(0, self._share - sequence.resident))
        return self.layout.block_tokens * min(
            len(sequence.global_table) + more, len(sequence.window_table) + self._pools["window"].available
        )

    def tables(self, key: int) -> Tables:
        """The sequence's block tables: views whose contents do not change later, whatever happens to it."""
        sequence = self._open[key]
        return sequence.known_tables or sequence.tables()

    @property
    def busy(self) -> bool:
        """Whether blocks are being moved, whose arrival may let a sequence go on or start."""
        return self.traffic.busy

    @property
    def saving(self) -> bool:
        """Whether content waits to be saved to a lower tier, or is on its way there."""
        return self._saves.pending

    # --- taking -----------------------------------------------------------------------------------

    def open(self, key: int, chain: TokenChain, match: PrefixMatch, positions: int, limit: int = 0) -> None:
        """Start a sequence with `match`, which must still hold, and global blocks for `positions`, to grow
        to `limit` at most.

        Call it only after `can_open` said yes; nothing may be computed while `restoring`. The caller
        appends to `chain` as the sequence grows.
        """
        if key in self._open:
            raise ValueError(f"sequence {key} is open already")
        sequence = self._open[key] = OpenSequence(
            chain,
            blocks=match.blocks,
            streamed=match.streamed,
            window_first=match.window_first,
            long=self.is_long(limit),
        )
        # Where its own prompt ends, and where it leaves what another has computed.
        sequence.marks = frozenset({(len(chain) - 1) // self.layout.block_tokens, match.found})
        self._take(sequence, match)
        if not sequence.long:
            self._grow(sequence.global_table, self._pools["global"], positions)
        sequence.forget_tables()
        self._account(chain, match)
        self._settle(sequence)

    def restoring(self, key: int, *, alone: bool = False, budget: int = 0) -> bool:
        """Whether blocks of the sequence are still on their way to where a step may read them.

        Where steps may read what is still `arriving`, it does not wait for that if it is `alone`, with no
        other sequence to wait in its steps, or if copying is known to take no longer than its first step, of
        `budget` tokens at most: the copies are then ahead of the layers.
        """
        sequence = self._open[key]
        self._settle(sequence)
        restore = sequence.restore
        if restore.left > restore.ahead or restore.failed or sequence.long:
            return bool(restore.left)
        tokens = min(budget, len(sequence.chain) - sequence.computed)
        return bool(restore.left) and not alone and not self._is_ahead(restore, tokens)

    def arriving(self, key: int) -> list[Ticket]:
        """The copies that a step of this sequence, which is not `restoring`, must name."""
        return [ticket for ticket in self._open[key].restore.arriving if not ticket.done()]

    def computed(self, key: int) -> int | None:
        """Positions that need not be computed (any more); None when restoring failed: close the sequence
        and match anew, which will not find again what failed."""
        sequence = self._open[key]
        return None if sequence.restore.failed else sequence.computed

    def covers(self, key: int, positions: int) -> bool:
        """Whether there is nothing to reserve, nor room to be made, for so many positions."""
        sequence = self._open[key]
        return positions <= sequence.covered and not sequence.long

    def make_room(self, key: int, positions: int, least: int | None = None) -> bool:
        """Of a sequence longer than the device pool, leave leading blocks to host memory until `positions`
        fit in its share of the device. False when it must wait for them to be copied there first; true as
        well when nothing is needed, when `least` of them (by default one more than is computed) fit already,
        or when waiting does not help."""
        sequence = self._open[key]
        if not sequence.long or self._host is None:
            return True
        host = self._host["global"]
        excess = sequence.resident + self.blocks(positions) - len(sequence.global_table) - self._share
        while excess > 0 and sequence.streamed < sequence.registered:
            hash = sequence.chain.hashes[sequence.streamed]
            slot = host.lookup(hash)
            if slot is None:
                # Ours may be a second block of this content, whose first is gone.
                block = int(sequence.global_table.view()[sequence.streamed])
                self._pools["global"].register(block, hash, sequence.chain.parent(sequence.streamed))
                self._saves.add("device", "global", hash, needed=True)
                least = sequence.computed + 1 if least is None else least
                return self.room(key) >= least or not (host.ready or self.busy)
            host.acquire(slot)
            self._pools["global"].release(sequence.stream(slot))
            excess -= 1
        return True

    def reserve(self, key: int, positions: int) -> bool:
        """Make both tables cover positions 0 .. positions - 1 (the window table: those still in sight).

        All or nothing: False, and nothing changed, when `room(key)` is less.
        """
        sequence = self._open[key]
        if positions <= sequence.covered:
            return True
        if positions > self.room(key):
            return False
        self._grow(sequence.global_table, self._pools["global"], positions)
        self._grow(sequence.window_table, self._pools["window"], positions)
        sequence.forget_tables()
        return True

    def commit(self, key: int, computed: int) -> None:
        """Positions below `computed` are in the pool now.

        Blocks that became full can be matched by others from here on, and window blocks out of sight of
        the next position are released.
        """
        sequence = self._open[key]
        self._time += computed - sequence.computed
        sequence.computed = computed
        if computed < sequence.quiet_until:
            return
        size = self.layout.block_tokens
        full = computed // size
        if self.prefix_cache:
            self._register(sequence, full)
        sequence.registered = max(sequence.registered, full)
        first = self._prefixes.first_window_block(computed)
        if first > sequence.window_first:
            for block in sequence.window_table.view(sequence.window_first, first).tolist():
                self._pools["window"].release(block)
            sequence.window_first = first
            sequence.forget_tables()
        slides = (sequence.window_first + 1) * size + self.layout.window - 1
        sequence.quiet_until = min((full + 1) * size, slides)

    def quiet(self, key: int, computed: int) -> bool:
        """Whether `commit` of so many positions will change nothing of the sequence's blocks and tables, so
        that the next position is in the same block."""
        sequence = self._open[key]
        return computed < sequence.quiet_until and not sequence.long

    def commit_quiet(self, keys: Sequence[int]) -> None:
        """Of each of these sequences one position more is in the pool: `commit` where that is `quiet`."""
        opened = self._open
        for key in keys:
            opened[key].computed += 1
        self._time += len(keys)

    def record(self, key: int, mass: NDArray[np.float32], steps: int = 1) -> None:
        """A step of this sequence gave `mass[i]` of its attention to logical block i; it speaks for so many
        steps."""
        sequence = self._open[key]
        table = sequence.global_table.view(0, len(mass))
        streamed = min(sequence.streamed, len(mass))
        self._pools["global"].policy.record(table[streamed:], mass[streamed:], steps)
        if streamed and self._host is not None:
            self._host["global"].policy.record(table[:streamed], mass[:streamed], steps)

    def close(self, key: int, *, cache: bool = True) -> None:
        """End a sequence, or preempt it. Its full blocks stay cached and are saved, unless not `cache`: then
        nothing of its content can be matched any more. Idempotent."""
        sequence = self._open.pop(key, None)
        if sequence is None:
            return
        self._lifts.cancel(sequence.restore)
        if not cache:
            for hash in sequence.chain.hashes[: sequence.registered]:
                for tier in self.traffic.pools.values():
                    for pool in tier.values():
                        pool.discard(hash)
        elif self.prefix_cache and not sequence.restore.left:
            self._checkpoints.keep(sequence.chain, sequence.registered)
        # The end of the chain first, so that among equally old blocks it is the first to be evicted.
        for name, pool in self._pools.items():
            for block in sequence.held(name)[::-1]:
                pool.release(block)
        if self._host is not None:
            for slot in sequence.slots():
                self._host["global"].release(slot)

    # --- tiers ------------------------------------------------------------------------------------

    def take_in(self) -> None:
        """Learn what has moved: call it before deciding anything about a step. Never waits."""
        self.traffic.advance()
        self._saves.pressed = False

    def start_moves(self) -> None:
        """Start the moves that are wanted and for which there is room: call it when a step is decided, so
        that it had the first choice of what has arrived. Never waits."""
        self._lifts.advance()
        self._saves.advance()

    def prefetch(self, chain: TokenChain, positions: int = 0) -> None:
        """A sequence of this chain waits: bring what it will match, and only the file has, to host memory."""
        if "nvme" not in self.traffic.pools:
            return
        match = self.match(chain, positions)
        wanted: list[tuple[Pool, int, Place]] = [
            ("window", index, place) for index, place in enumerate(match.window_places, match.window_first)
        ]
        wanted += [("global", index, place) for index, place in enumerate(match.global_places)]
        for pool, index, place in wanted:
            if place.tier == "nvme" and not self._lifts.prefetch(
                pool, chain.hashes[index], chain.parent(index)
            ):
                return

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """A step computed `tokens` prompt tokens in `seconds`: what raising blocks is weighed against."""
        self.traffic.rates.observe_prefill(tokens, seconds)

    # --- accounts ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise EngineError unless, in every pool of every tier, free + used + cached is the total and every
        reference is an open sequence's or a move's. O(blocks)."""
        held: dict[tuple[Tier, Pool], Counter[int]] = {
            (tier, pool): Counter(self.traffic.pins(tier, pool))
            for tier, pools in self.traffic.pools.items()
            for pool in pools
        }
        for key, sequence in self._open.items():
            for pool in self._pools:
                held["device", pool].update(sequence.held(pool))
            if self._host is not None:
                held["host", "global"].update(sequence.slots())
            if sequence.computed > len(sequence.global_table) * self.layout.block_tokens:
                raise EngineError(
                    f"sequence {key}: {sequence.computed} positions computed in"
                    f" {len(sequence.global_table)} blocks"
                )
        for (tier, name), references in held.items():
            self.traffic.pools[tier][name].check(references)

    @property
    def stats(self) -> CacheStats:
        return stats_of(self.traffic, self._hits, self._opened_tokens)

    def report(self) -> dict[str, object]:
        """What there is to tell of all tiers, as JSON."""
        return report(self.stats, self.traffic)

    # --- insides ----------------------------------------------------------------------------------

    def _take(self, sequence: OpenSequence, match: PrefixMatch) -> None:
        """Hold the blocks of a match, and have those below the device lifted."""
        chain, lifts, restore = sequence.chain, self._lifts, sequence.restore
        resident: list[tuple[Pool, int, Place]] = [
            ("window", i, place) for i, place in enumerate(match.window_places, match.window_first)
        ]
        resident += [
            ("global", i, place) for i, place in enumerate(match.global_places) if i >= match.streamed
        ]
        # What is there first, lest taking a block for what is not should evict it.
        for name, _, place in resident:
            if place.tier == "device":
                self._pools[name].acquire(place.block)
        for index, place in enumerate(match.global_places[: match.streamed]):
            lifts.add(restore, "global", chain.hashes[index], chain.parent(index), place, None)
        for name, index, place in resident:
            block = place.block
            if place.tier != "device":
                block = self._pools[name].allocate()
                lifts.add(restore, name, chain.hashes[index], chain.parent(index), place, block)
            (sequence.global_table if name == "global" else sequence.window_table).append(block)
            self._touch_copies(name, chain.hashes[index])
        self._checkpoints.keep(chain, match.blocks)

    def _is_ahead(self, restore: Restore, tokens: int) -> bool:
        """Whether what is on its way arrives in the time that so many prompt tokens take."""
        speed, prefill = self.traffic.rates.bytes_per_second(("host", "device")), self.traffic.rates.prefill
        return speed is not None and prefill is not None and restore.ahead_bytes / speed <= tokens / prefill

    def _settle(self, sequence: OpenSequence) -> None:
        """Take over what the restore has left in host memory, once it is complete."""
        restore = sequence.restore
        if not sequence.settled and not restore.left and not restore.failed:
            sequence.settle(self._lifts.hand_over(restore))

    def _touch_copies(self, name: Pool, hash: bytes) -> None:
        """Content used on the device: its copies below are worth as much."""
        for tier, pools in self.traffic.pools.items():
            block = pools[name].lookup(hash)
            if block is not None and tier != "device":
                pools[name].touch(block)

    def _register(self, sequence: OpenSequence, full: int) -> None:
        """Make the blocks up to `full` findable, and keep the checkpoints among them."""
        chain = sequence.chain
        for index in range(sequence.registered, full):
            hash, parent = chain.hashes[index], chain.parent(index)
            block = int(sequence.global_table.view()[index])
            if self._pools["global"].register(block, hash, parent, saved=self._host is None):
                self._saves.add("device", "global", hash)
            block = int(sequence.window_table.view()[index])
            self._pools["window"].register(block, hash, parent, expendable=True)
            self._checkpoints.pass_by(sequence, index + 1)

    def _account(self, chain: TokenChain, match: PrefixMatch) -> None:
        size = self.layout.block_tokens
        self._opened_tokens += len(chain)
        self._time += match.blocks * size
        for place in match.global_places:
            self._hits[place.tier] += size
        if not self.prefix_cache:
            return
        misses = self.traffic.misses
        misses["absent"] += (len(chain) - 1) // size - match.found
        misses["slower" if match.slower else "no_window"] += match.found - match.blocks

    def _clock(self) -> float:
        return self._time

    def _grow(self, table: Grow, pool: BlockPool, positions: int) -> None:
        for _ in range(self.blocks(positions) - len(table)):
            table.append(pool.allocate())
