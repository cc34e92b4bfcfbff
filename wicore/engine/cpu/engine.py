"""The CPU engine: Gemma 3 on ONNX Runtime over a paged KV pool in memory.

A step runs the decoder stack once for all sequences that compute one token, once for each prompt chunk
(cut further where its score matrix would be large), and the head once for every row that samples. An image is
never cut: where one asks for more than either bound, its chunk has it whole all the same.

Batch and chunk invariance. The span of keys that attention sees starts and ends at multiples of `_TILE`
absolute positions and is never shorter than `_MIN_SPAN`, with the positions outside masked. ONNX
Runtime's kernels (MLAS) sum over keys in panels of 128 whose borders then fall at the same positions
whatever the chunking; padding adds exact zeros. tests/test_engine_contract.py holds this to the bit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from wicore.engine.base import (
    EngineInfo,
    ImageRows,
    PendingStep,
    Pool,
    SequenceInput,
    SequenceOutput,
    StepPlan,
    StepResult,
    Ticket,
    WhenAsked,
)
from wicore.engine.copies import Copier, HostMemory
from wicore.engine.cpu.graph import build_body, build_head
from wicore.engine.cpu.memory import give_back_freed_memory, shrinking
from wicore.engine.cpu.pool import KVFormat, KVPool, host_inputs, host_rows
from wicore.engine.cpu.rope import RopeTables
from wicore.engine.cpu.weights import WeightFormat, embed, load_final_norm, load_head, load_layer
from wicore.engine.plans import check_plan
from wicore.engine.sizing import layout_of
from wicore.errors import EngineError
from wicore.gemma3.checkpoint import Checkpoint
from wicore.gemma3.config import Gemma3Config
from wicore.sampling import SampledToken, sample

Float = NDArray[np.float32]
Ints = NDArray[np.int64]

POOLS: tuple[Pool, Pool] = ("global", "window")
_TILE = 128
_MIN_SPAN = 256
_CHUNK = 512
_SCORE_BYTES = 32 * 2**20
"""Largest score matrix of one layer; a chunk is cut so that it stays under it."""
_MASKED = np.float32(-1e30)
_REVISION = "cpu-2"
"""Part of the fingerprint: change it when KV computed by older code can no longer be used."""


@dataclass(frozen=True)
class _Run:
    """One pass of the decoder stack: B sequences, the same number S of new tokens each."""

    inputs: tuple[SequenceInput, ...]
    tokens: NDArray[np.int32]
    """[B, S]"""
    starts: Ints
    """[B]"""
    last: tuple[bool, ...]
    """Whether the run holds the sequence's last new token, [B]."""
    images: Sequence[ImageRows] = ()
    """Those that have some of the tokens, and end among them; B is then 1."""


class CpuEngine:
    """`Engine` on ONNX Runtime. Weights and KV are 8-bit (`int8`) or `float32`; sums are float32."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        weights: WeightFormat = "int8",
        kv: KVFormat = "float32",
        threads: int = 0,
        block_tokens: int = 32,
        global_blocks: int,
        window_blocks: int,
        max_context: int | None = None,
    ) -> None:
        """Load the weights and allocate the pools.

        `threads` 0 means one a core. Raises CheckpointError for a bad checkpoint, and EngineError for a block
        size that does not divide 128, or a head that int8 KV does not fit.
        """
        if _TILE % block_tokens:
            raise EngineError(
                f"hmt.block_tokens: {block_tokens} does not divide {_TILE}; use 16, 32, 64 or 128",
                param="hmt.block_tokens",
            )
        config = self._config = checkpoint.config
        if kv == "int8" and config.head_dim % 4:
            raise EngineError(
                f"engine.kv: int8 needs a head_dim that 4 divides, not {config.head_dim}; use float32",
                param="engine.kv",
            )
        self._checkpoint = checkpoint
        self._rope = RopeTables(config)
        self._padding_limit = _padding_limit(config)
        layout = layout_of(config, block_tokens, kv)
        described = f"{_REVISION} {weights} {layout} {checkpoint.content_digest}"
        self._info = EngineInfo(
            name="cpu",
            device=f"CPU, ONNX Runtime {ort.__version__}",
            weights=weights,
            layout=layout,
            global_blocks=global_blocks,
            window_blocks=window_blocks,
            vocab_size=config.vocab_size,
            max_context=min(max_context or config.max_context, config.max_context),
            fingerprint=hashlib.sha256(described.encode()).hexdigest(),
        )
        self._pools: dict[Pool, KVPool] = {
            "global": KVPool(layout, "global", global_blocks),
            "window": KVPool(layout, "window", window_blocks),
        }
        self._host, self._copier = HostMemory(layout), Copier()
        threads = threads or os.cpu_count() or 1
        # One after the other, and the file's pages given back, so that the peak is one copy of the weights
        # and not three.
        self._head = build_head(config, load_head(checkpoint, weights)).session("head", threads)
        checkpoint.release_pages()
        layers = [load_layer(checkpoint, i, weights) for i in range(config.layers)]
        self._body = build_body(config, layers, load_final_norm(checkpoint), kv).session("body", threads)
        del layers
        checkpoint.release_pages()
        give_back_freed_memory()
        # Half of the sampling; numpy lets go of the interpreter while it reduces a row.
        self._second = ThreadPoolExecutor(1, "sampler") if threads > 1 else None
        self._logits = np.empty((0, config.vocab_size), np.float32)
        self._head_binding = self._head.io_binding()
        self._binding = self._body.io_binding()
        for name, rows in _layer_pools(config, self._pools):
            value = ort.OrtValue.ortvalue_from_numpy(rows)
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(f"{name}_out", value)
        self._bind_host(np.zeros((1, layout.block_bytes("global")), np.uint8))

    @property
    def info(self) -> EngineInfo:
        return self._info

    def start(self, plan: StepPlan) -> PendingStep:
        self._check(plan)
        return WhenAsked(partial(self._step, plan))

    def step(self, plan: StepPlan) -> StepResult:
        return self.start(plan).result()

    def host_memory(self, pool: Pool, slots: int) -> NDArray[np.uint8]:
        rows = self._host.allocate(pool, slots)
        if pool == "global" and slots:
            self._bind_host(rows)
        return rows

    def copy_out(self, pool: Pool, blocks: Sequence[int], rows: Sequence[NDArray[np.uint8]]) -> Ticket:
        return self._copier.start(self._pools[pool].copy_out, blocks, rows)

    def copy_in(self, pool: Pool, rows: Sequence[NDArray[np.uint8]], blocks: Sequence[int]) -> Ticket:
        return self._copier.start(self._pools[pool].copy_in, blocks, rows)

    def close(self) -> None:
        self._copier.close()
        if self._second is not None:
            self._second.shutdown()

    def logits(self, plan: StepPlan) -> dict[int, Float]:
        """Logits after every new token of every sequence, [n, vocab]: for parity tests and scoring."""
        self._check(plan)
        parts: dict[int, list[Float]] = {s.key: [] for s in plan.sequences}
        for run in self._runs(plan.sequences):
            hidden, _ = self._run(run, every_row=True)
            by_sequence = hidden.reshape(len(run.inputs), -1, hidden.shape[-1])
            for sequence, rows in zip(run.inputs, by_sequence, strict=True):
                parts[sequence.key].append(self._project(rows).copy())
        return {key: np.concatenate(part) for key, part in parts.items()}

    def _check(self, plan: StepPlan) -> None:
        check_plan(plan, self._info, self._host.slots("global"), self._config.hidden_size)

    # --- one step ---------------------------------------------------------------------------------

    def _step(self, plan: StepPlan) -> StepResult:
        mass = {s.key: np.zeros(len(s.global_table), np.float32) for s in plan.sequences}
        rows: list[Float] = []
        samplers: list[SequenceInput] = []
        for run in self._runs(plan.sequences):
            hidden, run_mass = self._run(run)
            share = np.float32(run.tokens.shape[1])
            for b, sequence in enumerate(run.inputs):
                blocks = mass[sequence.key]
                seen = min(len(blocks), run_mass.shape[1])
                blocks[:seen] += run_mass[b, :seen] * (share / np.float32(len(sequence.tokens)))
            wanted = [b for b, s in enumerate(run.inputs) if run.last[b] and s.sampling is not None]
            if wanted:
                rows.append(hidden[wanted])
                samplers += [run.inputs[b] for b in wanted]
        tokens = self._sample(rows, samplers) if samplers else {}
        return StepResult({key: SequenceOutput(tokens.get(key), share) for key, share in mass.items()})

    def _runs(self, sequences: Sequence[SequenceInput]) -> Iterator[_Run]:
        """Cut a plan into passes of the stack: prompt chunks and streamed sequences one by one, the other
        single tokens together."""
        single = [s for s in sequences if len(s.tokens) == 1 and not s.streamed and not s.images]
        for sequence in sequences:
            if len(sequence.tokens) > 1 or sequence.streamed or sequence.images:
                yield from self._chunks(sequence)
        for batch in _batches(single, self._padding_limit):
            yield _Run(
                inputs=tuple(batch),
                tokens=np.stack([s.tokens for s in batch]),
                starts=np.array([s.start for s in batch], np.int64),
                last=(True,) * len(batch),
            )

    def _chunks(self, sequence: SequenceInput) -> Iterator[_Run]:
        at, n = 0, len(sequence.tokens)
        while at < n:
            span = sequence.start + at + _CHUNK
            size = min(_CHUNK, n - at, max(16, _SCORE_BYTES // (4 * self._config.heads * span)))
            start, end = sequence.start + at, sequence.start + at + size
            images = [image for image in sequence.images if image.start < end and image.end > start]
            if images and images[-1].end > end:
                # Cut before the image; where the chunk begins in it, not at all.
                end = images[-1].start if images[-1].start > start else images[-1].end
                images = [image for image in images if image.end <= end]
            size = end - start
            yield _Run(
                inputs=(sequence,),
                tokens=sequence.tokens[None, at : at + size],
                starts=np.array([start], np.int64),
                last=(at + size == n,),
                images=images,
            )
            at += size

    def _run(self, run: _Run, *, every_row: bool = False) -> tuple[Float, Float]:
        """(hidden rows [R, hidden], mass by logical block [B, blocks]).

        R is B, the row of each last token, or B * S with `every_row`. Writes the new KV.
        """
        batch, n = run.tokens.shape
        rows = np.arange(batch * n) if every_row else np.arange(1, batch + 1) * n - 1
        feeds: dict[str, NDArray[np.generic]] = {
            "x": self._embedded(run)[None],
            "rows": rows.astype(np.int64),
            "positions": np.arange(batch * n, dtype=np.int64)[:, None],
        }
        positions = run.starts[:, None] + np.arange(n)
        for pool in POOLS:
            feeds |= self._attention_feeds(pool, run, positions)
        feeds |= self._streamed_feeds(run)
        for name, array in feeds.items():
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            self._binding.bind_ortvalue_input(name, value)
        span = feeds["mask_global"].shape[-1] // self._info.layout.block_tokens
        hidden = np.empty((len(rows), self._config.hidden_size), np.float32)
        mass = np.empty((batch, span, self._info.layout.block_tokens), np.float32)
        self._bind_output("hidden", hidden, hidden.shape)
        self._bind_output("mass", mass, (batch, mass[0].size))
        # A chunk's working memory is large and of another shape each time: kept, it would only pile up.
        self._body.run_with_iobinding(self._binding, shrinking() if n > 1 else None)
        if n > 1:
            # A prompt reads embeddings all over the table, and their pages would stay with us.
            self._checkpoint.release_pages()
        queries = np.float32(n * self._config.heads * self._info.layout.global_layers)
        return hidden, mass.sum(-1) / queries

    def _embedded(self, run: _Run) -> Float:
        """What enters the first layer, [B * S, hidden]."""
        if not run.images:
            return embed(self._checkpoint, run.tokens.ravel())
        x = embed(self._checkpoint, np.maximum(run.tokens.ravel(), 0))
        start = int(run.starts[0])
        for image in run.images:
            first = max(image.start, start)
            x[first - start : image.end - start] = image.rows[first - image.start :]
        return x

    def _bind_output(self, name: str, array: Float, shape: tuple[int, ...]) -> None:
        """Have the next run write output `name`, of `shape`, into `array`."""
        self._binding.bind_output(name, "cpu", 0, np.float32, shape, array.ctypes.data)

    def _bind_host(self, rows: NDArray[np.uint8]) -> None:
        """Let streamed blocks be read from these rows, in place."""
        for name, array in host_inputs(self._info.layout, rows).items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))

    def _streamed_feeds(self, run: _Run) -> dict[str, NDArray[np.generic]]:
        """Which blocks the graph reads from host memory; a run with any holds one sequence."""
        sequence = run.inputs[0]
        slots = sequence.global_table[: sequence.streamed].astype(np.int64)
        return {"streamed": np.array(sequence.streamed > 0), **host_rows(self._info.layout, slots)}

    def _attention_feeds(self, pool: Pool, run: _Run, positions: Ints) -> dict[str, NDArray[np.generic]]:
        """Block table, slots, mask and RoPE rows of one pool; `positions` is [B, S]."""
        c, block = self._config, self._info.layout.block_tokens
        batch, n = positions.shape
        window = c.sliding_window if pool == "window" else self._info.max_context + n
        first = np.maximum(0, positions[:, 0] - window + 1) // _TILE * _TILE
        span = max(_MIN_SPAN, int(-(-(positions[:, -1] + 1 - first).max() // _TILE) * _TILE))
        table = np.zeros((batch, span // block), np.int64)
        slots = np.empty((batch, n, 2), np.int64)
        for b, sequence in enumerate(run.inputs):
            physical = sequence.global_table if pool == "global" else sequence.window_table
            offset = 0 if pool == "global" else sequence.window_first
            have = np.arange(first[b] // block, first[b] // block + span // block) - offset
            # Outside of the table every position is masked; any block will do.
            table[b] = physical[np.clip(have, 0, len(physical) - 1)]
            slots[b, :, 0] = physical[positions[b] // block - offset]
            slots[b, :, 1] = positions[b] % block
        keys = (first[:, None] + np.arange(span)).astype(np.int32)
        ahead = keys[:, None, :] - positions[:, :, None].astype(np.int32)
        behind = ahead <= 0
        for image in run.images:
            # A key of the image's that comes later is seen as well. Those before it are in the span too: an
            # image fits in the window.
            at, key = image.start - positions[0, 0], image.start - first[0]
            behind[0, max(0, at) : at + len(image.rows), key : key + len(image.rows)] = True
        mask = np.where(behind & (ahead > -window), np.float32(0), _MASKED)
        heads = np.arange(c.kv_heads)
        by_head = slots[:, :, None, :] * np.array([c.kv_heads, 1]) + np.stack([heads, heads * 0], -1)
        cos, sin = self._rope.rows(pool, positions.ravel())
        # What is streamed, the span's first blocks, is read from elsewhere.
        streamed = run.inputs[0].streamed if pool == "global" else 0
        return {
            f"cos_{pool}": cos,
            f"sin_{pool}": sin,
            f"blocks_{pool}": table[:, None, streamed:] * c.kv_heads + heads[:, None],
            f"slots_{pool}": by_head.reshape(-1, c.kv_heads, 1, 2),
            f"mask_{pool}": np.repeat(mask, c.heads // c.kv_heads, axis=1)[:, None],
        }

    def _project(self, hidden: Float) -> Float:
        """Logits of hidden rows, [R, vocab], in a buffer that the next call writes over."""
        rows = len(hidden)
        if len(self._logits) < rows:
            self._logits = np.empty((rows, self._config.vocab_size), np.float32)
        logits = self._logits[:rows]
        binding = self._head_binding
        binding.bind_cpu_input("hidden", np.ascontiguousarray(hidden[None]))
        # Into memory of ours: the session's own would be new, and copied, every step.
        shape = (1, *logits.shape)
        binding.bind_output("logits", "cpu", 0, np.float32, shape, logits.ctypes.data)
        self._head.run_with_iobinding(binding)
        return logits

    def _sample(self, rows: list[Float], samplers: list[SequenceInput]) -> dict[int, SampledToken]:
        logits = self._project(np.concatenate(rows))
        states = [s.sampling for s in samplers if s.sampling is not None]
        return {s.key: token for s, token in zip(samplers, sample(logits, states, self._second), strict=True)}


def _padding_limit(config: Gemma3Config) -> int:
    """Positions of padding that cost as much as one more pass over the stack's weights."""
    weights = config.parameters - config.vocab_size * config.hidden_size
    position = 2 * config.kv_heads * config.head_dim * max(1, config.global_layers) * 4
    return weights // position


def _batches(single: Sequence[SequenceInput], limit: int) -> Iterator[list[SequenceInput]]:
    """Sequences that decode together: of like length, so that padding never costs more than a pass."""
    batch: list[SequenceInput] = []
    wasted = 0
    for sequence in sorted(single, key=lambda s: -s.start):
        wasted += (batch[0].start - sequence.start) if batch else 0
        if wasted > limit:
            yield batch
            batch, wasted = [], 0
        batch.append(sequence)
    if batch:
        yield batch


def _layer_pools(config: Gemma3Config, pools: dict[Pool, KVPool]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Each layer's K and V memory by graph input name."""
    index = dict.fromkeys(POOLS, 0)
    for layer, kind in enumerate(config.layer_kinds):
        for suffix, (k, v) in zip(("", "_scale"), pools[kind].layer(index[kind]), strict=False):
            yield f"k_{layer}{suffix}", k
            yield f"v_{layer}{suffix}", v
        index[kind] += 1
