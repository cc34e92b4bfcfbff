"""Steps that follow copies of KV blocks layer by layer, on an emulated device that copies late."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.engines import FIXTURES, rows
from tests.gpu_engines import engine_on
from tests.late_device import LateDevice
from wicore.engine.base import StepPlan
from wicore.gemma3.checkpoint import open_checkpoint

PROMPT = np.random.default_rng(3).integers(5, 500, 120).astype(np.int32)
PREFIX = 96


class Restored:
    """An engine whose first sequence has its prefix in host memory, and is to go on from there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("wicore.engine.tensorrt.copies._LAYERED_BYTES", 1)
        self.device = LateDevice()
        self.engine = engine = engine_on(self.device, open_checkpoint(FIXTURES / "tiny"))
        first, [self.row, self.other] = rows(engine, 3, 160)[0], rows(engine, 3, 160)[1:]
        engine.step(StepPlan((first.input(PROMPT[:PREFIX]),)))
        self.tickets = []
        for pool in ("window", "global"):
            memory, blocks = engine.host_memory(pool, 8), PREFIX // 16
            slots = [memory[slot] for slot in (5, 0, 1, 7, 3, 2)]
            engine.copy_out(pool, first.blocks[:blocks].tolist(), slots).wait()
            self.tickets.append(engine.copy_in(pool, slots, self.row.blocks[:blocks].tolist()))
        self.row.start = first.start = PREFIX
        self.first = first
        self.device.waits.clear()

    def token(self, row, count: int, arriving=(), company=()) -> int:
        asked = replace(row.input(PROMPT[PREFIX : PREFIX + count], sample=True), arriving=arriving)
        output = self.engine.step(StepPlan((*company, asked))).outputs[row.key]
        return output.token.id

    def best(self, row, count: int) -> int:
        tokens = PROMPT[row.start : row.start + count]
        return int(self.engine.logits(StepPlan((row.input(tokens),)))[row.key][-1].argmax())


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch):
    found = Restored(monkeypatch)
    yield found
    found.engine.close()


def test_each_layer_of_a_prompt_waits_for_its_own_part_of_the_blocks_alone(restored) -> None:
    assert not any(ticket.done() for ticket in restored.tickets)
    token = restored.token(restored.row, 24, restored.tickets)
    # Five window layers, the global one, for which those of the other two are made too, and these.
    assert restored.device.waits == [1, 1, 1, 1, 1, 3]
    assert all(ticket.done() for ticket in restored.tickets)
    assert token == restored.best(restored.first, 24)


def test_a_decode_step_waits_for_the_whole_of_them(restored) -> None:
    token = restored.token(restored.row, 1, restored.tickets)
    config = open_checkpoint(FIXTURES / "tiny").config
    assert sum(restored.device.waits) == config.layers
    assert token == restored.best(restored.first, 1)


def test_what_steps_do_not_follow_is_not_waited_for(restored) -> None:
    restored.other.start = 0
    asked = restored.other.input(PROMPT[:PREFIX], sample=True)
    restored.engine.step(StepPlan((asked,)))
    assert restored.device.waits == []
    assert not any(ticket.done() for ticket in restored.tickets)


def test_a_step_that_does_not_name_its_copies_reads_what_was_there_before(restored) -> None:
    """What the other tests would miss if nothing were late."""
    logits = restored.engine.logits(StepPlan((restored.row.input(PROMPT[PREFIX:]),)))[restored.row.key]
    for ticket in restored.tickets:
        ticket.wait()
    again = restored.engine.logits(StepPlan((restored.row.input(PROMPT[PREFIX:]),)))[restored.row.key]
    assert not np.array_equal(logits, again)


def test_sequences_beside_it_are_undisturbed(restored) -> None:
    restored.other.start = 0
    company = restored.other.input(PROMPT[:40], sample=True)
    asked = replace(restored.row.input(PROMPT[PREFIX:], sample=True), arriving=restored.tickets)
    outputs = restored.engine.step(StepPlan((company, asked))).outputs
    assert outputs[restored.row.key].token.id == restored.best(restored.first, 24)
    assert outputs[restored.other.key].token.id == restored.best(restored.other, 40)
