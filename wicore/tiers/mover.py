"""Carries moves out: copies through the engine, reads and writes on threads of their own.

Threads
    copies  waits for the engine's tickets, in order
    reads   brings blocks from the file
    writes  takes blocks to the file
A move is handed over by the engine thread and its outcome fetched by it; `wake` tells that there is one.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import Engine, Pool, Ticket
from wicore.errors import EngineError
from wicore.hmt.moves import Fault, Move, Outcome
from wicore.tiers.block_file import BlockFile

log = logging.getLogger("wicore.tiers")

Host = Mapping[Pool, NDArray[np.uint8]]


class _Job(NamedTuple):
    move: Move
    run: Callable[[], Mapping[int, Fault]]
    given: float
    """When, on the monotonic clock."""


class TierMover:
    """`Mover` over an engine, its host memory and the files below. `wake` is called from other threads."""

    def __init__(
        self, engine: Engine, host: Host, files: Mapping[Pool, BlockFile], wake: Callable[[], None]
    ) -> None:
        self._engine, self._host, self._files, self._wake = engine, host, files, wake
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._complained = self._abandoned = False
        self._queues: dict[str, queue.SimpleQueue[_Job | None]] = {
            name: queue.SimpleQueue() for name in (("copies", "reads", "writes") if files else ("copies",))
        }
        self._threads = [
            threading.Thread(target=self._serve, args=(name,), name=f"tier-{name}", daemon=True)
            # Two read at a time: one verifies what it has read while the other waits for the disk.
            for name in (*self._queues, *(("reads",) if files else ()))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def by_layer(self) -> bool:
        return self._engine.info.copies_by_layer

    def start(self, move: Move) -> Ticket | None:
        route = (move.source, move.target)
        if route == ("device", "host"):
            rows = self._rows(move.pool, move.targets)
            ticket = self._engine.copy_out(move.pool, move.sources, rows)
            self._give("copies", move, partial(_await, ticket, move))
        elif route == ("host", "device"):
            rows = self._rows(move.pool, move.sources)
            ticket = self._engine.copy_in(move.pool, rows, move.targets)
            self._give("copies", move, partial(_await, ticket, move))
            return ticket if self.by_layer else None
        elif route == ("host", "nvme"):
            self._give("writes", move, partial(self._write, move))
        elif route == ("nvme", "host"):
            self._give("reads", move, partial(self._read, move))
        else:
            raise ValueError(f"no way from {move.source} to {move.target}")
        return None

    def _give(self, name: str, move: Move, run: Callable[[], Mapping[int, Fault]]) -> None:
        self._queues[name].put(_Job(move, run, time.monotonic()))

    def finished(self) -> Sequence[Outcome]:
        outcomes = []
        while True:
            try:
                outcomes.append(self._outcomes.get_nowait())
            except queue.Empty:
                return outcomes

    def close(self, seconds: float) -> bool:
        """Finish what has been started, for at most so long, and end the threads. False when one is still
        busy, as with a disk that hangs: then host memory and files are still in use."""
        for thread in self._threads:
            self._queues[thread.name.removeprefix("tier-")].put(None)
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def abandon(self, seconds: float) -> bool:
        """As `close`, but nothing more gets into the files: what waits is dropped, and what is being written
        is not to be found."""
        self._abandoned = True
        return self.close(seconds)

    def _serve(self, name: str) -> None:
        jobs, ended = self._queues[name], 0.0
        while (job := jobs.get()) is not None:
            if self._abandoned:
                continue
            faults = job.run()
            # A copy runs from when it was given, or from when the one before it was done: waiting for its
            # ticket may have begun later.
            started, ended = max(job.given, ended), time.monotonic()
            if faults and not self._complained:
                # Once: a failing disk fails often, and the counters tell the rest.
                log.warning(
                    "%d of %d KV blocks did not get from %s to %s (%s); they count as misses",
                    len(faults),
                    len(job.move.contents),
                    job.move.source,
                    job.move.target,
                    ", ".join(sorted({fault.value for fault in faults.values()})),
                )
                self._complained = True
            self._outcomes.put(Outcome(job.move, ended - started, faults))
            self._wake()

    def _rows(self, pool: Pool, slots: Sequence[int]) -> list[NDArray[np.uint8]]:
        memory = self._host[pool]
        return [memory[slot] for slot in slots]

    def _write(self, move: Move) -> Mapping[int, Fault]:
        rows, file = self._rows(move.pool, move.sources), self._files[move.pool]
        faults = file.write(move.targets, move.contents, move.parents, rows)
        if self._abandoned:
            file.discard(move.targets)
        return faults

    def _read(self, move: Move) -> Mapping[int, Fault]:
        rows = self._rows(move.pool, move.targets)
        faults = self._files[move.pool].read(move.sources, move.contents, rows)
        if faults:
            # What failed once must not be found again after a restart.
            self._files[move.pool].discard([move.sources[index] for index in faults])
        return faults


def _await(ticket: Ticket, move: Move) -> Mapping[int, Fault]:
    try:
        ticket.wait()
    except EngineError as err:
        log.warning("a copy between %s and %s failed: %s", move.source, move.target, err.message)
        return dict.fromkeys(range(len(move.contents)), Fault.IO)
    return {}
