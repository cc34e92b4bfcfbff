"""Arrays of decode steps that are kept from one step to the next, beside those of a pass made by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.emulation import EmulatedDevice
from tests.engines import FIXTURES, GREEDY
from tests.gpu_engines import emulated_engine
from wicore.engine.base import EngineInfo, KVLayout, SequenceInput, StepPlan
from wicore.engine.plans import check_plan
from wicore.engine.tensorrt.block_tables import SPARE
from wicore.engine.tensorrt.decode_arrays import DecodeArrays
from wicore.engine.tensorrt.limits import Limits
from wicore.engine.tensorrt.passes import cut
from wicore.sampling import SamplingState

LAYOUT = KVLayout(16, 1, 1, 1, 16, 64, "float16")
VOCABULARY, CONTEXT = 100, 2048
LIMITS = Limits.of(LAYOUT, max_batch=8, token_budget=64, max_context=CONTEXT, invariant=False)
INFO = EngineInfo("x", "x", "x", LAYOUT, 1000, 1000, VOCABULARY, CONTEXT, "x")


def check(sequences: Sequence[SequenceInput]) -> None:
    check_plan(StepPlan(tuple(sequences)), INFO, 1000)


class Growing:
    """A sequence as the scheduler plans it: its tables are the same arrays until they grow or slide."""

    def __init__(self, key: int, position: int, streamed: int = 0) -> None:
        self.key, self.position, self.streamed = key, position, streamed
        self.blocks = np.random.default_rng(key).permutation(1000).astype(np.int32)
        self.state = SamplingState(GREEDY, key)
        self.tables: dict[tuple[int, int], tuple[Any, Any]] = {}

    def next(self, token: int = 5) -> SequenceInput:
        end, first = self.position // 16 + 1, max(0, self.position - 63) // 16
        table, window = self.tables.setdefault(
            (end, first), (self.blocks[:end].copy(), self.blocks[first:end][::-1].copy())
        )
        found = SequenceInput(
            self.key,
            np.array([token], np.int32),
            self.position,
            table,
            window,
            first,
            self.state,
            self.streamed,
        )
        self.position += 1
        return found


def arrays() -> DecodeArrays:
    return DecodeArrays(EmulatedDevice(), LAYOUT, LIMITS, VOCABULARY, CONTEXT)


def seen(target: DecodeArrays, sequences: Sequence[SequenceInput]) -> list[tuple[Any, ...]]:
    """What a kernel reads for every row: its token, position and the blocks that it sees."""
    memory = target._pinned.array.view(np.int32)
    ids, positions, rows, globals_, windows, firsts, streamed, _ = memory[: target._header].reshape(8, -1)
    entries = memory[target._header :]
    found = []
    for row, sequence in enumerate(sequences):
        i, position = rows[row], int(positions[row])
        last, first = position // 16, max(0, position - 63) // 16
        window = windows[i] + first - firsts[i]
        found.append(
            (
                sequence.key,
                int(ids[row]),
                position,
                entries[globals_[i] : globals_[i] + last + 1].tolist(),
                entries[window : window + last + 1 - first].tolist(),
                int(streamed[i]),
            )
        )
    assert (positions[len(sequences) :] == -1).all()
    return found


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=6), st.integers(1, 90), st.data())
def test_arrays_that_are_kept_say_what_those_of_a_pass_say(starts, steps, data) -> None:
    growing = [Growing(key, start, streamed=start // 64) for key, start in enumerate(starts)]
    kept, fresh = arrays(), arrays()
    for _ in range(steps):
        if data.draw(st.integers(0, 20)) == 0 and len(growing) > 1:
            growing.pop(data.draw(st.integers(0, len(growing) - 1)))
        token = data.draw(st.integers(0, VOCABULARY - 1))
        sequences = [one.next((token + one.key) % VOCABULARY) for one in growing]
        if kept.follow(sequences, check) is None:
            kept.begin(sequences)
        [work] = cut(sequences, capacity=64, decode_capacity=LIMITS.samples, invariant=False)
        fresh.fill(work, fresh.tables_of(sequences))
        assert seen(kept, sequences) == seen(fresh, sequences)


def following(count: int = 2) -> tuple[DecodeArrays, list[Growing]]:
    """Arrays of a step, and what comes next."""
    growing, kept = [Growing(key, 100 + key) for key in range(count)], arrays()
    kept.begin([one.next() for one in growing])
    return kept, growing


def test_steps_follow_until_a_table_has_taken_its_spare_entries() -> None:
    kept, growing = following()
    followed = 0
    while kept.follow([one.next() for one in growing], check) is not None:
        followed += 1
    assert SPARE * 16 <= followed < (SPARE + 1) * 16


def test_a_step_of_other_sequences_does_not_follow() -> None:
    kept, growing = following()
    growing[1].key = 7
    assert kept.follow([one.next() for one in growing], check) is None


def test_a_step_that_is_further_than_a_token_does_not_follow() -> None:
    kept, growing = following()
    growing[0].position += 1
    assert kept.follow([one.next() for one in growing], check) is None


def test_a_chunk_does_not_follow() -> None:
    kept, growing = following()
    sequences = [one.next() for one in growing]
    sequences[1].tokens = np.array([1, 2], np.int32)
    assert kept.follow(sequences, check) is None


def test_a_token_outside_of_the_vocabulary_is_left_to_the_check_of_whole_plans() -> None:
    kept, growing = following()
    assert kept.follow([one.next(VOCABULARY) for one in growing], check) is None


def test_tables_that_do_not_reach_the_new_position_are_left_to_the_check_of_whole_plans() -> None:
    kept, growing = following()
    before = [one.next() for one in growing]
    assert kept.follow(before, check) is not None
    for _ in range(20):
        sequences = [one.next() for one in growing]
        for old, new in zip(before, sequences, strict=True):
            new.global_table, new.window_table, new.window_first = (
                old.global_table,
                old.window_table,
                old.window_first,
            )
        if kept.follow(sequences, check) is None:
            assert sequences[0].start == 112 or sequences[1].start == 112
            return
    pytest.fail("went on past the end of a table")


def test_a_table_that_has_changed_is_checked() -> None:
    kept, growing = following()
    sequences = [one.next() for one in growing]
    sequences[1].global_table = sequences[1].global_table.copy()
    sequences[1].global_table[0] = INFO.global_blocks
    with pytest.raises(ValueError, match=r"sequence 1: a block id is not in 0\.\.999"):
        kept.follow(sequences, check)
    assert kept.follow(sequences, lambda sequences: None) is not None  # nothing was taken over


def test_steps_that_follow_each_other_give_the_tokens_and_mass_of_steps_that_do_not() -> None:
    engine = emulated_engine(FIXTURES / "tiny", max_batch=4)
    results = []
    for interrupted in (False, True):
        growing = [Growing(key, 0) for key in range(3)]
        for one in growing:
            one.blocks = np.arange(one.key, 256, 3, dtype=np.int32)
        tokens, steps = [7, 8, 9], []
        for _ in range(24):
            plan = StepPlan(tuple(one.next(token) for one, token in zip(growing, tokens, strict=True)))
            if interrupted:
                engine._runner._arrays.tables_of(())
            outputs = engine.step(plan).outputs
            tokens = [outputs[one.key].token.id for one in growing]
            steps.append((tokens, [outputs[one.key].mass.tolist() for one in growing]))
        results.append(steps)
    engine.close()
    assert results[0] == results[1]
