"""ARC: adaptive replacement cache."""

from __future__ import annotations

from array import array
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from wicore.hmt.policies.base import Clock, Heat
from wicore.hmt.policies.ranking import Ranking


class ARC:
    """Adaptive replacement cache (Megiddo and Modha, "ARC: a self-tuning, low overhead replacement
    cache", FAST 2003).

    The paper's lists: T1 holds the blocks accessed once of late, T2 those accessed more often; B1 and B2
    hold the hashes of as many that left T1 and T2. A content that comes back from B1 shows that T1 is too
    small, one from B2 that T2 is: T1's target size follows.

    Two things differ from the paper. Blocks in use count in T1 and T2 but cannot be victims; when one list
    has no evictable block, the other gives. And a victim is chosen before it is known what replaces it, so
    that the paper's tie at the target (on a hit in B2) is always decided for T2.
    """

    __slots__ = (
        "_accesses",
        "_blocks",
        "_clock",
        "_content",
        "_ghosts",
        "_last",
        "_often",
        "_rankings",
        "_sizes",
        "_target",
    )

    def __init__(self, blocks: int, clock: Clock) -> None:
        self._blocks = blocks
        self._clock = clock
        self._accesses = 0
        self._target = 0.0
        """Blocks that T1 should have: p in the paper."""
        self._last = array("d", [0.0]) * blocks
        self._content: list[bytes] = [b""] * blocks
        self._often = bytearray(blocks)
        """1 for a block in T2."""
        self._sizes = [0, 0]
        self._rankings = (Ranking(blocks), Ranking(blocks))
        # Ordered, because the oldest of a plain dict is found behind the holes that those before it left.
        self._ghosts = (OrderedDict[bytes, None](), OrderedDict[bytes, None]())
        """B1 and B2, oldest first."""

    def insert(self, block: int, content: bytes, heat: Heat | None = None) -> None:
        again = self._remember(content) or (heat is not None and heat.frequency > 1)
        self._content[block] = content
        self._often[block] = again
        self._sizes[again] += 1
        self._access(block)
        if heat is not None:
            self._last[block] = heat.last
        self._trim()

    def touch(self, block: int) -> None:
        if not self._often[block]:
            evictable = self._rankings[0].members[block]
            self._rankings[0].remove(block)
            self._often[block] = 1
            self._sizes[0] -= 1
            self._sizes[1] += 1
            if evictable:
                self._rankings[1].add(block)
        self._access(block)

    def record(self, blocks: NDArray[np.int32], mass: NDArray[np.float32], steps: int = 1) -> None:
        """Attention does not matter."""

    def add(self, block: int) -> None:
        self._rankings[self._often[block]].add(block)

    def remove(self, block: int) -> None:
        self._rankings[self._often[block]].remove(block)

    def victim(self) -> int:
        once, often = self._rankings
        if len(once) and (self._sizes[0] > self._target or not len(often)):
            return once.lowest()
        return often.lowest()

    def drop(self, block: int, *, evicted: bool) -> None:
        self.remove(block)
        often = self._often[block]
        self._sizes[often] -= 1
        if evicted:
            self._ghosts[often][self._content[block]] = None
            self._trim()
        self._content[block] = b""
        self._often[block] = 0

    def heat(self, block: int) -> Heat:
        """Frequency 1 says once, 2 more than once; more is not known."""
        return Heat(frequency=1.0 + self._often[block], last=self._last[block])

    def _access(self, block: int) -> None:
        self._accesses += 1
        self._last[block] = self._clock()
        self._rankings[self._often[block]].move(block, self._accesses)

    def _remember(self, content: bytes) -> bool:
        """Whether the content left of late; if so, adapt the target."""
        once, often = self._ghosts
        if content in once:
            self._target = min(self._blocks, self._target + max(1.0, len(often) / len(once)))
            del once[content]
            return True
        if content in often:
            self._target = max(0.0, self._target - max(1.0, len(once) / len(often)))
            del often[content]
            return True
        return False

    def _trim(self) -> None:
        """Keep |T1| + |B1| to the number of blocks and |T1| + |T2| + |B1| + |B2| to twice that."""
        once, often = self._ghosts
        while once and self._sizes[0] + len(once) > self._blocks:
            once.popitem(last=False)
        while often and sum(self._sizes) + len(once) + len(often) > 2 * self._blocks:
            often.popitem(last=False)
