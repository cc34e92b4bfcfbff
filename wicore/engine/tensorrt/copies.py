"""KV blocks between the device pools and host memory, on streams of their own, while steps run.

Rows of the engine's host memory are pinned, or will be, in the background: then the device copies them by
itself, neighbours in one go. Any other row goes through a pinned buffer, by a thread. A copy waits for
earlier ones of the same blocks, and else for nothing: nobody writes blocks that are read, or reads blocks
that are written (`wicore.engine.base`), but for steps that follow a copy in, layer by layer: a large one is
made in the order of the layers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import KVLayout, Pool
from wicore.engine.copies import HostMemory
from wicore.engine.tensorrt.device import Device, Event, HostBuffer, Stream
from wicore.errors import EngineError

Bytes = NDArray[np.uint8]

_STAGING_BYTES = 16 * 2**20
_LAYERED_BYTES = 8 * 2**20
"""A smaller copy in is made at once: it is over before a step has begun."""


class Health:
    """Whether the device still works. After an error nothing on it may be trusted."""

    def __init__(self) -> None:
        self.error: str | None = None

    def failed(self, error: Exception) -> None:
        """Note the first error: those after it are its consequences."""
        if self.error is None:
            self.error = str(error)


@dataclass(frozen=True)
class PoolBlocks:
    """Where a pool's blocks are: `count` of them from device `address` on."""

    address: int
    count: int


class KVCopy:
    """One call's copies; its `Ticket`."""

    def __init__(self, health: Health, event: Event, pool: Pool, blocks: frozenset[int]) -> None:
        self.pool, self.blocks = pool, blocks
        self.event = event
        self.layers: list[Event] = []
        """When each layer of the pool is there; empty: not before all are."""
        self._health = health
        self._given = threading.Event()
        """Set when all of it has been given to the device, or has failed."""
        self._error: Exception | None = None
        self._complete = False

    @property
    def given(self) -> bool:
        return self._given.is_set()

    def give(self, error: Exception | None = None) -> None:
        self._error = error
        self._given.set()

    def lead(self, stream: Stream, layer: int | None = None) -> None:
        """What is enqueued on `stream` from now on comes after the copy, or its part of a layer of its pool.

        Waits until the copy has been given to the device.
        """
        self._given.wait()
        stream.wait(self.layers[layer] if layer is not None and self.layers else self.event)

    def done(self) -> bool:
        if self._complete or self._health.error is not None:
            return True
        if not self.given:
            return False
        if self._error is None:
            try:
                self._complete = self.event.done()
            except EngineError as err:
                self._health.failed(err)
        return self._complete or self._error is not None or self._health.error is not None

    def wait(self) -> None:
        if self._complete:
            return
        if self._health.error is None:
            self._given.wait()
        error = self._error
        if error is None and self._health.error is None:
            try:
                self.event.wait()
            except EngineError as err:
                self._health.failed(err)
        if error is not None:
            raise EngineError(f"a copy of KV blocks failed: {error}") from error
        if self._health.error is not None:
            # The copy may have been made, but of a pool that nobody can vouch for.
            raise EngineError(f"a copy of KV blocks failed: the device failed: {self._health.error}")
        self._complete = True


@dataclass
class _Spans:
    """A call's blocks and rows: `direct` are (device address, host address, bytes), `staged` the rest."""

    direct: list[tuple[int, int, int]] = field(default_factory=list)
    staged: list[tuple[int, Bytes]] = field(default_factory=list)


class KVCopies:
    """`host_memory`, `copy_in` and `copy_out` of the engine. `pools` says where the blocks are."""

    def __init__(
        self, device: Device, layout: KVLayout, pools: Mapping[Pool, PoolBlocks], health: Health
    ) -> None:
        self._device, self._layout, self._pools, self._health = device, layout, pools, health
        self._buffers: dict[Pool, HostBuffer] = {}
        self._asked: Pool = "global"
        self._host = HostMemory(layout, self._pinned)
        self._streams = {True: device.stream(), False: device.stream()}
        """By whether blocks come in: both directions of the bus are used at once."""
        self._flying: dict[Pool, list[KVCopy]] = {"global": [], "window": []}
        self._staging: HostBuffer | None = None
        self._thread = ThreadPoolExecutor(1, "kv-staging")
        self._last_staged: KVCopy | None = None

    def host_memory(self, pool: Pool, slots: int) -> Bytes:
        self._asked = pool
        return self._host.allocate(pool, slots)

    def slots(self, pool: Pool) -> int | None:
        """How many slots of host memory the pool has; None before it was asked for."""
        return self._host.slots(pool)

    def host_address(self, pool: Pool) -> int:
        """Where kernels find the pool's host memory; 0 when it has none."""
        return self._buffers[pool].address if pool in self._buffers else 0

    def start(self, pool: Pool, blocks: Sequence[int], rows: Sequence[Bytes], *, inwards: bool) -> KVCopy:
        """Begin copying blocks to (`inwards`: from) as many rows. Raises ValueError for other numbers."""
        if len(blocks) != len(rows):
            raise ValueError(f"{len(blocks)} blocks and {len(rows)} rows: expected as many of both")
        copy = KVCopy(self._health, self._device.event(), pool, frozenset(blocks))
        flying = [other for other in self._flying[pool] if not other.done()]
        earlier = [other for other in flying if not copy.blocks.isdisjoint(other.blocks)]
        self._flying[pool] = [*flying, copy]
        try:
            spans = self._spans(pool, blocks, rows)
        except ValueError as err:
            copy.give(err)
            return copy
        # Behind a copy that the thread has not yet given to the device, ours could not wait for its event.
        if spans.staged or (self._last_staged is not None and not self._last_staged.given):
            self._last_staged = copy
            self._thread.submit(self._run, copy, spans, earlier, inwards)
        else:
            self._run(copy, spans, earlier, inwards)
        return copy

    def wait_for_slots(self, pool: Pool, count: int) -> None:
        """Block until the first `count` slots of host memory are pinned. Raises EngineError where that
        failed."""
        self._buffers[pool].wait(count * self._layout.block_bytes(pool))

    def close(self) -> None:
        """Finish what has been started, and end the thread. Idempotent."""
        self._thread.shutdown()
        if self._health.error is None:
            for stream in self._streams.values():
                stream.synchronize()

    def _pinned(self, size: int) -> Bytes:
        pool = self._asked
        buffer = self._buffers[pool] = self._device.allocate_host(size, self._layout.block_bytes(pool))
        return buffer.array

    def _spans(self, pool: Pool, blocks: Sequence[int], rows: Sequence[Bytes]) -> _Spans:
        size, memory = self._layout.block_bytes(pool), self._pools[pool]
        begin, end, piece = 0, 0, 1
        if pool in self._buffers:
            buffer = self._buffers[pool]
            begin, piece = buffer.array.ctypes.data, buffer.piece
            end = begin + buffer.pinned
        spans = _Spans()
        for block, row in sorted(zip(blocks, rows, strict=True), key=lambda pair: pair[0]):
            if not 0 <= block < memory.count:
                raise ValueError(f"block {block} is not in 0..{memory.count - 1}")
            if row.dtype != np.uint8 or row.shape != (size,):
                raise ValueError(f"a row is {row.dtype} {row.shape}, expected uint8 ({size},)")
            target, source = memory.address + block * size, row.__array_interface__["data"][0]
            if not (begin <= source < end and row.flags.c_contiguous):
                spans.staged.append((target, row))
                continue
            if spans.direct:
                device, host, length = spans.direct[-1]
                adjoin = (device + length, host + length) == (target, source)
                if adjoin and (source - begin) % piece:
                    spans.direct[-1] = device, host, length + size
                    continue
            spans.direct.append((target, source, size))
        return spans

    def _run(self, copy: KVCopy, spans: _Spans, earlier: Sequence[KVCopy], inwards: bool) -> None:
        stream = self._streams[inwards]
        try:
            if self._health.error is not None:
                raise EngineError(f"the device failed: {self._health.error}")
            for other in earlier:
                stream.wait(other.event)
            if inwards and not spans.staged and sum(size for *_, size in spans.direct) >= _LAYERED_BYTES:
                self._copy_by_layer(copy, spans.direct, stream)
            else:
                for device, host, size in spans.direct:
                    target, source = (device, host) if inwards else (host, device)
                    self._device.copy(target, source, size, stream)
            for part in _parts(spans.staged, _STAGING_BYTES):
                self._stage(part, inwards)
            copy.event.record(stream)
        except Exception as err:  # the thread has nobody to raise to: whoever waits is told
            if inwards and spans.direct:
                self._health.failed(err)  # steps that follow this copy have read what is not there
            copy.give(err)
        else:
            copy.give()

    def _copy_by_layer(self, copy: KVCopy, spans: Sequence[tuple[int, int, int]], stream: Stream) -> None:
        """Make a copy in, all blocks of a layer before the next layer."""
        layout = self._layout
        layers = layout.global_layers if copy.pool == "global" else layout.window_layers
        block = layout.block_bytes(copy.pool)
        part = block // layers
        starts = [np.arange(0, size, block, dtype=np.uint64) for *_, size in spans]
        targets, sources = (
            np.concatenate([np.uint64(span[end]) + start for span, start in zip(spans, starts, strict=True)])
            for end in (0, 1)
        )
        for layer in range(layers):
            offset = np.uint64(layer * part)
            self._device.copy_many(targets + offset, sources + offset, part, stream)
            event = self._device.event()
            event.record(stream)
            copy.layers.append(event)

    def _stage(self, part: Sequence[tuple[int, Bytes]], inwards: bool) -> None:
        """Copy rows that are not pinned, and wait until that is done: the buffer is used again."""
        size, stream = len(part[0][1]), self._streams[inwards]
        if self._staging is None or len(self._staging.array) < size:
            self._staging = self._device.allocate_host(max(_STAGING_BYTES, size))
        staging = self._staging.array
        base = staging.ctypes.data
        for index, (device, row) in enumerate(part):
            host = base + index * size
            if inwards:
                staging[index * size :][:size] = row
            target, source = (device, host) if inwards else (host, device)
            self._device.copy(target, source, size, stream)
        stream.synchronize()
        if not inwards:
            for index, (_, row) in enumerate(part):
                row[:] = staging[index * size :][:size]


def _parts(staged: Sequence[tuple[int, Bytes]], limit: int) -> Iterator[Sequence[tuple[int, Bytes]]]:
    """Parts of at least one row and at most `limit` bytes."""
    if staged:
        count = max(1, limit // len(staged[0][1]))
        for at in range(0, len(staged), count):
            yield staged[at : at + count]
