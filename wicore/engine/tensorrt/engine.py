"""The engine on an NVIDIA GPU.

Weights are half, sums and the residual stream float32, KV half or 8-bit. Steps run on one stream, KV copies on
two others. What crosses the bus in a step is what it is told, the tokens drawn, and the attention mass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import EngineInfo, PendingStep, Pool, StepPlan, StepResult, Ticket
from wicore.engine.plans import check_plan
from wicore.engine.sizing import layout_of
from wicore.engine.tensorrt.attention import Attention, PoolMemory
from wicore.engine.tensorrt.bodies import KernelBody
from wicore.engine.tensorrt.copies import Health, KVCopies, PoolBlocks
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.norms import Norms
from wicore.engine.tensorrt.runner import Limits, Parts, Runner, Running
from wicore.engine.tensorrt.sampler import Sampler
from wicore.engine.tensorrt.skinny import SkinnyMatmul
from wicore.engine.tensorrt.weights import DeviceWeights
from wicore.engine.tensorrt.work_buffers import allocate_work
from wicore.errors import EngineError
from wicore.gemma3.config import Gemma3Config

POOLS: tuple[Pool, Pool] = ("global", "window")
_REVISION = "tensorrt-1"
"""Part of the fingerprint: change it when KV computed by older code can no longer be used."""


class TensorrtEngine:
    """`Engine` on a CUDA device."""

    def __init__(
        self,
        weights: DeviceWeights,
        config: Gemma3Config,
        device: Device,
        *,
        block_tokens: int = 32,
        global_blocks: int,
        window_blocks: int,
        max_context: int | None = None,
        kv: Literal["float16", "int8"] = "float16",
        max_batch: int = 16,
        token_budget: int = 512,
        invariant: bool = False,
        graphs: bool = True,
    ) -> None:
        self._device = device
        layout = layout_of(config, block_tokens, kv)
        context = min(max_context or config.max_context, config.max_context)
        described = f"{_REVISION} {invariant} {layout} {weights.digest}"
        self._info = EngineInfo(
            name="tensorrt",
            device=device.name,
            weights="float16",
            layout=layout,
            global_blocks=global_blocks,
            window_blocks=window_blocks,
            vocab_size=config.vocab_size,
            max_context=context,
            fingerprint=hashlib.sha256(described.encode()).hexdigest(),
        )
        limits = Limits.of(
            layout,
            max_batch=max_batch,
            token_budget=token_budget,
            max_context=context,
            invariant=invariant,
        )
        buffers = allocate_work(device, config, limits.rows, limits.decode_rows[-1])
        self._attention = Attention(
            device, config, layout, limits.rows, limits.decode_rows[-1], limits.entries
        )
        norms, skinny = Norms(device, config), SkinnyMatmul(device)
        body = KernelBody(config, weights, buffers, norms, skinny)
        parts = Parts(
            norms=norms,
            attention=self._attention,
            sampler=Sampler(device, config.vocab_size, limits.decode_rows[-1]),
            head=skinny,
            decode_body=lambda rows: body,
            prompt_body=lambda rows: body,
        )
        self._runner = Runner(
            device, config, layout, weights, parts, buffers, limits, invariant=invariant, graphs=graphs
        )
        blocks = {"global": global_blocks, "window": window_blocks}
        self._pools: dict[Pool, PoolBlocks] = {}
        for pool in POOLS:
            size = blocks[pool] * layout.block_bytes(pool)
            memory = device.allocate(size, f"the {pool} KV pool (hmt.device_tokens)")
            device.fill(memory.address, 0, size, self._runner.stream)
            self._pools[pool] = PoolBlocks(memory.address, blocks[pool])
        self._health = Health()
        self._copies = KVCopies(device, layout, self._pools, self._health)
        for pool in POOLS:
            self._bind(pool)
        self._runner.stream.synchronize()
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        return self._info

    def start(self, plan: StepPlan) -> PendingStep:
        check_plan(plan, self._info, self._copies.slots("global"))
        self._check_health()
        try:
            return _Pending(self._runner.start(plan.sequences), self._health)
        except EngineError as err:
            self._health.failed(err)
            raise

    def step(self, plan: StepPlan) -> StepResult:
        return self.start(plan).result()

    def logits(self, plan: StepPlan) -> dict[int, NDArray[np.float32]]:
        """Logits after every new token of every sequence, [n, vocab]: for parity tests and scoring."""
        check_plan(plan, self._info, self._copies.slots("global"))
        self._check_health()
        try:
            return self._runner.logits(plan.sequences)
        except EngineError as err:
            self._health.failed(err)
            raise

    def host_memory(self, pool: Pool, slots: int) -> NDArray[np.uint8]:
        rows = self._copies.host_memory(pool, slots)
        self._bind(pool)
        return rows

    def copy_out(self, pool: Pool, blocks: Sequence[int], rows: Sequence[NDArray[np.uint8]]) -> Ticket:
        return self._copies.start(pool, blocks, rows, inwards=False)

    def copy_in(self, pool: Pool, rows: Sequence[NDArray[np.uint8]], blocks: Sequence[int]) -> Ticket:
        return self._copies.start(pool, blocks, rows, inwards=True)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._copies.close()
            self._runner.close()
            self._device.close()

    def _bind(self, pool: Pool) -> None:
        size = self._info.layout.block_bytes(pool)
        memory = PoolMemory(pool, self._pools[pool].address, self._copies.host_address(pool), size)
        self._attention.bind(memory)

    def _check_health(self) -> None:
        if self._health.error is not None:
            raise EngineError(f"the device failed before: {self._health.error}")


class _Pending:
    """A step under way; notes when the device fails."""

    def __init__(self, running: Running, health: Health) -> None:
        self._running, self._health = running, health

    def result(self) -> StepResult:
        try:
            return self._running.result()
        except EngineError as err:
            self._health.failed(err)
            raise
