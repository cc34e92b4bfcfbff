"""Drawing tokens from logits.

A row goes through, in this order (Hugging Face's and vLLM's): logit bias, repetition penalty, frequency
and presence penalties, the constraint's mask, temperature, top-k, top-p, min-p, draw. Top-p weighs the
tokens that top-k left; min-p compares with the likeliest token. Log-probabilities are the log-softmax of
the raw logits, before any of that, as OpenAI and vLLM report them.

Every filter keeps a prefix of the tokens ordered by (logit descending, id ascending), so the draw is an
inverse CDF over that prefix, and the vocabulary is never sorted: maxima over blocks of the row bound
the prefix from below, and only blocks that reach the bound are looked into. A row without a filter is
drawn by inverse CDF in id order, from block sums.

Randomness is counter-based: one uniform number for each (seed, position), so a resumed sequence goes on
as it would have, whoever computes it. A row's token depends on nothing but the row and its state.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from wicore.errors import EngineError, WicoreError
from wicore.request import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: the reciprocal would leave float32's useful range."""
_BLOCK = 1024
_CANDIDATES = 64
"""Blocks whose maxima bound the first guess at the top-p prefix; it holds at least as many tokens."""
_CHUNK = 65_536
"""Elements worked on at a time: few enough to stay in a core's cache, enough to make Python's share small."""

# --- randomness -----------------------------------------------------------------------------------

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counters: NDArray[np.uint32], keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Philox4x32-10: 128 random bits for each counter and key.

    `counters` is [N, 4], `keys` [N, 2]; returns [N, 4]. Salmon, Moraes, Dror, Shaw: "Parallel random
    numbers: as easy as 1, 2, 3", SC'11; the constants and known answers are Random123's.
    """
    c0, c1, c2, c3 = counters.T.astype(np.uint64)
    k0, k1 = keys.T.astype(np.uint64)
    for turn in range(10):
        high = (k0 + np.uint64(turn * _WEYL[0])) & _LOW
        low = (k1 + np.uint64(turn * _WEYL[1])) & _LOW
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ high, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ low, p0 & _LOW
    return np.stack((c0, c1, c2, c3), axis=1).astype(np.uint32)


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position), with 53 random bits.

    The key is the seed modulo 2**64, low word first; the counter is (position, position >> 32, 0, 0); the
    number is the first two output words, the second the more significant, shifted right by 11.
    """
    words = np.zeros((len(seeds), 6), np.uint64)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        words[row] = (position & 0xFFFFFFFF, position >> 32, 0, 0, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    bits = philox(words[:, :4].astype(np.uint32), words[:, 4:].astype(np.uint32)).astype(np.uint64)
    numbers: NDArray[np.uint64] = (bits[:, 1] << _SHIFT | bits[:, 0]) >> np.uint64(11)
    return numbers.astype(np.float64) * 2.0**-53


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides the output token at `position` of a sequence seeded `seed`."""
    return float(uniforms((seed,), (position,))[0])


def seed_of_job(job_id: str) -> int:
    """The seed of a job whose client gave none: the same for every attempt."""
    return int.from_bytes(hashlib.blake2b(job_id.encode(), digest_size=8).digest(), "little", signed=True)


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index` of a job with n > 1; choice 0 has the job's own."""
    if index == 0:
        return seed
    text = f"{seed}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


# --- one sequence's state -------------------------------------------------------------------------


@dataclass(slots=True)
class SampledToken:
    """A token drawn for one sequence; not to be changed.

    `logprob` is None when the sequence asked for no logprobs; `top` are the likeliest alternatives,
    (id, logprob), likeliest first, as many as were asked for.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Constraint(Protocol):
    """Which tokens may come next in one sequence.

    Attributes:
        complete: nothing more may come: the text is whole without a token that says so.
        error: why the sequence cannot go on, if it cannot; then only tokens that end it are allowed.
    """

    @property
    def complete(self) -> bool: ...

    error: WicoreError | None

    def allowed(self) -> NDArray[np.uint32]:
        """A bitmask of tokens, uint32 [ceil(vocab / 32)]: bit i % 32 of word i // 32 allows token i.

        At least one is set. It stays as it is until `observe`, and is only read. The work is done in the
        first call after `observe`, tens of microseconds as a rule, mostly without the interpreter's lock.
        """

    def observe(self, token: int) -> None:
        """Take `token` as the next one."""


class SamplingState:
    """What drawing the next token of one sequence depends on, besides its logits.

    `position` is the index of the next output token: the number generated so far. `sample` only reads
    the state; whoever takes the token calls `observe` with it, once (the scheduler does, in `apply`).
    A state for a resumed sequence is built from its prompt and the tokens generated before.
    """

    __slots__ = (
        *("_bias_ids", "_bias_values", "_counts", "_ids", "_slots"),
        *("constraint", "params", "penalised", "position", "seed"),
    )

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        prompt: Iterable[int] = (),
        output: Sequence[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        """`constraint` is at its beginning, and observes `output` here; None: any token is allowed. Negative
        ids of the prompt, an image's, are no tokens that a penalty could be for."""
        self.params = params
        self.seed = seed
        self.constraint = constraint
        self.position = 0
        self.penalised = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        """Whether tokens that occurred before are more or less likely for it."""
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self._bias_values = np.fromiter(params.logit_bias.values(), np.float32)
        # Distinct ids seen, in order of appearance, and how often each was generated; amortised growth.
        self._slots: dict[int, int] = {}
        self._ids: NDArray[np.int64] = np.empty(16, np.int64)
        self._counts: NDArray[np.float32] = np.zeros(16, np.float32)
        if params.repetition_penalty != 1.0:
            for token in prompt:
                if token >= 0:
                    self._slot(token)
        for token in output:
            self.observe(token)

    def observe(self, token: int) -> None:
        """Take `token` as the output at `position`, and move on to the next."""
        self.position += 1
        if self.constraint is not None:
            self.constraint.observe(token)
        if self.penalised:
            slot = self._slot(token)
            self._counts[slot] += 1

    def _slot(self, token: int) -> int:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[slot] = token
        return slot

    def touched(
        self,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
        """The ids with a bias and their biases, the ids under penalties and how often each was generated."""
        seen = len(self._slots)
        return self._bias_ids, self._bias_values, self._ids[:seen], self._counts[:seen]

    def adjust(self, row: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Apply bias and penalties to `row` in place.

        Returns the ids changed and their raw logits, by which the caller restores the row; None when
        nothing applies.
        """
        bias_ids, biases, ids, counts = self.touched()
        touched = np.concatenate((bias_ids, ids))
        if not len(touched):
            return None
        raw = row[touched]
        row[bias_ids] += biases
        values = row[ids]
        penalty = np.float32(self.params.repetition_penalty)
        values = np.where(values > 0, values / penalty, values * penalty)
        values -= np.float32(self.params.frequency_penalty) * counts
        values -= np.float32(self.params.presence_penalty) * (counts > 0)
        row[ids] = values
        return touched, raw


# --- drawing --------------------------------------------------------------------------------------


def sample(
    logits: NDArray[np.float32], states: Sequence[SamplingState], executor: Executor | None = None
) -> list[SampledToken]:
    """Draw one token for each row of `logits`, float32 [R, V], by the state of the same index.

    States are only read. Bias and penalties are written into `logits` during the call and undone before
    it returns. With an `executor` (threads) the rows are shared out between it and the caller; the
    tokens are the same. -inf bans a token. A row whose state has a constraint takes one of the tokens that
    it allows. Raises EngineError naming the row when a row has a NaN or
    +inf, or nothing but -inf, and ValueError when the shapes disagree.
    """
    if logits.ndim != 2 or len(logits) != len(states):
        raise ValueError(f"logits: got shape {logits.shape} for {len(states)} states; must be [R, V]")
    logits = np.require(logits, np.float32, ["C", "W"])
    randoms = [0.0] * len(states)
    drawn = [i for i, state in enumerate(states) if state.params.temperature >= GREEDY_BELOW]
    if drawn:
        numbers = uniforms([states[i].seed for i in drawn], [states[i].position for i in drawn])
        for i, number in zip(drawn, numbers.tolist(), strict=True):
            randoms[i] = number

    def rows(first: int, step: int) -> list[SampledToken]:
        return [_sample_row(i, logits[i], states[i], randoms[i]) for i in range(first, len(states), step)]

    if executor is None or len(states) < 2:
        return rows(0, 1)
    odd = executor.submit(rows, 1, 2)
    tokens: list[SampledToken] = [None] * len(states)  # type: ignore[list-item]
    try:
        tokens[0::2] = rows(0, 2)
    finally:
        tokens[1::2] = odd.result()
    return tokens


def unusable_logits(index: int, peak: float) -> EngineError:
    """What is raised for a row whose maximum is no number."""
    return EngineError(
        f"logits of row {index} are not usable: their maximum is {peak}; the engine computed"
        " NaN or overflowed (half precision without scaling?)"
    )


def _sample_row(index: int, logits: NDArray[np.float32], state: SamplingState, random: float) -> SampledToken:
    wanted = state.params.logprobs
    log_total = 0.0
    top: tuple[tuple[int, float], ...] = ()
    if wanted is not None:
        raw = _Row(index, logits)
        log_total = raw.peak + math.log(raw.total(1.0))
        top = tuple((int(i), float(logits[i]) - log_total) for i in raw.likeliest(wanted))
    saved = state.adjust(logits)
    try:
        if state.constraint is not None:
            token = _choose_allowed(index, logits, state.constraint.allowed(), state.params, random)
        else:
            row = raw if wanted is not None and saved is None else _Row(index, logits)
            token = row.choose(state.params, random)
    finally:
        if saved is not None:
            logits[saved[0]] = saved[1]
    return SampledToken(token, None if wanted is None else float(logits[token]) - log_total, top)


_BANS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf
).astype(np.float32)
"""What eight bits of a mask add to the logits of their tokens."""


def _choose_allowed(
    index: int,
    logits: NDArray[np.float32],
    allowed: NDArray[np.uint32],
    params: SamplingParams,
    random: float,
) -> int:
    """The token that `random` selects among those allowed. Often they are few: then they are a row."""
    words = np.flatnonzero(allowed)
    if len(words) > _BLOCK // 32:
        return _Row(index, _masked(logits, allowed)).choose(params, random)
    bits = np.flatnonzero(np.unpackbits(allowed[words].view(np.uint8), bitorder="little"))
    ids = words[bits // 32] * 32 + bits % 32
    if not len(ids):
        raise unusable_logits(index, -math.inf)
    return int(ids[_Row(index, logits[ids]).choose(params, random)])


def _masked(logits: NDArray[np.float32], allowed: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The row with -inf where a token is not allowed, in memory that the thread's next call here reuses.

    A table looked up by bytes: a third of the time that a mask of booleans takes.
    """
    octets = allowed.view(np.uint8)
    buffer: NDArray[np.float32] | None = getattr(_thread, "masked", None)
    if buffer is None or len(buffer) != len(octets):
        buffer = _thread.masked = np.empty((len(octets), 8), np.float32)
    np.take(_BANS, octets, axis=0, out=buffer, mode="clip")
    row: NDArray[np.float32] = buffer.reshape(-1)[: len(logits)]
    row += logits
    return row


def _inverse_cdf(cumulative: NDArray[np.float64], random: float) -> int:
    """The first index whose cumulative weight exceeds `random` times the total."""
    index = int(np.searchsorted(cumulative, random * cumulative[-1], side="right"))
    if index < len(cumulative):
        return index
    # Rounding took random * total up to the total itself: the last token that has weight.
    return int(np.searchsorted(cumulative, cumulative[-1], side="left"))


@lru_cache(maxsize=8)
def _block_size(vocab: int) -> int:
    """The largest divisor of `vocab` that is no more than _BLOCK."""
    return next(size for size in range(min(_BLOCK, vocab), 0, -1) if vocab % size == 0)


_thread = threading.local()


def _scratch(height: int, width: int) -> NDArray[np.float32]:
    """Uninitialised float32 [height, width], the thread's own until its next call here.

    Kept because a fresh array of this size is a fresh mapping each time, whose page faults cost more
    than the arithmetic.
    """
    buffer: NDArray[np.float32] | None = getattr(_thread, "buffer", None)
    if buffer is None or len(buffer) < height * width:
        buffer = _thread.buffer = np.empty(max(_CHUNK, height * width), np.float32)
    return buffer[: height * width].reshape(height, width)


class _Row:
    """One row of logits and what has been computed of it."""

    __slots__ = ("_sums", "_temperature", "blocks", "logits", "maxima", "peak")

    def __init__(self, index: int, logits: NDArray[np.float32]) -> None:
        self.logits = logits
        self.blocks = logits.reshape(-1, _block_size(len(logits)))
        self.maxima: NDArray[np.float32] = self.blocks.max(axis=-1)
        self.peak = float(self.maxima.max())
        self._sums: NDArray[np.float64] | None = None
        self._temperature = 0.0
        if not math.isfinite(self.peak):
            raise unusable_logits(index, self.peak)

    def choose(self, params: SamplingParams, random: float) -> int:
        """The token that `random` in [0, 1) selects."""
        if params.temperature < GREEDY_BELOW:
            return self.argmax()
        if params.top_k == 0 and params.top_p == 1.0 and params.min_p == 0.0:
            return self.draw(params.temperature, random)
        ids, weights = self.prefix(params)
        return int(ids[_inverse_cdf(np.cumsum(weights), random)])

    def argmax(self) -> int:
        """The likeliest id; the lowest on a tie."""
        block = int(self.maxima.argmax())
        return block * self.blocks.shape[1] + int(self.blocks[block].argmax())

    def sums(self, temperature: float) -> NDArray[np.float64]:
        """The sum of exp((logit - peak) / temperature) over each block."""
        if self._sums is None or self._temperature != temperature:
            width = self.blocks.shape[1]
            height = max(1, _CHUNK // width)
            sums = np.empty(len(self.blocks), np.float32)
            scratch = _scratch(height, width)
            for first in range(0, len(self.blocks), height):
                part = self.blocks[first : first + height]
                weights = _weights(part, self.peak, temperature, scratch[: len(part)])
                # einsum adds with vector registers along the contiguous axis; add.reduce does not.
                np.einsum("ij->i", weights, out=sums[first : first + height])
            self._sums, self._temperature = sums.astype(np.float64), temperature
        return self._sums

    def total(self, temperature: float) -> float:
        return float(self.sums(temperature).sum())

    def draw(self, temperature: float, random: float) -> int:
        """Inverse CDF over the whole row in id order: first the block, then the token in it."""
        cumulative = np.cumsum(self.sums(temperature))
        block = _inverse_cdf(cumulative, random)
        before = cumulative[block - 1] if block else 0.0
        weights = np.cumsum(_weights(self.blocks[block], self.peak, temperature), dtype=np.float64)
        rest = (random * cumulative[-1] - before) / (cumulative[block] - before)
        return block * self.blocks.shape[1] + _inverse_cdf(weights, min(max(rest, 0.0), 1.0))

    def kth_bound(self, k: int) -> float:
        """A value that at least k logits reach: the k-th largest block maximum."""
        if k > len(self.maxima):
            return float(np.partition(self.logits, -k)[-k]) if k < len(self.logits) else -math.inf
        return float(np.partition(self.maxima, -k)[-k])

    def likeliest(self, k: int) -> NDArray[np.int64]:
        """The ids of the k largest logits, by (logit descending, id ascending)."""
        return self.at_least(self.kth_bound(k))[:k] if k else np.empty(0, np.int64)

    def at_least(self, bound: float) -> NDArray[np.int64]:
        """Ids whose logit reaches `bound`, by (logit descending, id ascending); never a banned one."""
        # One step below, lest rounding to float32 drops a logit that reaches a float64 bound.
        floor = max(np.nextafter(np.float32(bound), np.float32(-np.inf)), np.finfo(np.float32).min)
        candidates = np.flatnonzero(self.maxima >= floor)
        width = self.blocks.shape[1]
        height = max(1, _CHUNK // width)
        found = []
        for first in range(0, len(candidates), height):
            part = candidates[first : first + height]
            values = np.take(self.blocks, part, axis=0, out=_scratch(len(part), width), mode="clip")
            rows, columns = np.divmod(np.flatnonzero(values >= floor), width)
            found.append(part[rows] * width + columns)
        ids = np.concatenate(found) if found else np.empty(0, np.int64)
        return ids[np.argsort(-self.logits[ids], kind="stable")]

    def prefix(self, params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The ids that top-k, top-p and min-p leave, likeliest first, and their unnormalised weights."""
        t = params.temperature
        # Each filter alone bounds the logits it keeps; the cut below is then exact.
        floor = self.peak + t * math.log(params.min_p) if params.min_p else -math.inf
        if params.top_k:
            ids = self.likeliest(params.top_k)
            weights = self.weights_of(ids, t)
            total = float(weights.sum())
        elif params.top_p < 1.0:
            total = self.total(t)
            ids = self.at_least(max(floor, self.kth_bound(min(_CANDIDATES, len(self.maxima)))))
            weights = self.weights_of(ids, t)
            if weights.sum() < params.top_p * total:
                # All logits under this one together weigh less than 1 - top_p of the total.
                share = (1.0 - params.top_p) * total / len(self.logits)
                ids = self.at_least(max(floor, self.peak + t * math.log(share)))
                weights = self.weights_of(ids, t)
        else:
            ids = self.at_least(floor)
            weights = self.weights_of(ids, t)
        keep = len(ids)
        if params.top_p < 1.0:
            keep = min(keep, 1 + int(np.searchsorted(np.cumsum(weights), params.top_p * total, side="left")))
        if params.min_p:
            keep = min(keep, int(np.count_nonzero(weights >= params.min_p)))
        return ids[:keep], weights[:keep]

    def weights_of(self, ids: NDArray[np.int64], temperature: float) -> NDArray[np.float64]:
        return np.exp((self.logits[ids].astype(np.float64) - self.peak) / temperature)


def _weights(
    logits: NDArray[np.float32], peak: float, temperature: float, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """exp((logits - peak) / temperature), float32."""
    weights: NDArray[np.float32] = np.subtract(logits, np.float32(peak), out=out)
    if temperature != 1.0:
        weights *= np.float32(1.0 / temperature)
    np.exp(weights, out=weights)
    return weights
