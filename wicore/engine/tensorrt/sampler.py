"""Drawing tokens on the GPU: `wicore.sampling.sample` for logits that stay on the card.

The kernels (kernels/sampling.cu) draw what the CPU draws for equal logits, except where float32 rounding
decides a border: same random numbers, same order of filters, same order of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wicore.engine.tensorrt.device import Buffer, Device, HostBuffer, Stream
from wicore.engine.tensorrt.parts import allocate_parts
from wicore.sampling import GREEDY_BELOW, Constraint, SampledToken, SamplingState, unusable_logits

_CHUNK, _STRIP, _BINS, _CAPACITY, _TOP = 4096, 512, 2048, 4096, 20  # see sampling.cu
_SELECT_THREADS = 1024
_SELECT_SHARED = 8 * _CAPACITY + 8 * (_BINS + 1) + 4 * (_BINS + 1)
_GREEDY, _WHOLE, _FILTERED = 0, 1, 2
_BLOCKS_A_MULTIPROCESSOR = 4
_FIRST_ENTRIES = 4096

_ROW = np.dtype(
    [(name, "<i8") for name in ("seed", "position")]
    + [("top_p", "<f8")]
    + [(name, "<u8") for name in ("mask", "entries", "raw")]
    + [(name, "<i4") for name in ("bias_count", "seen_count", "source", "mode", "top_k", "wanted")]
    + [(name, "<f4") for name in ("temperature", "inverse_temperature", "min_p_distance", "share_distance")]
    + [(name, "<f4") for name in ("repetition", "frequency", "presence", "unused")]
)
_RESULT = np.dtype(
    [
        *(("id", "<i4"), ("count", "<i4"), ("peak", "<f4"), ("raw", "<f4"), ("total", "<f8")),
        *(("ids", "<i4", _TOP), ("raws", "<f4", _TOP)),
    ]
)


class Sampler:
    """Draws a token for each of up to `max_rows` rows of logits, float32 [rows][vocab] on the device.

    A step is `pack` (host), `upload`, `upload_masks` and `launch` (enqueue), and, when the stream has passed
    them, `read`. `launch` can be captured in a graph and be replayed after any later `pack` and `upload`, if
    no row packed has a constraint. Not thread-safe; a step must be done before the next is packed.
    """

    def __init__(self, device: Device, vocab: int, max_rows: int) -> None:
        self._device, self._vocab, self._max_rows = device, vocab, max_rows
        sizes = {"CHUNK": _CHUNK, "STRIP": _STRIP, "BINS": _BINS, "CAPACITY": _CAPACITY, "TOP": _TOP}
        module = device.compile("sampling.cu", sizes)
        self._scan = module.function("sample_scan")
        self._count = module.function("sample_count")
        self._gather = module.function("sample_gather")
        self._select = module.function("sample_select", _SELECT_SHARED)

        self._chunks, self._strips = -(-vocab // _CHUNK), -(-vocab // _STRIP)
        self._words = -(-vocab // 32)
        parts = {
            "rows": _ROW.itemsize,
            "results": _RESULT.itemsize,
            "best": 8 * self._chunks,
            "mass": 8 * _BINS,
            "list": 8 * _CAPACITY,
            "sums": 4 * self._chunks,
            "raw_sums": 4 * self._chunks,
            "strips": 4 * self._strips,
            "raw_strips": 4 * self._strips,
            "count": 4 * _BINS,
            "filled": 4,
            "masks": 4 * self._words,
        }
        self._memory, self._at = allocate_parts(
            device, {name: size * max_rows for name, size in parts.items()}, "the sampler's buffers"
        )
        self._host_rows = device.allocate_host(_ROW.itemsize * max_rows)
        self._host_results = device.allocate_host(_RESULT.itemsize * max_rows)
        self._rows: NDArray[Any] = self._host_rows.array.view(_ROW)
        self._results: NDArray[Any] = self._host_results.array.view(_RESULT)
        self._host_masks = device.allocate_host(4 * self._words * max_rows)
        self._masks = self._host_masks.array.view(np.uint32).reshape(max_rows, self._words)
        self._rows[:] = np.zeros((), _ROW)
        self._rows["source"] = -1

        self._states: list[SamplingState | None] = [None] * max_rows
        self._known: dict[SamplingState, NDArray[Any]] = {}
        self._touched: list[int] = []
        self._constraints: list[Constraint] = []
        """Of the rows packed that have one; their masks lie in this order."""
        self._entries_used = 0
        self._entries: Buffer | None = None
        self._raw: Buffer | None = None
        self._host_entries: HostBuffer | None = None

    @property
    def constrained(self) -> bool:
        """Whether a row that was packed has a constraint."""
        return bool(self._constraints)

    def pack(self, states: Sequence[SamplingState | None]) -> None:
        """Note what row i of the logits is to be drawn with; None: nothing is drawn from it.

        Raises ValueError for more states than `max_rows`, for a bias on an id outside of the vocabulary, and
        for penalties of a negative id.
        """
        count = len(states)
        if count > self._max_rows:
            raise ValueError(f"states: got {count}; must be at most {self._max_rows}")
        rows, known = self._rows, self._states
        changed = False
        for i, state in enumerate(states):
            if state is not known[i]:
                changed = True
                rows[i] = self._record(state)
                if state is not None:
                    rows["source"][i] = i
        if changed or any(state is not None for state in known[count:]):
            rows["source"][count:] = -1
            self._states = [*states, *[None] * (self._max_rows - count)]
            self._touched = [
                i for i, s in enumerate(states) if s is not None and (s.penalised or s.params.logit_bias)
            ]
            self._pack_constraints()
        rows["position"][:count] = [0 if state is None else state.position for state in states]
        self._entries_used = 0
        if self._touched:
            self._pack_entries()

    def upload(self, stream: Stream) -> None:
        """Enqueue the copy of what was packed: one, and a second if any row has a bias or penalties."""
        self._device.copy(self._at["rows"], self._host_rows.address, self._host_rows.size, stream)
        if self._entries_used and self._entries is not None and self._host_entries is not None:
            self._device.copy(
                self._entries.address, self._host_entries.address, 8 * self._entries_used, stream
            )

    def upload_masks(self, stream: Stream) -> None:
        """Find what the constraints packed allow, and enqueue the copy of it.

        Work of tens of microseconds a row: best done when the device has something else to do already.
        """
        if self._constraints:
            for mask, constraint in zip(self._masks, self._constraints, strict=False):
                mask[:] = constraint.allowed()
            size = 4 * self._words * len(self._constraints)
            self._device.copy(self._at["masks"], self._host_masks.address, size, stream)

    def launch(self, stream: Stream, rows: int, logits: int) -> None:
        """Enqueue the draw from the first `rows` rows at `logits`, and the copy of its results.

        The logits are changed. The grid depends on `rows` alone.
        """
        if not 0 < rows <= self._max_rows:
            raise ValueError(f"rows: got {rows}; must be 1 to {self._max_rows}")
        at = self._at
        table, strips = at["rows"], at["strips"]
        histogram = (at["mass"], at["count"])
        scanned = (np.int32(self._vocab), table, logits, at["best"], at["sums"], strips)
        wide = self._device.sms * _BLOCKS_A_MULTIPROCESSOR
        splits = max(1, min(-(-wide // rows), -(-self._strips // 8)))
        raw = (at["raw_sums"], at["raw_strips"])
        self._scan(stream, (self._chunks, rows), 256, (*scanned, *raw, *histogram, at["filled"]))
        self._count(stream, (splits, rows), 256, (*scanned, *histogram))
        self._gather(stream, (splits, rows), 256, (*scanned, *histogram, at["list"], at["filled"]))
        self._select(
            stream,
            rows,
            _SELECT_THREADS,
            (*scanned, *raw, *histogram, at["list"], at["results"]),
            dynamic_shared=_SELECT_SHARED,
        )
        self._device.copy(self._host_results.address, at["results"], _RESULT.itemsize * rows, stream)

    def read(self, count: int) -> list[SampledToken | None]:
        """What was drawn for the first `count` rows, once the stream has passed `launch`; None for a row
        without a state.

        Raises EngineError naming the row when a row has a NaN or +inf, or nothing but -inf.
        """
        results = self._results[:count]
        tokens: list[SampledToken | None] = []
        for i, (token, state) in enumerate(zip(results["id"].tolist(), self._states, strict=False)):
            if state is None:
                tokens.append(None)
                continue
            if token < 0:
                raise unusable_logits(i, float(results["peak"][i]))
            if state.params.logprobs is None:
                tokens.append(SampledToken(token, None, ()))
                continue
            result = results[i]
            log_total = float(result["peak"]) + math.log(result["total"])
            found = int(result["count"])
            ids, raws = result["ids"][:found].tolist(), result["raws"][:found].tolist()
            top = tuple((id_, logit - log_total) for id_, logit in zip(ids, raws, strict=True))
            tokens.append(SampledToken(token, float(result["raw"]) - log_total, top))
        return tokens

    def close(self) -> None:
        """Give the memory back; the work must be done."""
        for buffer in (self._memory, self._host_rows, self._host_results, self._host_masks):
            buffer.free()
        self._free_entries()

    def _record(self, state: SamplingState | None) -> NDArray[Any]:
        """A row's constant part; `source` is -1."""
        if state is None:
            record = np.zeros((), _ROW)
            record["source"] = -1
            return record
        if (found := self._known.get(state)) is not None:
            return found
        if len(self._known) >= 4 * self._max_rows:
            self._known.clear()
        record = self._known[state] = self._new_record(state)
        return record

    def _new_record(self, state: SamplingState) -> NDArray[Any]:
        params = state.params
        if params.logit_bias and max(params.logit_bias) >= self._vocab:
            raise ValueError(f"logit_bias: got id {max(params.logit_bias)}; must be under {self._vocab}")
        filtered = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        temperature = params.temperature
        greedy = temperature < GREEDY_BELOW
        record = np.zeros((), _ROW)
        record["source"] = -1
        record["seed"] = (state.seed + 2**63) % 2**64 - 2**63
        record["mode"] = _GREEDY if greedy else _FILTERED if filtered else _WHOLE
        record["top_k"] = min(params.top_k, self._vocab)
        record["top_p"] = params.top_p
        record["temperature"] = temperature
        record["inverse_temperature"] = 0.0 if greedy else 1.0 / temperature
        record["min_p_distance"] = -temperature * math.log(params.min_p) if params.min_p else math.inf
        share = (1.0 - params.top_p) / self._vocab
        record["share_distance"] = -temperature * math.log(share) if share else math.inf
        record["wanted"] = -1 if params.logprobs is None else params.logprobs
        record["repetition"] = params.repetition_penalty
        record["frequency"] = params.frequency_penalty
        record["presence"] = params.presence_penalty
        return record

    def _pack_constraints(self) -> None:
        """Which rows have a mask, and where it will lie."""
        self._constraints = []
        self._rows["mask"] = 0
        for i, state in enumerate(self._states):
            if state is not None and state.constraint is not None:
                self._rows["mask"][i] = self._at["masks"] + 4 * self._words * len(self._constraints)
                self._constraints.append(state.constraint)

    def _pack_entries(self) -> None:
        """The biases and the tokens seen, of every row that has any, one row after the other."""
        places = self._touched
        touched = [state.touched() for i in places if (state := self._states[i]) is not None]
        sizes = np.array([(len(bias_ids), len(ids)) for bias_ids, _, ids, _ in touched])
        ends = sizes.sum(axis=1).cumsum()
        rows, total = self._rows, int(ends[-1])
        rows["bias_count"][places], rows["seen_count"][places] = sizes.T
        if total == 0:
            return
        entries = self._room_for(total)
        ids = np.concatenate([part for bias_ids, _, seen, _ in touched for part in (bias_ids, seen)])
        if ids.min() < 0:
            raise ValueError(f"penalties: got id {ids.min()}; must be a token's, and an image's are none")
        values = [part for _, biases, _, counts in touched for part in (biases, counts)]
        entries["id"][:total] = ids
        entries["value"][:total] = np.concatenate(values)
        begins = (ends - sizes.sum(axis=1)).astype(np.uint64)
        rows["entries"][places] = np.uint64(self._entries_address()) + np.uint64(8) * begins
        rows["raw"][places] = np.uint64(self._raw_address()) + np.uint64(4) * begins
        self._entries_used = total

    def _room_for(self, total: int) -> NDArray[Any]:
        if self._host_entries is None or self._host_entries.size < 8 * total:
            self._free_entries()
            room = max(_FIRST_ENTRIES, 1 << (total - 1).bit_length())
            self._host_entries = self._device.allocate_host(8 * room)
            self._entries = self._device.allocate(8 * room, "the sampler's biases and penalties")
            self._raw = self._device.allocate(4 * room, "the sampler's biases and penalties")
        return self._host_entries.array.view([("id", "<i4"), ("value", "<f4")])

    def _entries_address(self) -> int:
        return 0 if self._entries is None else self._entries.address

    def _raw_address(self) -> int:
        return 0 if self._raw is None else self._raw.address

    def _free_entries(self) -> None:
        for buffer in (self._host_entries, self._entries, self._raw):
            if buffer is not None:
                buffer.free()
        self._host_entries = self._entries = self._raw = None
