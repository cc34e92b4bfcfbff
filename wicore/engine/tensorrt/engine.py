"""The engine on an NVIDIA GPU.

Weights are half, sums and the residual stream float32, KV half or 8-bit. Steps run on one stream, KV copies
on two others. What crosses the bus in a step is what it is told, the tokens drawn, and the attention mass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import (
    EngineInfo,
    KVLayout,
    PendingStep,
    Pool,
    SequenceInput,
    StepPlan,
    StepResult,
    Ticket,
)
from wicore.engine.plans import check_plan
from wicore.engine.sizing import layout_of
from wicore.engine.tensorrt.autotune import Autotuner, Choices
from wicore.engine.tensorrt.bodies import Body, KernelBody, SegmentBody
from wicore.engine.tensorrt.ceilings import ceilings
from wicore.engine.tensorrt.copies import Health, KVCopies, PoolBlocks
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.limits import Limits
from wicore.engine.tensorrt.passes import SLICE
from wicore.engine.tensorrt.profile import KernelTime, kv_bytes, summary
from wicore.engine.tensorrt.prompt_attention import PoolMemory
from wicore.engine.tensorrt.runner import Runner, Running
from wicore.engine.tensorrt.segments import Segments
from wicore.engine.tensorrt.vision import TensorrtVision
from wicore.engine.tensorrt.weights import DeviceWeights
from wicore.engine.tensorrt.workspace import Workspace
from wicore.errors import EngineError
from wicore.gemma3.config import Gemma3Config

T = TypeVar("T")

POOLS: tuple[Pool, Pool] = ("global", "window")
_REVISION = "tensorrt-1"
"""Part of the fingerprint: change it when KV computed by older code can no longer be used."""


class TensorrtEngine:
    """`Engine` on a CUDA device, which it closes when it is closed."""

    def __init__(
        self,
        weights: DeviceWeights,
        config: Gemma3Config,
        device: Device,
        *,
        block_tokens: int = 32,
        global_blocks: int = 0,
        window_blocks: int = 0,
        fit_blocks: Callable[[], Mapping[Pool, int]] | None = None,
        max_context: int | None = None,
        kv: Literal["float16", "int8"] = "float16",
        max_batch: int = 16,
        token_budget: int = 512,
        invariant: bool = False,
        segments: Segments | None = None,
        tune: Callable[[Callable[[], Choices]], Choices] | None = None,
        graphs: bool = True,
        workspace: Workspace | None = None,
        vision: TensorrtVision | None = None,
        content: str = "",
    ) -> None:
        """Compile the kernels and allocate what steps work with, then the KV pools.

        weights: on the device already, made for this `kv`.
        fit_blocks: instead of the two numbers of blocks: asked for them when all else is allocated.
        max_batch, token_budget: sequences and new tokens of a step, as the scheduler makes them. A prompt
            chunk may be longer; more sequences raise ValueError.
        invariant: every row goes through the kernels made for single rows, so that text does not depend on
            the batch and the chunks to the bit.
        segments: TensorRT's plans; None: our own kernels alone.
        tune: given what measures the fastest kernels, returns what to use: measured now, or earlier.
            None: by rule.
        graphs: replay decode steps as CUDA graphs.
        workspace: made before with the same shapes and limits; None: it is made here.
        vision: the tower on the same device, closed with the engine.
        content: what the weights are, as a digest (`Checkpoint.content_digest`).

        Raises EngineError for shapes that the kernels cannot do, and when memory does not suffice.
        """
        self._device, self._config = device, config
        self.vision = vision
        """None: it takes text alone, or rows that come from elsewhere."""
        layout = layout_of(config, block_tokens, kv)
        context = min(max_context or config.max_context, config.max_context)
        if workspace is None:
            limits = Limits.of(
                layout,
                max_batch=max_batch,
                token_budget=token_budget,
                max_context=context,
                invariant=invariant,
                image_tokens=config.vision.tokens if config.vision else 0,
            )
            workspace = Workspace(device, config, layout, limits, invariant=invariant)
        self._most_rows = workspace.limits.rows
        self._attention, self._matmuls = workspace.attention, workspace.matmuls
        matmuls = self._matmuls
        kernels = KernelBody(config, weights, workspace.buffers, workspace.norms, matmuls, workspace.images)
        plans = None
        if segments is not None and not invariant:
            plans = SegmentBody(config, weights, workspace.buffers, segments, kernels)
        choices = Choices()
        if tune is not None:
            tuner = Autotuner(device, config, weights, workspace)
            choices = tune(lambda: tuner.run(kernels, plans))
            choices.use(matmuls)

        def body(rows: int) -> Body:
            fits = plans is not None and rows <= plans.max_rows
            # Unmeasured, TensorRT is for where the only other way is to read the weights for every 64 rows.
            better = choices.segments_for(rows) if choices.segments else rows > SLICE and not matmuls.hopper
            return plans if plans is not None and fits and better else kernels

        last = KernelBody(
            config, weights, workspace.buffers.of_last_rows(), workspace.norms, matmuls, workspace.images
        )
        self._runner = Runner(
            device, config, layout, weights, workspace, body, last, max_context=context, graphs=graphs
        )
        blocks: Mapping[Pool, int] = {"global": global_blocks, "window": window_blocks}
        if fit_blocks is not None:
            blocks = fit_blocks()
        self._pools = self._allocate_pools(layout, blocks)
        self._health = Health()
        self._copies = KVCopies(device, layout, self._pools, self._health)
        for pool in POOLS:
            self._bind(pool, layout)
        described = f"{_REVISION} {invariant} {layout} {content}"
        self._info = EngineInfo(
            name="tensorrt",
            device=device.name,
            weights="float16",
            layout=layout,
            global_blocks=blocks["global"],
            window_blocks=blocks["window"],
            vocab_size=config.vocab_size,
            max_context=context,
            fingerprint=hashlib.sha256(described.encode()).hexdigest(),
            memory=dict(device.report()),
            copies_by_layer=True,
        )
        self._closed, self._unprepared = False, False

    def prepare(self) -> None:
        """Compile what prompts of any length need and capture all graphs, so that no step has to.

        Takes seconds, and the first time on a card a minute.
        """
        self._unprepared = False
        self._guarded(self._prepare)

    def prepare_when_used(self) -> None:
        """Do that once host memory is there, whose address graphs hold, or before the first step."""
        self._unprepared = True

    @property
    def info(self) -> EngineInfo:
        return self._info

    def start(self, plan: StepPlan) -> PendingStep:
        if self._unprepared:
            self.prepare()
        running = self._guarded(lambda: self._runner.start(plan.sequences, self._check))
        return _Pending(running, self._guarded)

    def step(self, plan: StepPlan) -> StepResult:
        return self.start(plan).result()

    def logits(self, plan: StepPlan) -> dict[int, NDArray[np.float32]]:
        """Logits after every new token of every sequence, [n, vocab]: for parity tests and scoring."""
        self._check(plan.sequences)
        return self._guarded(lambda: self._runner.logits(plan.sequences))

    def ceilings(self) -> dict[str, float]:
        """What the card can do at best; see `ceilings`. Measured now: it takes a moment and some memory."""
        return self._guarded(lambda: ceilings(self._device))

    def profile(self, plan: StepPlan, replays: int = 5) -> list[KernelTime]:
        """Where the time of a step of one pass goes: its kernels one after the other, as a graph.

        The step is run, `replays` times and once more: its KV is written, and nothing is returned of it. Only
        on a real card. Raises ValueError for a plan of several passes.
        """
        self._check(plan.sequences)
        device: Any = self._device
        stream = self._runner.stream
        work = self._runner.launches(plan.sequences)
        graph, launches = device.traced(stream, work)
        times = []
        for _ in range(replays + 1):
            graph.launch(stream)
            stream.synchronize()
            times.append([launch.ms for launch in launches])
        graph.close()
        single = all(len(s.tokens) == 1 for s in plan.sequences)
        seen = kv_bytes(plan.sequences, self._info.layout, self._config) if single else 0
        return summary(launches, times[1:], self._config, seen)

    def host_memory(self, pool: Pool, slots: int) -> NDArray[np.uint8]:
        rows = self._guarded(lambda: self._copies.host_memory(pool, slots))
        if pool == "global":  # the only one that anything is streamed from
            self._bind(pool, self._info.layout)
            if self._unprepared:
                self.prepare()
        return rows

    def copy_out(self, pool: Pool, blocks: Sequence[int], rows: Sequence[NDArray[np.uint8]]) -> Ticket:
        return self._copies.start(pool, blocks, rows, inwards=False)

    def copy_in(self, pool: Pool, rows: Sequence[NDArray[np.uint8]], blocks: Sequence[int]) -> Ticket:
        return self._copies.start(pool, blocks, rows, inwards=True)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self.vision is not None:
                self.vision.close()
            self._copies.close()
            self._runner.forget_graphs()
            self._device.close()

    def _check(self, sequences: Sequence[SequenceInput]) -> None:
        slots, width = self._copies.slots("global"), self._config.hidden_size
        check_plan(StepPlan(tuple(sequences)), self._info, slots, width)
        streamed = [s.global_table[: s.streamed].max() for s in sequences if s.streamed]
        if streamed:  # those alone: all may take longer than a step may
            self._copies.wait_for_slots("global", int(max(streamed)) + 1)

    def _prepare(self) -> None:
        self._matmuls.prepare(self._most_rows, self._config)
        self._runner.prepare()

    def _allocate_pools(self, layout: KVLayout, blocks: Mapping[Pool, int]) -> dict[Pool, PoolBlocks]:
        stream, pools = self._runner.stream, {}
        for pool in POOLS:
            size = blocks[pool] * layout.block_bytes(pool)
            memory = self._device.allocate(max(1, size), f"the {pool} KV pool")
            # What a masked position holds must be a number.
            self._device.fill(memory.address, 0, memory.size, stream)
            pools[pool] = PoolBlocks(memory.address, blocks[pool])
        stream.synchronize()
        return pools

    def _bind(self, pool: Pool, layout: KVLayout) -> None:
        """Tell the kernels where the pool's blocks are, and its host memory."""
        blocks, copies = self._pools[pool], self._copies
        memory = PoolMemory(
            pool,
            blocks.address,
            copies.host_address(pool),
            layout.block_bytes(pool),
            device_blocks=blocks.count,
            host_blocks=copies.slots(pool) or 0,
        )
        self._attention.bind(memory)
        self._runner.forget_graphs()

    def _guarded(self, work: Callable[[], T]) -> T:
        """Note when the device fails: whatever is on it counts no more then."""
        if self._health.error is not None:
            raise EngineError(f"the device failed before: {self._health.error}")
        try:
            return work()
        except EngineError as err:
            self._health.failed(err)
            raise


class _Pending:
    """A step under way."""

    def __init__(self, running: Running, guarded: Callable[[Callable[[], StepResult]], StepResult]) -> None:
        self._running, self._guarded = running, guarded

    def result(self) -> StepResult:
        return self._guarded(self._running.result)
