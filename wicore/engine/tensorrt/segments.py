"""Running segment plans: one execution context a plan, any layer's weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from wicore.engine.tensorrt.networks import KINDS, HalfType
from wicore.engine.tensorrt.plan_kinds import AnyKind, AnyShape, bindings
from wicore.engine.tensorrt.plans import PlanCache, PlanKey, plan_keys
from wicore.engine.tensorrt.trt_api import Backend, LoadedPlan
from wicore.errors import EngineError

if TYPE_CHECKING:
    from wicore.engine.tensorrt.device import Buffer, Device, Stream

_LOG = logging.getLogger(__name__)


class Segments:
    """The plans of one model on one device, ready to run.

    All runs share one piece of device memory for what is between their layers, so they must follow one
    another: on one stream, or in graphs launched on one stream.
    """

    def __init__(
        self,
        device: Device,
        plans: PlanCache,
        shape: AnyShape,
        buckets: Sequence[int],
        *,
        backend: Backend,
        half: HalfType = "float16",
        kinds: Sequence[AnyKind] = KINDS,
        scratch: str = "the TensorRT segments' scratch memory",
    ) -> None:
        """Load every plan and allocate their memory, which the device reports as `scratch`.

        Raises EngineError when a plan is missing or was built for something else, saying how to build it,
        or when there is too little device memory.
        """
        major, minor = device.capability
        keys = plan_keys(backend, f"{major}.{minor}", shape, buckets, half=half, kinds=kinds)
        self._dynamic = {
            kind: tuple(b for b in bindings(kind, shape) if b.dynamic and not b.output) for kind in kinds
        }
        runtime = backend.module.Runtime(backend.logger)
        self._runtime = runtime  # must outlive the plans
        self._loaded: dict[AnyKind, list[tuple[int, LoadedPlan]]] = {kind: [] for kind in kinds}
        for key in keys:
            plan = plans.load(key)
            if plan is None:
                raise EngineError(_absent(plans, key))
            self._loaded[key.kind].append((key.rows, LoadedPlan(backend, runtime, plan, key.label)))
        self.memory_bytes = max(loaded.memory_bytes for _, loaded in self._all())
        """Device memory of all runs together, in bytes."""
        self._memory: Buffer | None = None
        if self.memory_bytes:
            self._memory = device.allocate(self.memory_bytes, scratch)
            for _, loaded in self._all():
                loaded.use_memory(self._memory.address, self._memory.size)
        _LOG.info(
            "%d plans of %s %s loaded, %.0f MiB of scratch memory",
            len(keys), backend.name, backend.version, self.memory_bytes / 2**20,
        )  # fmt: skip

    def plan(self, kind: AnyKind, rows: int) -> LoadedPlan:
        """The plan that a run of `rows` rows uses, to look at. Raises EngineError when there is none."""
        return self._find(kind, rows)[1]

    def max_rows(self, kind: AnyKind) -> int:
        """Most rows of one run."""
        return self._loaded[kind][-1][0]

    def bucket(self, kind: AnyKind, rows: int) -> int:
        """The bucket that a run of `rows` rows uses. Raises EngineError when there are too many."""
        return self._find(kind, rows)[0]

    def run(self, stream: Stream, kind: AnyKind, rows: int, addresses: Mapping[str, int]) -> None:
        """Enqueue one segment: `plan_kinds.bindings(kind, shape)` says what to bind to which device address.

        Addresses are 256-byte aligned. Nothing waits, nothing is allocated: the run may be captured in a
        graph, which keeps the addresses; run the same kind with as many rows right before capturing, since
        TensorRT prepares a new number of rows in the first run of them.
        Raises EngineError with TensorRT's reason.
        """
        self._find(kind, rows)[1].run(stream.handle, rows, self._dynamic[kind], addresses)

    def close(self) -> None:
        """Release plans and memory; nothing may be running. Idempotent."""
        for loaded in self._loaded.values():
            loaded.clear()
        if self._memory is not None:
            self._memory.free()
            self._memory = None

    def _all(self) -> list[tuple[int, LoadedPlan]]:
        return [pair for pairs in self._loaded.values() for pair in pairs]

    def _find(self, kind: AnyKind, rows: int) -> tuple[int, LoadedPlan]:
        for most, loaded in self._loaded.get(kind, ()):
            if 1 <= rows <= most:
                return most, loaded
        raise EngineError(f"no {kind} segment for {rows} rows is loaded")


def _absent(plans: PlanCache, key: PlanKey) -> str:
    """Why there is no plan, and the command that makes one."""
    others = {
        f"{other.backend} {other.version} on compute capability {other.capability}"
        for entry in plans.entries()
        if (other := entry.key) and (other.kind, other.shape) == (key.kind, key.shape)
    }
    others.discard(f"{key.backend} {key.version} on compute capability {key.capability}")
    built_for = f" (there are plans for {', '.join(sorted(others))})" if others else ""
    return (
        f"{plans.folder} has no plan of the {key.label}, for {key.backend} {key.version} on compute "
        f"capability {key.capability}{built_for}; run `wicore plan build`"
    )
