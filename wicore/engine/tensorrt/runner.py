"""Runs steps on the device: cuts them into passes, sends what they need, and launches their kernels.

A decode pass is padded to a bucket of rows and replayed as a CUDA graph, which is captured after the bucket's
first use; other passes are launched kernel by kernel. Where one decode pass is the whole step, its graph goes
on to the head and the sampler, unless masks are still to be made for some rows: that is done while the layers
run. Else the rows that sample are gathered, and come last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import KVLayout, Pool, SequenceInput, SequenceOutput, StepResult
from wicore.engine.tensorrt.attention import StepTables
from wicore.engine.tensorrt.attention_settings import TILE_POSITIONS
from wicore.engine.tensorrt.block_tables import BlockTables
from wicore.engine.tensorrt.bodies import Body, KernelBody
from wicore.engine.tensorrt.copies import KVCopy
from wicore.engine.tensorrt.decode_arrays import Check, DecodeArrays
from wicore.engine.tensorrt.device import Device, Graph
from wicore.engine.tensorrt.limits import Limits
from wicore.engine.tensorrt.passes import Pass, cut
from wicore.engine.tensorrt.step_arrays import Upload, listed, pass_arrays, tiles
from wicore.engine.tensorrt.timing import median_ms
from wicore.engine.tensorrt.weights import DeviceWeights
from wicore.engine.tensorrt.workspace import Workspace
from wicore.gemma3.config import Gemma3Config
from wicore.sampling import SampledToken, SamplingState

Float = NDArray[np.float32]

log = logging.getLogger("wicore.engine")

_OVERLAP_TO = 8
"""Most rows at which a decode step's kernels overlap, unless it was measured."""


class Runner:
    """Enqueues one step at a time on one stream. Nothing here waits but `wait`, and `logits`."""

    def __init__(
        self,
        device: Device,
        config: Gemma3Config,
        layout: KVLayout,
        weights: DeviceWeights,
        workspace: Workspace,
        body: Callable[[int], Body],
        last: KernelBody,
        *,
        max_context: int,
        graphs: bool = True,
    ) -> None:
        """`body` says what computes the layers, by the number of rows; `last` works on the rows of a prompt
        that are wanted after the last layer."""
        self._device, self._config, self._layout, self._weights = device, config, layout, weights
        self._parts, self._buffers, self._limits = workspace, workspace.buffers, workspace.limits
        self._body, self._last, self._graphs_wanted = body, last, graphs
        self.stream = device.stream()
        self._mass_at, self._mass_cleared = 0, False
        self._upload = Upload(device, 4 * _words(self._limits))
        self._arrays = DecodeArrays(device, layout, self._limits, config.vocab_size, max_context)
        self._mass = device.allocate_host(4 * self._limits.entries)
        self._done = device.event()
        self._graphs: dict[tuple[int, bool], Graph] = {}
        self._layers = _pool_layers(config)

    # --- one step -----------------------------------------------------------------------------------

    def start(self, sequences: Sequence[SequenceInput], check: Check) -> Running:
        """Enqueue a step. Raises ValueError as `check` does, and for a step too large for the buffers."""
        arriving = [ticket for sequence in sequences for ticket in sequence.arriving]
        if arriving:
            check(sequences)
            return self._start_passes(sequences, cast(list[KVCopy], arriving))
        tables = self._arrays.follow(sequences, check)
        if tables is None:
            check(sequences)
            single = all(len(s.tokens) == 1 and not s.images for s in sequences)
            if not (single and 0 < len(sequences) <= self._limits.samples):
                return self._start_passes(sequences)
            tables = self._arrays.begin(sequences)
        rows = self._single([s.sampling for s in sequences], tables)
        return self._started(sequences, tables, [sequences[row].key for row in rows], rows)

    def _start_passes(self, sequences: Sequence[SequenceInput], arriving: Sequence[KVCopy] = ()) -> Running:
        """Enqueue a step that is not one row a sequence, or that reads what these copies bring."""
        passes, tables = self._cut(sequences), self._arrays.tables_of(sequences)
        samples = [piece.sequence for work in passes for piece in work.pieces if piece.samples]
        if len(samples) > self._limits.samples:
            raise ValueError(
                f"plan: {len(samples)} sequences sample, and scheduler.max_batch is {self._limits.samples}"
            )
        if len(passes) == 1 and passes[0].decode:
            self._let_pass(arriving)
            self._arrays.fill(passes[0], tables)
            rows = self._single(_states(passes[0]), tables)
        else:
            self._several(passes, tables, [s.sampling for s in samples], arriving)
            rows = list(range(len(samples)))
        return self._started(sequences, tables, [s.key for s in samples], rows)

    def _started(
        self,
        sequences: Sequence[SequenceInput],
        tables: BlockTables,
        keys: Sequence[int],
        rows: Sequence[int],
    ) -> Running:
        """A step is enqueued, of which these sequences sample, in these rows."""
        if tables.global_entries:
            size = 4 * tables.global_entries
            self._device.copy(self._mass.address, self._mass_at, size, self.stream)
        self._done.record(self.stream)
        self._parts.attention.clear_mass(self.stream)  # of the next step, while nobody waits
        self._mass_cleared = True
        return Running(self, sequences, tables, keys, rows)

    def wait(self) -> None:
        """Block until the step that was started is computed."""
        self._done.wait()

    def tokens(self, rows: Sequence[int]) -> list[SampledToken]:
        """What was sampled in these rows of the step computed."""
        drawn = self._parts.sampler.read(max(rows) + 1) if rows else []
        return [token for row in rows if (token := drawn[row]) is not None]

    def shares(self, tables: BlockTables, sequences: Sequence[SequenceInput]) -> list[Float]:
        """Each sequence's attention mass in the step computed, by block, summing to 1."""
        mass: Float = self._mass.array[: 4 * tables.global_entries].view(np.float32)
        return tables.shares(mass, sequences)

    def logits(self, sequences: Sequence[SequenceInput]) -> dict[int, Float]:
        """Logits after every new token, float32 [n, vocab] by key. Waits; for tests and scoring."""
        found: dict[int, list[Float]] = {s.key: [] for s in sequences}
        tables = self._arrays.tables_of(sequences)
        most = self._limits.samples
        self._clear_mass()
        for work in self._cut(sequences):
            if work.decode:
                self._arrays.fill(work, tables)
                self._decode(tables, self._limits.bucket(work.rows), False)
            else:
                self._prompt_launches(work, self._send(work, tables), None)
            at = 0
            for piece in work.pieces:
                for first in range(at, at + piece.count, most):
                    count = min(most, at + piece.count - first)
                    found[piece.sequence.key].append(self._project(first, count))
                at += piece.count
        return {key: np.concatenate(parts) for key, parts in found.items()}

    # --- passes -------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Run and capture decode steps of every bucket, on padding: no step then has to."""
        tables = self._arrays.tables_of(())
        self._arrays.fill(Pass((), decode=True), tables)
        self._parts.sampler.pack([])
        self._parts.sampler.upload(self.stream)
        for bucket in self._limits.decode_rows:
            # A step of several passes has none with a head; without `invariant` such steps are rare.
            for head in (True, False) if self._parts.invariant else (True,):
                self._decode(tables, bucket, head, measured=True)
        self.stream.synchronize()

    def launches(self, sequences: Sequence[SequenceInput]) -> Callable[[], None]:
        """What enqueues the kernels of a step of one pass, whose arrays are sent now: for profiles."""
        tables = self._arrays.tables_of(sequences)
        (work,) = self._cut(sequences)
        self._mass_cleared = False
        if work.decode:
            self._arrays.fill(work, tables)
            self._arrays.send(self.stream, tables)
            return partial(self._decode_launches, self._limits.bucket(work.rows), True)
        sent = self._send(work, tables)

        def launches() -> None:
            self._prompt_launches(work, sent, _samples(work))

        return launches

    def forget_graphs(self) -> None:
        """Addresses have changed that graphs hold; no step may be under way."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def _cut(self, sequences: Sequence[SequenceInput]) -> Sequence[Pass]:
        limits = self._limits
        return list(
            cut(
                sequences,
                capacity=limits.rows,
                decode_capacity=limits.samples,
                invariant=self._parts.invariant,
            )
        )

    def _clear_mass(self) -> None:
        """Begin to count attention mass."""
        if not self._mass_cleared:
            self._parts.attention.clear_mass(self.stream)
        self._mass_cleared = False

    def _single(self, states: Sequence[SamplingState | None], tables: BlockTables) -> list[int]:
        """A step that is one decode pass, whose arrays are written; `states` are its rows', and which of them
        sample is returned."""
        self._clear_mass()
        sampler, bucket = self._parts.sampler, self._limits.bucket(len(states))
        rows = [row for row, state in enumerate(states) if state is not None]
        draws = bool(rows)
        if draws:
            sampler.pack(states)
            sampler.upload(self.stream)
        late = draws and sampler.constrained
        self._decode(tables, bucket, draws and not late)
        if late:
            self._head(bucket, self._buffers.normed)
            self._draw(bucket)
        return rows

    def _several(
        self,
        passes: Sequence[Pass],
        tables: BlockTables,
        states: Sequence[SamplingState | None],
        arriving: Sequence[KVCopy],
    ) -> None:
        """Passes, then the head for all rows that sample, by these states."""
        self._clear_mass()
        if states:
            self._parts.sampler.pack(states)
            self._parts.sampler.upload(self.stream)
        done = 0
        for work in passes:
            done += self._run_pass(work, tables, done, arriving)
        if states:
            self._head(done, self._buffers.gathered)
            self._draw(done)

    def _draw(self, rows: int) -> None:
        """Draw from the logits of a step that is enqueued up to them, and runs while masks are made."""
        self._parts.sampler.upload_masks(self.stream)
        self._parts.sampler.launch(self.stream, rows, self._buffers.logits)

    def _let_pass(self, arriving: Sequence[KVCopy]) -> None:
        """Have what comes next, a graph, come after these copies: it cannot wait within."""
        for copy in arriving:
            copy.lead(self.stream)

    def _run_pass(self, work: Pass, tables: BlockTables, done: int, arriving: Sequence[KVCopy]) -> int:
        """Run a pass and put its normed rows that sample behind the `done` of passes before; how many."""
        count, normed, target = _samples(work), self._buffers.normed, self._gathered(done)
        size = 2 * self._config.hidden_size
        if work.decode:
            self._let_pass(arriving)
            self._arrays.fill(work, tables)
            self._decode(tables, self._limits.bucket(work.rows), False)
            sampling, alone = self._arrays.sampling, False
        else:
            sent = self._send(work, tables)
            sampling, alone = sent.sampling, self._prompt_launches(work, sent, count, arriving)
        if alone and count:
            self._device.copy(target, normed, size * count, self.stream)
        elif count:
            self._parts.norms.gather(self.stream, count, sampling, normed, target, size)
        return count

    def _decode(self, tables: BlockTables, bucket: int, head: bool, *, measured: bool = False) -> None:
        """Run the decode pass whose arrays are written."""
        self._arrays.send(self.stream, tables)
        key = (bucket, head)
        if key in self._graphs:
            self._graphs[key].launch(self.stream)
            return
        launches = partial(self._decode_launches, bucket, head)
        # The first time eagerly: what a kernel compiles or allocates then may not happen in a capture.
        launches()
        if self._graphs_wanted:
            self._graphs[key] = self._capture(bucket, launches, measured)

    def _capture(self, rows: int, launches: Callable[[], None], measured: bool) -> Graph:
        """As a graph whose kernels overlap, or one whose kernels do not: the faster one where it is to be
        `measured`, which replays it, else by what is usual on a Hopper card: with more than a few rows,
        reading ahead of the weights disturbs the kernel that runs more than it helps the next."""
        if not measured:
            return self._device.capture(self.stream, launches, overlapping=rows <= _OVERLAP_TO)
        graphs = [self._device.capture(self.stream, launches, overlapping=on) for on in (False, True)]
        times = [median_ms(self._device, self.stream, partial(graph.launch, self.stream)) for graph in graphs]
        log.debug("%d rows: %.3f ms, overlapping %.3f ms", rows, *times)
        graphs.pop(times.index(max(times))).close()
        return graphs[0]

    def _decode_launches(self, rows: int, head: bool) -> None:
        attention, b, tables = self._parts.attention, self._buffers, self._arrays.addresses
        body = self._body(rows)
        attention.rope(self.stream, rows, tables)
        attention.schedule(self.stream, rows, tables)
        body.first(self.stream, rows, tables.ids)
        for index, (pool, layer) in enumerate(self._layers):
            self._append(rows, index, tables)
            attention.decode(self.stream, rows, pool, layer, b.q, b.attended, tables)
            body.after(self.stream, rows, index)
        self._mass_at = attention.mass(self.stream, rows, tables)
        if head:
            self._head(rows, b.normed)
            self._parts.sampler.launch(self.stream, rows, b.logits)

    def _prompt_launches(
        self, work: Pass, sent: _Sent, sampled: int | None, arriving: Sequence[KVCopy] = ()
    ) -> bool:
        """`sampled`: how many rows are read after the last layer, which then goes on with them alone where it
        can; None: all of them. Each layer comes after its part of the copies `arriving`. Whether `normed` has
        those rows alone."""
        last = len(self._layers) - 1
        attention, b, step, rows = self._parts.attention, self._buffers, sent.tables, work.rows
        indices, listed = sent.listed
        body = self._body(rows)
        # Segments keep the residual stream elsewhere.
        alone = sampled is not None and isinstance(body, KernelBody)
        attention.rope(self.stream, rows, step)
        attention.schedule(self.stream, listed, step, indices)
        body.first(self.stream, rows, step.ids, list(work.images()))
        for index, (pool, layer) in enumerate(self._layers):
            for copy in arriving:
                if copy.pool == pool:
                    copy.lead(self.stream, layer)
            self._append(rows, index, step)
            # Chunks are listed for their mass, which window layers have none of.
            if pool == "global" or work.singles or work.by_row:
                attention.decode(self.stream, listed, pool, layer, b.q, b.attended, step)
            if index == last and sampled == 0:
                break  # its KV is written, and nobody asks for more
            if sent.tiles[1]:
                attention.prefill(self.stream, *sent.tiles, pool, layer, b.q, b.attended, step)
            if index == last and alone:
                self._after_last(sent, sampled or 0)
            else:
                body.after(self.stream, rows, index)
        self._mass_at = attention.mass(self.stream, listed, step)
        return alone

    def _after_last(self, sent: _Sent, sampled: int) -> None:
        """The last layer's `after`, of the rows that sample."""
        c, b, gather = self._config, self._buffers, self._parts.norms.gather
        wide = 2 * c.heads * c.head_dim
        gather(self.stream, sampled, sent.sampling, b.attended, b.last_attended, wide)
        gather(self.stream, sampled, sent.sampling, b.residual, b.last_residual, 4 * c.hidden_size)
        self._last.after(self.stream, sampled, len(self._layers) - 1)

    def _append(self, rows: int, index: int, tables: StepTables) -> None:
        (pool, layer), weights, b = self._layers[index], self._weights.layers[index], self._buffers
        self._parts.attention.append(
            self.stream, rows, pool, layer, b.qkv, weights.q_norm, weights.k_norm, b.q, tables
        )

    def _head(self, rows: int, normed: int) -> None:
        c, b = self._config, self._buffers
        self._parts.matmuls.plain(
            self.stream, rows, normed, self._weights.embedding, b.logits, c.vocab_size, c.hidden_size, False
        )

    def _project(self, first: int, count: int) -> Float:
        """Logits of rows `first .. first + count - 1` of the pass just run, on the host."""
        self._head(count, self._buffers.normed + 2 * first * self._config.hidden_size)
        logits = np.empty((count, self._config.vocab_size), np.float32)
        self._device.copy(logits.ctypes.data, self._buffers.logits, logits.nbytes, self.stream)
        self.stream.synchronize()
        return logits

    def _gathered(self, row: int) -> int:
        return self._buffers.gathered + 2 * row * self._config.hidden_size

    def _send(self, work: Pass, tables: BlockTables) -> _Sent:
        """Send what a prompt pass needs."""
        arrays = pass_arrays(work, tables, work.rows, len(work.pieces))
        work_tiles, work_listed = tiles(work), listed(work)
        ends = [] if arrays.image_end is None else [arrays.image_end]
        sent = self._upload.send(
            self.stream,
            [
                *(arrays.ids, arrays.positions, arrays.row_sequence, *arrays.sequences),
                *(arrays.sampling, work_listed, work_tiles, tables.entries, *ends),
            ],
        )
        ids, positions, row_sequence, global_offset, window_offset, window_first, streamed, *rest = sent
        sampling, listed_at, tiles_at, entries, *ends_at = rest
        step = StepTables(
            ids=ids,
            positions=positions,
            row_seq=row_sequence,
            global_offset=global_offset,
            window_offset=window_offset,
            window_first=window_first,
            streamed=streamed,
            # One array: the offsets of windows are counted from its beginning too.
            global_tables=entries,
            window_tables=entries,
            image_end=ends_at[0] if ends_at else 0,
        )
        return _Sent(step, sampling, (tiles_at, len(work_tiles)), (listed_at, len(work_listed)))


@dataclass(frozen=True)
class _Sent:
    """Where on the device the arrays of a pass are."""

    tables: StepTables
    sampling: int
    """The rows that sample."""
    tiles: tuple[int, int]
    """The chunks' tiles, and how many."""
    listed: tuple[int, int]
    """The rows that go through the kernels for single rows, and how many."""


class Running:
    """A step under way."""

    def __init__(
        self,
        runner: Runner,
        sequences: Sequence[SequenceInput],
        tables: BlockTables,
        keys: Sequence[int],
        rows: Sequence[int],
    ) -> None:
        """`keys` are of the sequences that sample, in these rows."""
        self._runner, self._sequences, self._tables = runner, sequences, tables
        self._keys, self._rows = keys, rows

    def result(self) -> StepResult:
        self._runner.wait()
        tokens = dict(zip(self._keys, self._runner.tokens(self._rows), strict=True))
        shares = self._runner.shares(self._tables, self._sequences)
        return StepResult(
            {
                sequence.key: SequenceOutput(tokens.get(sequence.key), share)
                for sequence, share in zip(self._sequences, shares, strict=True)
            }
        )


def _samples(work: Pass) -> int:
    return sum(piece.samples for piece in work.pieces)


def _states(work: Pass) -> list[SamplingState | None]:
    """What each row of a pass samples with; None where it does not."""
    states: list[SamplingState | None] = []
    for piece in work.pieces:
        states += [None] * (piece.count - 1)
        states.append(piece.sequence.sampling if piece.samples else None)
    return states


def _words(limits: Limits) -> int:
    """Most int32 that a pass sends."""
    sequences = limits.samples
    tiles = limits.rows // TILE_POSITIONS + 2 * sequences
    return 4 * limits.rows + 5 * sequences + limits.listed + 4 * tiles + limits.entries


def _pool_layers(config: Gemma3Config) -> list[tuple[Pool, int]]:
    """By layer: its pool, and which of the pool's layers it is."""
    counts: dict[Pool, int] = {"global": 0, "window": 0}
    found: list[tuple[Pool, int]] = []
    for kind in config.layer_kinds:
        found.append((kind, counts[kind]))
        counts[kind] += 1
    return found
