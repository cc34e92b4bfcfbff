"""A page cache and a clock, to try eviction policies without a pool."""

from __future__ import annotations

from collections.abc import Callable

from wicore.hmt.policy import Clock, EvictionPolicy


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Cache:
    """A cache of pages of one size without any order among them, ruled by a policy."""

    def __init__(self, blocks: int, make: Callable[[int, Clock], EvictionPolicy]) -> None:
        self.time = Time()
        self.policy = make(blocks, self.time)
        self.block_of: dict[str, int] = {}
        self.free = list(range(blocks - 1, -1, -1))
        self.hits = 0

    def access(self, page: str) -> bool:
        self.time.now += 1
        block = self.block_of.get(page)
        if block is not None:
            self.policy.touch(block)
            self.hits += 1
            return True
        if not self.free:
            victim = self.policy.victim()
            self.policy.drop(victim, evicted=True)
            self.free.append(victim)
            del self.block_of[next(page for page, block in self.block_of.items() if block == victim)]
        block = self.block_of[page] = self.free.pop()
        self.policy.insert(block, page.encode())
        self.policy.add(block)
        return False

    def run(self, pages: str) -> set[str]:
        for page in pages:
            self.access(page)
        return set(self.block_of)
