"""MIN, the offline optimum: what a policy could do that knew the future."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from wicore.hmt.policies.base import Clock, Heat
from wicore.hmt.policies.ranked import Ranked


class Future:
    """Requests to come, each the hashes of its contents, and a cursor that says which is served now."""

    def __init__(self, requests: Sequence[Sequence[bytes]]) -> None:
        self._requests = requests
        self._uses: dict[bytes, list[int]] = {}
        for number, request in enumerate(requests):
            for content in dict.fromkeys(request):
                self._uses.setdefault(content, []).append(number)
        self._now = -1
        self._followers: list[OPT] = []

    def advance(self) -> None:
        """The next request is served from now on; the first call starts the first."""
        served = self._requests[self._now] if self._now >= 0 else ()
        self._now += 1
        for policy in self._followers:
            policy.forget(served)

    def next_use(self, content: bytes) -> int:
        """Number of the first request after the current one that has this content; the number of requests
        when none has."""
        uses = self._uses.get(content, [])
        index = bisect_right(uses, self._now)
        return uses[index] if index < len(uses) else len(self._requests)

    def follow(self, policy: OPT) -> None:
        self._followers.append(policy)


class OPT(Ranked):
    """Of the evictable blocks the one whose next use lies farthest (Belady, "A study of replacement
    algorithms for a virtual-storage computer", IBM Systems Journal 1966); the longest unused of those that
    are never used again.

    A policy like the others, but for the `future`, which must advance with every request and be advanced
    by the caller alone.
    """

    __slots__ = ("_block_of", "_content", "_future")

    def __init__(self, blocks: int, clock: Clock, future: Future) -> None:
        super().__init__(blocks, clock)
        self._future = future
        self._content: list[bytes] = [b""] * blocks
        self._block_of: dict[bytes, int] = {}
        future.follow(self)

    def insert(self, block: int, content: bytes, heat: Heat | None = None) -> None:
        self._content[block] = content
        self._block_of[content] = block
        self.touch(block)
        if heat is not None:
            self._last[block] = heat.last

    def touch(self, block: int) -> None:
        self._last[block] = self._clock()
        self._rank(block)

    def drop(self, block: int, *, evicted: bool) -> None:
        super().drop(block, evicted=evicted)
        self._block_of.pop(self._content[block], None)
        self._content[block] = b""

    def heat(self, block: int) -> Heat:
        return Heat(last=self._last[block])

    def forget(self, served: Sequence[bytes]) -> None:
        """The request with these contents is over: those that it did not touch wait for a later one."""
        for content in served:
            block = self._block_of.get(content)
            if block is not None:
                self._rank(block)

    def _rank(self, block: int) -> None:
        self._ranking.move(block, -self._future.next_use(self._content[block]))
