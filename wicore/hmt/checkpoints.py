"""Where a prefix can be resumed: the windows that are worth keeping."""

from __future__ import annotations

from wicore.hmt.chain import TokenChain
from wicore.hmt.pool import BlockPool
from wicore.hmt.prefixes import Prefixes
from wicore.hmt.saves import Saves
from wicore.hmt.sequence import OpenSequence


class Checkpoints:
    """Keeps, of the device's window pool, what a prefix of some length needs.

    A checkpoint is kept at the end of a prompt, where a sequence ends or is preempted, every so many blocks,
    and where another sequence was found to branch off (the idea of Marconi, MLSys'25, for hybrid models):
    all windows of a long prompt would take several times the room of its global blocks.
    """

    def __init__(
        self, windows: BlockPool, prefixes: Prefixes, saves: Saves, every: int, *, save: bool
    ) -> None:
        """`every` so many blocks, 0: not. `save`: whether there is a tier below."""
        self._windows, self._prefixes, self._saves = windows, prefixes, saves
        self._every, self._save = every, save

    def pass_by(self, sequence: OpenSequence, blocks: int) -> None:
        """The sequence has computed so many leading blocks, and still holds their window."""
        if blocks in sequence.marks or (self._every and blocks % self._every == 0):
            self.keep(sequence.chain, blocks)

    def keep(self, chain: TokenChain, blocks: int) -> None:
        """Keep the window that a prefix of so many blocks needs, as far as it is there."""
        for hash in chain.hashes[self._prefixes.first_window_block_after(blocks) : blocks]:
            block = self._windows.lookup(hash)
            if block is not None and self._windows.keep(block, saved=not self._save):
                self._saves.add("device", "window", hash)
