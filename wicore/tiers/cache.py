"""From the settings and an engine to a cache with all its tiers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from wicore.config import HmtSettings, Settings
from wicore.engine.base import Engine, Pool, StepPlan
from wicore.engine.sizing import tier_sizes
from wicore.hmt import CacheManager
from wicore.hmt.moves import Tier
from wicore.hmt.policy import A2CR, POLICIES, A2CRParams
from wicore.hmt.pool import PolicyFactory
from wicore.hmt.tiers import POOLS, Stored, check_sizes
from wicore.text.template import TEMPLATE
from wicore.tiers.block_file import BlockFile
from wicore.tiers.folder import Claim, claim
from wicore.tiers.mover import TierMover

log = logging.getLogger("wicore.tiers")

_CLOSE_S = 10.0
"""How long copies under way may take when the cache closes."""


def policy_of(hmt: HmtSettings) -> PolicyFactory:
    """The eviction policy that `hmt.policy` names, with its settings."""
    if hmt.policy != "a2cr":
        return POLICIES[hmt.policy]
    params = A2CRParams(
        attention_weight=hmt.attention_weight,
        frequency_weight=hmt.frequency_weight,
        recency_time=hmt.recency_tokens,
        frequency_time=hmt.frequency_tokens,
    )
    return partial(A2CR, params=params)


class TieredCache:
    """A `CacheManager` over an engine, with host memory and files as the settings say, and what moves blocks
    between them. The manager is the engine thread's; `wake` is called from others when blocks have moved."""

    def __init__(self, settings: Settings, engine: Engine, wake: Callable[[], None]) -> None:
        """Claims a folder and opens the files. Raises ConfigError, naming the setting, when that fails."""
        hmt, info = settings.hmt, engine.info
        blocks: dict[Pool, int] = {"global": info.global_blocks, "window": info.window_blocks}
        sizes = tier_sizes(settings, info.layout, blocks)
        check_sizes(info.layout, sizes)  # before any file is made
        # Whatever changes what equal tokens mean: KV of another model or another template is never found.
        fingerprint = f"{info.fingerprint} {TEMPLATE}"
        self._claim: Claim | None = None
        self._files: dict[Pool, BlockFile] = {}
        if sizes.nvme is not None and hmt.nvme_path is not None:
            self._claim = claim(Path(hmt.nvme_path).expanduser())
            for pool in POOLS:
                self._files[pool] = BlockFile(
                    self._claim.path,
                    pool,
                    sizes.nvme[pool],
                    info.layout.block_bytes(pool),
                    fingerprint.encode(),
                )
        self._mover = None
        if sizes.host is not None:
            host = {pool: engine.host_memory(pool, sizes.host[pool]) for pool in POOLS}
            self._mover = TierMover(engine, host, self._files, wake)
        stored: Stored = {
            pool: [(entry.slot, entry.content, entry.parent) for entry in file.entries()]
            for pool, file in self._files.items()
        }
        self.manager = CacheManager(
            info.layout,
            sizes,
            fingerprint,
            mover=self._mover,
            stored=stored or None,
            prefix_cache=hmt.prefix_cache,
            policy=policy_of(hmt),
            checkpoint_tokens=hmt.checkpoint_tokens,
        )
        self._tell(stored)

    def report(self) -> dict[str, object]:
        """What there is to tell of the tiers, as JSON. For any thread."""
        direct = all(file.direct for file in self._files.values()) if self._files else None
        return {**self.manager.report(), "direct_io": direct}

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step took so long: what raising blocks is weighed against, when the step was mostly prefill, and
        waited for no blocks."""
        if any(sequence.arriving for sequence in plan.sequences):
            return
        prompt = sum(len(sequence.tokens) for sequence in plan.sequences if len(sequence.tokens) > 1)
        if prompt >= 8 * len(plan.sequences):
            self.manager.observe_prefill(prompt, seconds)

    def tend(self) -> None:
        """Let blocks move while no step is planned."""
        self.manager.take_in()
        self.manager.start_moves()

    def flush(self, seconds: float, wait: Callable[[float], None]) -> None:
        """Save what waits to be saved, for at most so long; `wait(s)` returns when something has moved, or
        after s seconds. For the engine thread, when it steps no more."""
        end = time.monotonic() + seconds
        while self.manager.saving and time.monotonic() < end:
            self.tend()
            if self.manager.busy:
                wait(max(0.0, end - time.monotonic()))

    def close(self) -> None:
        """Let what is under way finish, and close the files. Call it before the engine's `close`."""
        self._close_files(self._mover is None or self._mover.close(_CLOSE_S))

    def abandon(self) -> None:
        """As `close`, after the engine failed: its pool is undefined, so nothing more is saved, nor what is
        on its way to the files."""
        self._close_files(self._mover is None or self._mover.abandon(_CLOSE_S))

    def _close_files(self, unused: bool) -> None:
        if not unused:
            log.warning("the disk of hmt.nvme_path hangs; leaving its files to the end of the process")
            return
        for file in self._files.values():
            file.close()
        if self._claim is not None:
            self._claim.close()

    def _tell(self, stored: Stored) -> None:
        tiers: list[Tier] = list(self.manager.traffic.pools)
        if self._claim is not None:
            blocks = sum(map(len, stored.values()))
            way = "direct I/O" if all(file.direct for file in self._files.values()) else "buffered I/O"
            log.info("KV tiers %s; %s holds %d blocks, %s", ", ".join(tiers), self._claim.path, blocks, way)
        else:
            log.info("KV tiers %s", ", ".join(tiers))
