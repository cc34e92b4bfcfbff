"""Request traces replayed through the real cache manager, with modelled copies and a modelled engine.

What is real: matching, admission, saves, lifts, checkpoints, policies; every block is accounted for. What is
modelled: time. Copies of a route follow one another at its bandwidth, prompts are computed one after the
other at a fixed rate, and output at a fixed time a token, beside each other.

A trace's line is a request: when it came, how long its prompt and output were, and the ids of its prompt's
blocks, where an equal id means an equal prefix up to there (the form of Mooncake's published traces). Output
is held while it is generated and then forgotten, as such traces do not say which request continues it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import KVLayout
from wicore.errors import TooLarge
from wicore.hmt.chain import TokenChain
from wicore.hmt.manager import CacheManager
from wicore.hmt.match import PrefixMatch
from wicore.hmt.moves import Move, Outcome, Tier
from wicore.hmt.pool import PolicyFactory
from wicore.hmt.rates import Route
from wicore.hmt.tiers import TierSizes

_CHUNK_BLOCKS = 4
"""Blocks that a step computes of a prompt."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace."""

    at: float
    """Seconds from the start."""
    input_tokens: int
    output_tokens: int
    ids: tuple[int, ...]
    """Of the prompt's blocks, the last of which need not be full."""
    attention: tuple[float, ...] | None = None
    """What each block drew, relative to an even spread; None where it was not recorded."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the modelled time depends on."""

    bandwidth: Mapping[Route, float]
    """Bytes a second."""
    prefill_tokens_s: float
    decode_s: float
    """Seconds an output token."""


@dataclass(slots=True)
class Replay:
    """What a replay has shown."""

    requests: int = 0
    refused: int = 0
    """Longer than all tiers allow."""
    prompt_tokens: int = 0
    hit_tokens: dict[Tier, int] = field(default_factory=dict)
    recalled_bytes: int = 0
    """Brought up to the device."""
    moved_bytes: dict[str, int] = field(default_factory=dict)
    """By route, "device>host" and so on."""
    first_token_s: list[float] = field(default_factory=list)
    """By request, from its arrival; the queue in front of the engine included."""

    @property
    def hit_rate(self) -> float:
        return sum(self.hit_tokens.values()) / max(1, self.prompt_tokens)


class _ModelledMover:
    """A mover in modelled time: one copy of a route after the other."""

    def __init__(self, layout: KVLayout, bandwidth: Mapping[Route, float]) -> None:
        self.now = 0.0
        self._layout, self._bandwidth = layout, bandwidth
        self._free_at: dict[Route, float] = {}
        self._moves: list[tuple[float, int, Outcome]] = []
        self._count = 0

    by_layer = False

    def start(self, move: Move) -> None:
        route = (move.source, move.target)
        size = len(move.contents) * self._layout.block_bytes(move.pool)
        seconds = size / self._bandwidth[route]
        end = max(self.now, self._free_at.get(route, 0.0)) + seconds
        self._free_at[route] = end
        self._count += 1
        heapq.heappush(self._moves, (end, self._count, Outcome(move, seconds)))

    def finished(self) -> Sequence[Outcome]:
        ended = []
        while self._moves and self._moves[0][0] <= self.now:
            ended.append(heapq.heappop(self._moves)[2])
        return ended

    def next_end(self) -> float | None:
        return self._moves[0][0] if self._moves else None


def replay(
    requests: Iterable[Request],
    layout: KVLayout,
    sizes: TierSizes,
    hardware: Hardware,
    policy: PolicyFactory,
    *,
    max_batch: int = 64,
    checkpoint_tokens: int = 8192,
    served: Callable[[TokenChain], None] = lambda chain: None,
) -> Replay:
    """Replay a trace whose blocks are `layout.block_tokens` long. `served(chain)` is told of each request
    when its turn comes, before anything is decided of it."""
    server = _Server(layout, sizes, hardware, policy, max_batch, checkpoint_tokens)
    ahead = deque(sorted(requests, key=lambda request: request.at))
    while ahead:
        server.serve(ahead.popleft(), ahead, served)
    server.finish()
    return server.result


class _Server:
    """The modelled engine: requests in order of arrival, each from its turn to its first token."""

    def __init__(
        self,
        layout: KVLayout,
        sizes: TierSizes,
        hardware: Hardware,
        policy: PolicyFactory,
        max_batch: int,
        checkpoint_tokens: int,
    ) -> None:
        self.result = Replay()
        self._mover = _ModelledMover(layout, hardware.bandwidth)
        self._cache = CacheManager(
            layout,
            sizes,
            "trace",
            mover=self._mover if sizes.host is not None else None,
            policy=policy,
            checkpoint_tokens=checkpoint_tokens,
        )
        self._hardware, self._max_batch, self._size = hardware, max_batch, layout.block_tokens
        self._ends: list[tuple[float, int]] = []
        """(when, key) of the sequences that are generating."""
        self._keys = 0
        self._prefetched: set[int] = set()

    def serve(self, request: Request, ahead: Sequence[Request], served: Callable[[TokenChain], None]) -> None:
        """From the request's turn to its first token."""
        self._until(request.at)
        chain, positions = self._chain(request), request.input_tokens + request.output_tokens
        self.result.requests += 1
        self.result.prompt_tokens += request.input_tokens
        if not self._cache_holds(positions):
            self.result.refused += 1
            return
        served(chain)
        self._look_ahead(request, ahead)
        self._keys += 1
        key = self._keys
        self._open(key, chain, positions)
        self._prefill(key, request)
        self.result.first_token_s.append(self._mover.now - request.at)
        end = self._mover.now + request.output_tokens * self._hardware.decode_s
        heapq.heappush(self._ends, (end, key))

    def finish(self) -> None:
        """Let everything end, and add up."""
        while self._ends or self._cache.busy:
            self._next_event()
        self._cache.check()
        stats, result = self._cache.stats, self.result
        result.hit_tokens = dict(stats.hit_tokens)
        for (route, _), size in self._cache.traffic.moved_bytes.items():
            name = ">".join(route)
            result.moved_bytes[name] = result.moved_bytes.get(name, 0) + size
        result.recalled_bytes = result.moved_bytes.get("host>device", 0)

    def _chain(self, request: Request) -> TokenChain:
        tokens: NDArray[np.int32] = np.repeat(np.asarray(request.ids, np.int32), self._size)
        return self._cache.chain(tokens[: request.input_tokens])

    def _cache_holds(self, positions: int) -> bool:
        try:
            self._cache.require(positions)
        except TooLarge:
            return False
        return True

    def _look_ahead(self, request: Request, ahead: Sequence[Request]) -> None:
        """Requests that have come and wait behind this one have their prefixes brought nearer."""
        for index, other in enumerate(ahead):
            if other.at > self._mover.now or index >= 8:
                return
            if id(other) not in self._prefetched:
                self._prefetched.add(id(other))
                self._cache.prefetch(self._chain(other), other.input_tokens + other.output_tokens)

    def _open(self, key: int, chain: TokenChain, positions: int) -> None:
        """Wait for a slot and blocks, and then for what the match has to raise."""
        long = self._cache.is_long(positions)
        while True:
            match: PrefixMatch = self._cache.match(chain, positions)
            if len(self._ends) < self._max_batch and self._cache.can_open(match, positions, long=long):
                self._cache.open(key, chain, match, positions, positions)
                self._cache.start_moves()
                while self._cache.restoring(key):
                    self._next_event()
                if self._cache.computed(key) is not None:
                    return
                self._cache.close(key)
            else:
                self._next_event()

    def _prefill(self, key: int, request: Request) -> None:
        computed = self._cache.computed(key) or 0
        while computed < request.input_tokens:
            end = self._reserve(
                key, computed, min(request.input_tokens, computed + _CHUNK_BLOCKS * self._size)
            )
            seconds = (end - computed) / self._hardware.prefill_tokens_s
            self._cache.observe_prefill(end - computed, seconds)
            self._until(self._mover.now + seconds)
            self._cache.commit(key, end)
            computed = end
        if request.attention is not None:
            mass = np.asarray(request.attention, np.float32)
            self._cache.record(key, mass / mass.sum())
        self._cache.start_moves()

    def _reserve(self, key: int, computed: int, positions: int) -> int:
        """Reserve up to `positions`, at least one more than are computed; returns how many. One longer than
        the device may have to take less at a time."""
        while not self._cache.make_room(key, positions) or self._cache.room(key) <= computed:
            self._cache.start_moves()
            self._next_event()
        end = min(positions, self._cache.room(key))
        self._cache.reserve(key, end)
        return end

    def _next_event(self) -> None:
        times = [] if (end := self._mover.next_end()) is None else [end]
        times += [self._ends[0][0]] if self._ends else []
        if not times:
            raise RuntimeError("the replay stands still: nothing moves and nothing ends")
        self._until(min(times))

    def _until(self, when: float) -> None:
        """Let time pass, and everything happen that happens meanwhile, in order."""
        while True:
            times = [when]
            if (end := self._mover.next_end()) is not None:
                times.append(end)
            if self._ends:
                times.append(self._ends[0][0])
            self._mover.now = max(self._mover.now, min(times))
            while self._ends and self._ends[0][0] <= self._mover.now:
                self._cache.close(heapq.heappop(self._ends)[1])
            self._cache.take_in()
            self._cache.start_moves()
            if self._mover.now >= when:
                return
