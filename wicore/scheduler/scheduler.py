"""Continuous batching with chunked prefill, admission by free blocks, and preemption by swapping out.

Each step decodes every running sequence that is ready to, then fills the rest of the token budget with
prompt chunks (Orca, OSDI'22, for iteration-level scheduling; Sarathi-Serve, OSDI'24, for chunks beside
decodes). One order decides everything: the rank (level, arrival). Who ranks first is served first, and
who ranks last gives way. Tokens of an image see each other, so a chunk has all that is left of an image, or
ends before it; where the rest of the budget is too small for the next image, those behind may use it.

Admission is by rank, and strict: when the first sequence waiting lacks a slot or blocks, none behind it
is admitted. It may preempt running sequences of a lower level, fewest and last-ranked first, if that is
known to suffice. One exception lets others pass: a sequence is held back while a running one is still
prefilling blocks that it shares and could then match.

When a running sequence cannot get a block, the last-ranked one running is preempted, maybe itself: its
blocks are released, full ones stay cached or go down a tier, and it waits by its rank. Once admitted again
its blocks are raised, it computes what was in no full block, and goes on at the same position with the same
SamplingState.

A sequence admitted with blocks that lie below the device is restoring: it has its slot and its blocks, and
joins the steps when they have arrived, or, where the engine can wait for them layer by layer, when that holds
nobody up. When one does not arrive it waits again, and matches what is left.

Why nothing starves. Take S, first in rank of all sequences present; later arrivals never rank before it.
    Running, S is never preempted: room is made at the cost of those ranked after it, levels below it give
    way, and alone it fits, each of its images too (`add` refuses what does not). The first-ranked running
    sequence is planned in every step, since decodes leave the tokens of an image of the budget (`Limits`,
    `add`), so S finishes in finitely many.
    Waiting, S is admitted before all others, unless held. Meanwhile the first-ranked running sequence
    finishes, then the next; while S lacks room nobody is admitted, so its turn comes. Held, it waits for
    a prefill that, by the same argument, ends; whom that lets pass at S's level does not share what S
    waits for (it would be held too), so it cannot prolong the hold.
Every sequence becomes first: those of its level that arrived earlier are finitely many, and when PATIENCE
later arrivals have been admitted before it, it is raised to the top level, where nobody new precedes it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wicore.engine.base import StepPlan, StepResult
from wicore.errors import EngineError
from wicore.hmt import CacheManager, PrefixMatch
from wicore.scheduler.inputs import prepare, share
from wicore.scheduler.sequence import (
    Limits,
    ScheduledSequence,
    SequenceRequest,
    TokenOut,
    check_images,
    rank,
)

ATTENTION_EVERY = 4
"""Of a decoding sequence the cache is told the attention of every fourth step: a mean over many that changes
little from one to the next, and costs more than all other accounts of a step."""
PATIENCE = 64
"""Later arrivals admitted before a waiting sequence until it is raised to the top level."""


class Scheduler:
    """Plans the steps of one engine. Pure: no clock, no threads; call it from one thread.

    The cycle is `plan`, the step, `catch_up` while it runs, `apply`. `add` and `remove` may come at
    any point in it. When a sequence ends (end token, stop string, length, cancel) is the caller's to decide,
    and to say by `remove`; only past `max_tokens` nothing is ever planned.
    """

    def __init__(self, limits: Limits, cache: CacheManager) -> None:
        self._limits = limits
        self._cache = cache
        self._present: dict[int, ScheduledSequence] = {}
        self._running: list[ScheduledSequence] = []
        """By rank, as is _waiting."""
        self._waiting: list[ScheduledSequence] = []
        self._in_flight: list[ScheduledSequence] | None = None
        self._unprepared: Sequence[ScheduledSequence] = ()
        """Those in flight whose next step `catch_up` is to prepare."""
        self._masses: list[tuple[ScheduledSequence, NDArray[np.float32], int]] = []
        """Attention of the last result that the cache has not been told of, and how many steps it is for."""
        self._steps = 0
        self._moves_wait = False
        """Whether moves may be wanted that were not started."""
        self._taken_in = True
        """Whether the cache has learned what had moved when the last step was planned."""
        self._arrivals = 0
        self.preemptions = 0
        """Since the start."""

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def free_slots(self) -> int:
        """How many more sequences could be taken without making any wait for a slot."""
        return max(0, self._limits.max_batch - len(self._present))

    def waits(self, key: int) -> bool:
        """Whether a sequence is not in the steps: it waits for a slot or blocks, or was preempted. For any
        thread."""
        sequence = self._present.get(key)
        return sequence is not None and not sequence.running

    @property
    def idle(self) -> bool:
        return not self._present

    def add(self, request: SequenceRequest) -> None:
        """Take a sequence; it waits for the next `plan`.

        Raises TooLarge, naming the setting, when it could not run even alone, and ValueError when its
        key is present, its prompt empty or its output complete, or an image does not lie in its prompt.
        """
        if request.key in self._present:
            raise ValueError(f"sequence {request.key} is present already")
        if not request.prompt or len(request.generated) >= request.max_tokens:
            raise ValueError(
                f"sequence {request.key}: needs a prompt (has {len(request.prompt)} tokens) and output to"
                f" come (has {len(request.generated)} of {request.max_tokens})"
            )
        check_images(request, self._limits)
        self._cache.require(len(request.prompt) + request.max_tokens - 1, request.at_once)
        self._arrivals += 1
        sequence = ScheduledSequence(request, self._cache, self._arrivals)
        self._present[request.key] = sequence
        insort(self._waiting, sequence, key=rank)
        self._cache.prefetch(sequence.chain, sequence.positions)

    def remove(self, key: int) -> None:
        """Forget a sequence, finished or cancelled, and free its slot and blocks; idempotent.

        The result of a step in flight for it is dropped.
        """
        sequence = self._present.pop(key, None)
        if sequence is None:
            return
        if self._moves_wait:
            # Before its blocks are free to be moved into: the step in flight may read them.
            self.catch_up()
        (self._running if sequence.running else self._waiting).remove(sequence)
        sequence.running = False
        self._cache.close(key)

    def cached(self, key: int) -> int | None:
        """Tokens that a sequence present did not have to compute when it started; None before that."""
        return self._present[key].cached

    def plan(self) -> StepPlan | None:
        """The next step, with all its blocks reserved; None when there is nothing to compute, or (when the
        cache is `busy`) nothing until blocks have arrived.

        The step is in flight until `apply`; planning another before raises RuntimeError.
        """
        if self._in_flight is not None:
            raise RuntimeError("a step is in flight: apply its result before planning the next")
        # Else nothing depends on it, and it is done while the step runs.
        self._taken_in = self._awaits_moves()
        if self._taken_in:
            self._cache.take_in()
        self._settle()
        preempted = self.preemptions
        unprepared = []
        for sequence in self._running:
            if sequence.prepared is not None:
                sequence.chunk = 1
            elif sequence.pending == 1:
                unprepared.append(sequence)
        for sequence in unprepared:
            if sequence.running and self._cache.covers(sequence.key, sequence.computed + 1):
                sequence.chunk = 1
            else:
                sequence.chunk = self._reserve(sequence, 1)
        if self._waiting and self.preemptions == preempted:
            self._admit()
        self._share_budget()
        planned = [sequence for sequence in self._running if sequence.chunk]
        self._moves_wait = True
        if not planned:
            self.catch_up()
            # Copies that it began may be followed at once.
            return self.plan() if self._settle() else None
        self._in_flight = self._unprepared = planned
        return StepPlan(tuple([share(sequence, self._cache) for sequence in planned]))

    def apply(self, result: StepResult) -> list[TokenOut]:
        """Take over what the step in flight did; returns its tokens in order of rank.

        Raises RuntimeError when no step is in flight, EngineError when the result lacks a sequence.
        """
        if self._in_flight is None:
            raise RuntimeError("no step is in flight: plan one before applying a result")
        self._unprepared = ()
        self.catch_up()
        self._steps += 1
        step, self._in_flight = self._in_flight, None
        outputs, commit = result.outputs, self._cache.commit
        tokens, quiet = [], []
        for sequence in step:
            if not sequence.running:
                continue
            key, chunk = sequence.key, sequence.chunk
            output = outputs.get(key)
            computed = sequence.computed + chunk
            if output is None or (output.token is None) == (computed == sequence.chain.length):
                raise EngineError(f"the step's result lacks the output or the token of sequence {key}")
            sequence.computed = computed
            sequence.chunk = 0
            if sequence.prepared is None:
                commit(key, computed)
            else:
                quiet.append(key)
            if chunk > 1 or (self._steps + key) % ATTENTION_EVERY == 0:
                self._masses.append((sequence, output.mass, 1 if chunk > 1 else ATTENTION_EVERY))
            token = output.token
            if token is not None:
                sequence.chain.append(token.id)
                sequence.sampling.observe(token.id)
                sequence.left -= 1
                tokens.append(TokenOut(key, token))
        self._cache.commit_quiet(quiet)
        return tokens

    def catch_up(self) -> None:
        """What `plan` and `apply` have left for while a step runs: start the moves of blocks, tell the cache
        what attention was reported, and prepare the next step. To be called when a step has been started; but
        for the last, done by `apply` at the latest."""
        if self._moves_wait:
            self._moves_wait = False
            if not self._taken_in:
                self._cache.take_in()
            self._cache.start_moves()
        masses, self._masses = self._masses, []
        for sequence, mass, steps in masses:
            if sequence.running:
                self._cache.record(sequence.key, mass, steps)
        unprepared, self._unprepared = self._unprepared, ()
        for sequence in unprepared:
            if sequence.running:
                prepare(sequence, self._cache)

    def ending_soon(self) -> int:
        """How many sequences the step in flight surely ends, because it reaches their `max_tokens`."""
        return sum(
            sequence.left == 1 and sequence.samples and sequence.running for sequence in self._in_flight or ()
        )

    def check(self) -> None:
        """Raise EngineError when blocks or sequences do not add up. O(blocks): for idle moments and tests."""
        self._cache.check()
        listed = {sequence.key for sequence in (*self._running, *self._waiting)}
        if listed != self._present.keys() or len(listed) != len(self._running) + len(self._waiting):
            raise EngineError(
                f"scheduler: {len(self._running)} running + {len(self._waiting)} waiting"
                f" != {len(self._present)} present"
            )

    # --- room -------------------------------------------------------------------------------------

    def _reserve(self, sequence: ScheduledSequence, wanted: int) -> int:
        """Reserve up to `wanted` new positions, at least one or an image's, preempting from the last rank up.

        Returns how many; 0 when that is too few for the next image, and when the sequence itself was
        preempted, now or earlier in this plan.
        """
        if not sequence.running:
            return 0
        key, computed, least = sequence.key, sequence.computed, 1
        pictured = computed < sequence.image_end
        if pictured:
            wanted, least = sequence.uncut(wanted), sequence.least
        if wanted < least or not self._cache.make_room(key, computed + wanted, computed + least):
            return 0
        while self._cache.room(key) < computed + least:
            last = self._running[-1]
            self._preempt(last)
            if last is sequence:
                return 0
        count = min(wanted, self._cache.room(key) - computed)
        if pictured:
            count = sequence.uncut(count)
        self._cache.reserve(key, computed + count)
        return count

    def _preempt(self, sequence: ScheduledSequence) -> None:
        self._cache.close(sequence.key)
        self._running.remove(sequence)
        self._wait_again(sequence)
        self.preemptions += 1

    def _wait_again(self, sequence: ScheduledSequence) -> None:
        sequence.computed, sequence.chunk, sequence.prepared = 0, 0, None
        sequence.running = sequence.restoring = False
        insort(self._waiting, sequence, key=rank)

    def _awaits_moves(self) -> bool:
        """Whether a plan may depend on what moves have brought, or made room for."""
        return (
            bool(self._waiting)
            or self._cache.scarce(2 * len(self._running))
            or any(sequence.restoring for sequence in self._running)
        )

    def _settle(self) -> bool:
        """Let sequences whose blocks have arrived join the steps, and those whose have not match anew.

        Returns whether any joined.
        """
        joined = False
        for sequence in [other for other in self._running if other.restoring]:
            alone = all(other.restoring for other in self._running)
            if self._cache.restoring(sequence.key, alone=alone, budget=self._limits.prompt_budget):
                continue
            computed = self._cache.computed(sequence.key)
            if computed is None:
                self._cache.close(sequence.key)
                self._running.remove(sequence)
                self._wait_again(sequence)
            else:
                sequence.restoring = False
                sequence.arriving = bool(self._cache.arriving(sequence.key))
                self._begin_at(sequence, computed)
                joined = True
        return joined

    # --- admission --------------------------------------------------------------------------------

    def _admit(self) -> None:
        index = 0
        while index < len(self._waiting):
            sequence = self._waiting[index]
            if len(self._running) >= self._limits.max_batch and self._running[-1].level <= sequence.level:
                return
            match = self._cache.match(sequence.chain, sequence.positions)
            if self._held(sequence, match):
                index += 1
                continue
            victims = self._victims(sequence, match)
            if victims is None:
                return
            # Closing takes no block, so the match holds; victims rank after `sequence`, so `index` does.
            for victim in victims:
                self._preempt(victim)
            if victims and not self._fits(sequence, match):
                return  # until what the victims leave has been saved
            del self._waiting[index]
            self._start(sequence, match)
            self._age(sequence)

    def _start(self, sequence: ScheduledSequence, match: PrefixMatch) -> None:
        key = sequence.key
        self._cache.open(key, sequence.chain, match, len(sequence.chain), sequence.positions)
        sequence.restoring = self._cache.restoring(key)
        if not sequence.restoring:
            self._begin_at(sequence, self._cache.computed(key) or 0)
        sequence.running = True
        insort(self._running, sequence, key=rank)

    @staticmethod
    def _begin_at(sequence: ScheduledSequence, computed: int) -> None:
        sequence.computed = computed
        if sequence.cached is None:
            sequence.cached = computed

    def _held(self, sequence: ScheduledSequence, match: PrefixMatch) -> bool:
        """Whether a running prefill is about to make a longer match possible."""
        if not self._cache.prefix_cache:
            return False
        size = self._cache.layout.block_tokens
        usable = (len(sequence.chain) - 1) // size * size
        for other in self._running:
            if other.pending > 1 or other.restoring:
                shared = min(other.chain.shared_blocks(sequence.chain) * size, usable)
                # What another is bringing up would be brought up twice.
                have = match.resident if other.restoring else match.blocks
                if shared > have * size and other.computed < shared:
                    return True
        return False

    def _fits(
        self, sequence: ScheduledSequence, match: PrefixMatch, closing: Sequence[ScheduledSequence] = ()
    ) -> bool:
        """Whether it could be admitted, those `closing` gone.

        Blocks are asked for its tokens and one more block of output, and one for each running sequence,
        lest the next growth undo the admission.
        """
        positions = min(len(sequence.chain) + self._cache.layout.block_tokens, sequence.positions)
        staying = len(self._running) - len(closing)
        return staying < self._limits.max_batch and self._cache.can_open(
            match,
            positions,
            at_once=sequence.at_once,
            long=self._cache.is_long(sequence.positions),
            spare=staying,
            closing=[victim.key for victim in closing],
        )

    def _victims(self, sequence: ScheduledSequence, match: PrefixMatch) -> list[ScheduledSequence] | None:
        """Whom to preempt so that `sequence` gets a slot and blocks; [] for nobody, None when that fails."""
        below = [other for other in self._running if other.level > sequence.level]
        for count in range(len(below) + 1):
            victims = below[len(below) - count :]
            if self._fits(sequence, match, victims):
                return victims
        return None

    def _age(self, admitted: ScheduledSequence) -> None:
        raised = False
        for sequence in self._waiting:
            if sequence.arrival < admitted.arrival:
                sequence.passed += 1
                if sequence.passed >= PATIENCE and sequence.level:
                    sequence.level, raised = 0, True
        if raised:
            self._waiting.sort(key=rank)

    # --- the step ---------------------------------------------------------------------------------

    def _share_budget(self) -> None:
        """Give prompt chunks, by rank, what decodes leave of the token budget."""
        prompts = [other for other in self._running if not other.chunk and other.pending]
        if not prompts:
            return
        budget = self._limits.token_budget - sum(sequence.chunk for sequence in self._running)
        chunks = self._limits.prompt_chunks
        for sequence in prompts:
            if not budget or not chunks:
                return
            sequence.chunk = self._reserve(sequence, min(budget, sequence.pending))
            budget -= sequence.chunk
            chunks -= sequence.chunk > 0
