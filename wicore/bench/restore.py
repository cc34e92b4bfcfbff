"""How much sooner a long prompt's first token comes from the tiers than by computing it."""

from __future__ import annotations

import mmap
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wicore.bench.driver import random_prompt
from wicore.bench.peers import Line
from wicore.config import Settings
from wicore.engine.base import Engine, KVLayout
from wicore.errors import EngineError
from wicore.hmt.moves import Tier
from wicore.hmt.tiers import POOLS
from wicore.request import Priority, SamplingParams
from wicore.sampling import SamplingState
from wicore.scheduler import Limits, Scheduler, SequenceRequest
from wicore.tiers.cache import TieredCache

_COPIES = 3
"""So many such prompts have room in host memory and in the file."""
_MIB = 2**20


class TieredServer:
    """An engine with all its tiers, served in this thread. The engine is the caller's to close."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._moved = threading.Event()
        self._engine = engine
        self.cache = TieredCache(settings, engine, self._moved.set)
        limits = Limits(settings.scheduler.max_batch, settings.scheduler.token_budget)
        self._scheduler = Scheduler(limits, self.cache.manager)
        self._keys = 0

    def first_token(self, prompt: list[int]) -> tuple[float, int]:
        """(seconds from the request to its first token, the token)."""
        self._keys += 1
        state = SamplingState(SamplingParams(temperature=0.0), self._keys)
        started = time.perf_counter()
        self._scheduler.add(SequenceRequest(self._keys, prompt, [], 4, state, Priority.NORMAL))
        while True:
            self._moved.clear()
            plan = self._scheduler.plan()
            if plan is None:
                self._moved.wait(60)
                continue
            begun = time.monotonic()
            pending = self._engine.start(plan)
            self._scheduler.catch_up()
            result = pending.result()
            self.cache.observe(plan, time.monotonic() - begun)
            out = self._scheduler.apply(result)
            if out:
                seconds = time.perf_counter() - started
                self._scheduler.remove(self._keys)
                return seconds, out[0].token.id

    def flush(self) -> None:
        """Save all that waits to be saved."""

        def wait(seconds: float) -> None:
            self._moved.wait(seconds)
            self._moved.clear()

        self.cache.flush(600, wait)

    def forget(self, prompt: list[int], *tiers: Tier) -> None:
        """Take the prompt's blocks from these tiers, as others that displace them would."""
        manager = self.cache.manager
        for hash in manager.chain(prompt).hashes:
            for tier in tiers:
                for pool in manager.traffic.pools[tier].values():
                    pool.discard(hash)

    def hits(self) -> Counter[str]:
        """Tokens found so far, by tier."""
        return Counter({str(tier): count for tier, count in self.cache.manager.stats.hit_tokens.items()})

    def close(self) -> None:
        self.cache.close()


def kv_bytes(layout: KVLayout, tokens: int) -> int:
    """Bytes of what a prompt's restore brings up: its whole blocks, and one window."""
    window = min(tokens // layout.block_tokens, -(-(layout.window - 1) // layout.block_tokens) + 1)
    blocks = {"global": tokens // layout.block_tokens, "window": window}
    return sum(blocks[pool] * layout.block_bytes(pool) for pool in POOLS)


def tiered_settings(settings: Settings, layout: KVLayout, tokens: int, folder: Path) -> Settings:
    """The settings with host memory and a file for a few prompts of so many tokens."""
    sizes = {pool: layout.block_bytes(pool) for pool in POOLS}
    blocks = tokens // layout.block_tokens + 1
    windows = -(-(layout.window - 1) // layout.block_tokens) + 1
    every = settings.hmt.checkpoint_tokens
    kept = windows * (2 + (tokens // every if every else 0))
    global_bytes, window_bytes = _COPIES * blocks * sizes["global"], _COPIES * kept * sizes["window"]
    total = int(1.02 * (global_bytes + window_bytes)) + 64 * _MIB
    changes = {
        "host_bytes": total,
        "nvme_path": str(folder),
        "nvme_bytes": total + 8192 * _COPIES * (blocks + kept),
        "window_share": min(0.95, max(0.02, window_bytes / (global_bytes + window_bytes))),
    }
    return settings.model_copy(update={"hmt": settings.hmt.model_copy(update=changes)})


def measure_restore(
    engine: Engine, settings: Settings, tokens: int, folder: Path, rounds: int
) -> Iterator[Line]:
    """Three lines: computed from nothing; from host memory; from the file. The first tokens must be the same.

    To be called once an engine, which gives its host memory once. Raises EngineError when the token differs,
    or what should have been found was not.
    """
    server = TieredServer(tiered_settings(settings, engine.info.layout, tokens, folder), engine)
    try:
        vocab = engine.info.vocab_size
        prompt = random_prompt(tokens, 1, vocab)
        server.first_token(
            random_prompt(64, 99, vocab)
        )  # the engine's own first step is not the cache's matter
        computed, token = server.first_token(prompt)
        server.flush()
        size = kv_bytes(engine.info.layout, tokens)
        common: Line = {"prompt": tokens, "output": 1, "batch": 1, "kv_mb": round(size / 1e6)}
        yield {"measurement": "first token, computed", "seconds": round(computed, 4), **common}
        ways: list[tuple[Tier, tuple[Tier, ...], str]] = [
            ("host", ("device",), "from host memory"),
            ("nvme", ("device", "host"), "from the file"),
        ]
        for tier, gone, what in ways:
            seconds, hits = [], Counter[str]()
            for _ in range(rounds):
                server.forget(prompt, *gone)
                before = server.hits()
                taken, again = server.first_token(prompt)
                hits = server.hits() - before
                server.flush()
                seconds.append(taken)
                if again != token:
                    raise EngineError(f"first token {what}: {again} instead of {token}")
            middle = statistics.median(seconds)
            yield {
                "measurement": f"first token, {what}",
                "seconds": round(middle, 4),
                "times_sooner": round(computed / middle, 1),
                "hit_tokens": dict(hits),
                "kv_gb_s": round(size / middle / 1e9, 2),
                **_at_best(server, tier, folder),
                **common,
            }
    finally:
        server.close()


def _at_best(server: TieredServer, tier: str, folder: Path) -> Line:
    """What the copies alone can do, as far as it is known."""
    rates = server.cache.manager.traffic.rates
    copy = rates.bytes_per_second(("host", "device"))
    line: Line = {"copy_gb_s": None if copy is None else round(copy / 1e9, 2)}
    if tier == "nvme":
        line |= {
            "direct_io": server.cache.report()["direct_io"],
            "disk_read_gb_s": round(disk_read_rate(folder), 2),
        }
    return line


def disk_read_rate(folder: Path) -> float:
    """GB/s of plain reads past the page cache, 4 MiB each, of the file that was written."""
    [path] = folder.glob("*/global.blocks")
    buffer = np.frombuffer(memoryview(mmap.mmap(-1, 4 * _MIB)), np.uint8)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    started, read = time.perf_counter(), 0
    try:
        while read < 200 * _MIB and (count := os.preadv(descriptor, [buffer.data], read)):
            read += count
    except OSError:  # a file system without direct access
        return 0.0
    finally:
        os.close(descriptor)
    return read / (time.perf_counter() - started) / 1e9
