"""`wicore bench kv`: what the bookkeeping of the KV cache costs, without the memory that it stands for.

Pool: one pool of many blocks under the mix of calls that the manager makes. Sequences of 64 blocks come with
Zipf popularity; each looks its blocks up, takes those found, allocates and registers the others (evicting
what is cached), reports attention, and releases all when as many newer ones are open as a batch has.

Manager: sequences of 32K tokens matched, opened, committed and closed over three tiers, between which a
mover carries at once what it is given.
"""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from wicore.bench.hardware import describe
from wicore.engine.base import Pool
from wicore.engine.sizing import layout_of
from wicore.gemma3.config import PUBLISHED
from wicore.hmt import BlockPool, CacheManager, TierSizes
from wicore.hmt.moves import Move, Outcome
from wicore.hmt.policy import POLICIES

Line = dict[str, object]
Progress = Callable[[str], None]

_OPEN = 64
"""Sequences open at a time."""
_SEQUENCE = 64
"""Blocks of a sequence in the pool's mix."""
_CONTENTS = 4
"""Distinct contents for each block of the pool."""
_SKEW = 0.9
"""Exponent of the Zipf law."""
_WARM_UP = 0.25
"""Share of the pool's blocks to have been evicted once before anything is measured."""

_MODEL = "gemma-3-27b"
_BLOCK_TOKENS = 32
_CHAIN = 1024
"""Blocks of a sequence in the manager's mix: 32K tokens."""
_CHUNK = 64
"""Blocks that a step computes."""
_CHAINS = 48
"""Distinct sequences."""
_TIERS = (4, 16, 96)
"""Sequences that each tier has blocks for."""


class Meter:
    """Seconds of the processor and operations, by kind of operation: what else runs on the machine does not
    count."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.operations: Counter[str] = Counter()

    @contextmanager
    def of(self, kind: str, operations: int) -> Iterator[None]:
        """What happens inside is so many operations of this kind."""
        start = time.thread_time()
        yield
        self.seconds[kind] += time.thread_time() - start
        self.operations[kind] += operations

    def microseconds(self) -> dict[str, float]:
        """Of an operation, by kind."""
        return {
            kind: round(1e6 * self.seconds[kind] / count, 3)
            for kind, count in self.operations.items()
            if count
        }

    @property
    def microsecond_mean(self) -> float:
        return round(1e6 * sum(self.seconds.values()) / max(1, self.operations.total()), 3)


def _popularity(contents: int) -> Iterator[int]:
    """Numbers below `contents`, the lower the more often: the same at every run."""
    cumulated = np.cumsum(np.arange(1, contents + 1, dtype=float) ** -_SKEW)
    random = np.random.default_rng(0)
    while True:
        yield from np.searchsorted(cumulated, random.uniform(0, cumulated[-1], 4096)).tolist()


# --- one pool -----------------------------------------------------------------------------------------


class PoolMix:
    """The calls that a manager makes to one pool."""

    def __init__(self, blocks: int, policy: str) -> None:
        """Raises ValueError when `blocks` cannot hold the sequences that are open at a time."""
        if blocks < (least := (_OPEN + 2) * _SEQUENCE):
            raise ValueError(f"--blocks: {blocks} do not hold the open sequences; at least {least}")
        self._time = 0
        self.pool = BlockPool("bench", blocks, POLICIES[policy], self._clock, leaves_first=True)
        self._popular = _popularity(_CONTENTS * blocks // _SEQUENCE)
        self._open: deque[list[int]] = deque()
        random = np.random.default_rng(1)
        self._mass: NDArray[np.float32] = random.dirichlet(np.ones(_SEQUENCE), 64).astype(np.float32)

    def _clock(self) -> float:
        return self._time

    def sequence(self, meter: Meter) -> None:
        """One more sequence comes, and the oldest goes."""
        first = next(self._popular) * _SEQUENCE
        hashes = [b"salt", *((first + i).to_bytes(16, "little") for i in range(_SEQUENCE))]
        pool = self.pool
        with meter.of("lookup", 1):
            found = _leading(pool, hashes)
        meter.operations["lookup"] += len(found)
        with meter.of("acquire", len(found)):
            for block in found:
                pool.acquire(block)
        missing = range(len(found), _SEQUENCE)
        with meter.of("allocate", len(missing)):
            table = found + [pool.allocate() for _ in missing]
        self._time += 32 * _SEQUENCE
        with meter.of("register", len(missing)):
            for i in missing:
                pool.register(table[i], hashes[i + 1], hashes[i])
        blocks = np.asarray(table, np.int32)
        with meter.of("record", 1):
            pool.policy.record(blocks, self._mass[first // _SEQUENCE % len(self._mass)])
        self._open.append(table)
        if len(self._open) > _OPEN:
            oldest = self._open.popleft()
            with meter.of("release", len(oldest)):
                for block in reversed(oldest):
                    pool.release(block)


def _leading(pool: BlockPool, hashes: Sequence[bytes]) -> list[int]:
    """The blocks of the leading contents, up to the first that is not there."""
    found: list[int] = []
    for hash in hashes[1:]:
        block = pool.lookup(hash)
        if block is None:
            break
        found.append(block)
    return found


def measure_pool(blocks: int, operations: int, policy: str, progress: Progress) -> Line:
    """Microseconds of the processor that an operation takes in a full pool, and the memory. A report of
    attention, on a whole sequence, is one operation."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    mix = PoolMix(blocks, policy)
    evicted = 0
    for _ in range(100 * blocks):
        if (evicted := mix.pool.stats().evicted) > _WARM_UP * blocks:
            break
        mix.sequence(Meter())
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()  # it slows allocations down
    progress(f"{policy}: a pool of {blocks:,} blocks is full, {evicted:,} evicted")
    meter, told = Meter(), time.monotonic()
    while (done := meter.operations.total()) < operations:
        mix.sequence(meter)
        if time.monotonic() - told > 5:
            told = time.monotonic()
            progress(f"{policy}: {done:,} of {operations:,} operations")
    took = meter.operations["acquire"] + meter.operations["allocate"]
    return {
        "measurement": "kv pool",
        "policy": policy,
        "blocks": blocks,
        "operations": done,
        "hit_rate": round(meter.operations["acquire"] / max(1, took), 3),
        "microseconds": meter.microsecond_mean,
        "microseconds_by_kind": meter.microseconds(),
        "bytes_a_block": round((after - before) / blocks),
        **describe(),
    }


# --- the manager --------------------------------------------------------------------------------------


class ImmediateMover:
    """Every move has ended by the next look."""

    def __init__(self) -> None:
        self._moves: list[Move] = []
        self.blocks = 0

    by_layer = False

    def start(self, move: Move) -> None:
        self._moves.append(move)
        self.blocks += len(move.contents)

    def finished(self) -> Sequence[Outcome]:
        moves, self._moves = self._moves, []
        return [Outcome(move, 0.001) for move in moves]


class ManagerMix:
    """Sequences of 32K tokens, one after the other."""

    def __init__(self, policy: str) -> None:
        config = PUBLISHED[_MODEL]
        layout = layout_of(config, _BLOCK_TOKENS, "float16")
        device, host, nvme = (self._blocks(chains) for chains in _TIERS)
        self._mover = ImmediateMover()
        self.cache = CacheManager(
            layout,
            TierSizes(device, host, nvme),
            "bench",
            mover=self._mover,
            policy=POLICIES[policy],
            checkpoint_tokens=8192,
        )
        self._popular = _popularity(_CHAINS)
        self._keys = 0

    def sequence(self, meter: Meter) -> None:
        """One sequence, from its tokens to its end."""
        cache, positions = self.cache, _CHAIN * _BLOCK_TOKENS
        tokens = np.random.default_rng(next(self._popular)).integers(0, 250_000, positions, np.int32)
        with meter.of("hash", _CHAIN):
            chain = cache.chain(tokens)
        with meter.of("match", 1):
            match = cache.match(chain)
        meter.operations["match"] += match.found
        assert cache.can_open(match, positions), "all is saved, and nothing else is open"
        self._keys += 1
        key = self._keys
        with meter.of("open", _CHAIN):
            cache.open(key, chain, match, positions)
        while cache.restoring(key):
            self._move(meter)
        for end in range(match.blocks + _CHUNK, _CHAIN + _CHUNK, _CHUNK):
            computed = min(end, _CHAIN) * _BLOCK_TOKENS
            with meter.of("reserve", _CHUNK):
                assert cache.reserve(key, computed)
            with meter.of("commit", _CHUNK):
                cache.commit(key, computed)
            self._move(meter)
        with meter.of("close", _CHAIN):
            cache.close(key)
        while cache.saving or cache.busy:
            self._move(meter)

    def _blocks(self, chains: int) -> dict[Pool, int]:
        return {"global": chains * _CHAIN, "window": chains * _CHAIN // 2}

    def _move(self, meter: Meter) -> None:
        before = self._mover.blocks
        with meter.of("move", 0):
            self.cache.take_in()
            self.cache.start_moves()
        meter.operations["move"] += self._mover.blocks - before


def measure_manager(sequences: int, policy: str, progress: Progress) -> Line:
    """Microseconds of the processor a block, of what the manager does with sequences of 32K tokens: of match
    the blocks found, of move those moved from tier to tier, and of the others those of the sequence."""
    mix, meter = ManagerMix(policy), Meter()
    for _ in range(2 * _CHAINS if sequences > _CHAINS else 0):
        mix.sequence(Meter())
    progress(f"{policy}: the tiers are filled")
    for _ in range(sequences):
        mix.sequence(meter)
    mix.cache.check()
    stats = mix.cache.stats
    return {
        "measurement": "kv manager",
        "policy": policy,
        "model": _MODEL,
        "sequences": sequences,
        "blocks_a_sequence": _CHAIN,
        "hit_rate": {
            tier: round(tokens / stats.opened_tokens, 3) for tier, tokens in stats.hit_tokens.items()
        },
        "microseconds_a_block": meter.microseconds(),
        **describe(),
    }


def measure(
    blocks: int, operations: int, sequences: int, policies: Sequence[str], progress: Progress
) -> Iterator[Line]:
    """A line for the pool and one for the manager, for each policy."""
    for policy in policies:
        yield measure_pool(blocks, operations, policy, progress)
        yield measure_manager(sequences, policy, progress)
