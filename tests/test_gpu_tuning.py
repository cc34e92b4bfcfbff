"""What is measured at the start: the fastest way is taken, kept, and found again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.emulation import EmulatedDevice
from tests.engines import FIXTURES, rows
from tests.gpu_engines import SMALL_TILE, emulated_engine
from wicore.engine.base import StepPlan
from wicore.engine.tensorrt import build
from wicore.engine.tensorrt.autotune import Autotuner, Choices, rows_to_measure
from wicore.engine.tensorrt.limits import Limits
from wicore.engine.tensorrt.matmuls import Choice, Matmuls, layer_products
from wicore.engine.tensorrt.skinny import Product, Setting, SkinnyMatmul
from wicore.errors import EngineError
from wicore.gemma3.checkpoint import open_checkpoint

CONFIG = open_checkpoint(FIXTURES / "tiny").config
QKV = layer_products(CONFIG)[0]


class Measured(Autotuner):
    """Finds each way faster than the one before, without a clock."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.turn = 0

    def _ms(self, work, *, overlapping=True) -> float:
        work()
        self.turn += 1
        return 1 / self.turn


def two_ways(matmuls: Matmuls, rows: int, product: Product) -> list[Setting]:
    return SkinnyMatmul.candidates(matmuls.skinny, min(rows, 64), product)[: 2 if rows == 8 else 1]


@pytest.mark.thorough
def test_the_fastest_way_found_is_used(monkeypatch) -> None:
    monkeypatch.setattr("wicore.engine.tensorrt.engine.Autotuner", Measured)
    monkeypatch.setattr(Matmuls, "candidates", two_ways)
    found = []
    engine = emulated_engine(
        FIXTURES / "tiny",
        max_batch=8,
        token_budget=16,
        tune=lambda measure: found.append(measure()) or found[0],
    )
    [choices] = found
    ways = {choice.rows: choice.way for choice in choices.products[QKV]}
    assert list(ways) == [8, 16, 32, 64]
    second = engine._matmuls.skinny.candidates(8, QKV)[1]
    assert ways[8] == second
    assert engine._matmuls._chosen(5, QKV) == second
    [row] = rows(engine, 1, 60)
    assert engine.step(StepPlan((row.input([5, 6, 7], sample=True),))).outputs[0].token is not None


def test_choices_survive_being_kept_as_json() -> None:
    choices = Choices(
        {QKV: [Choice(8, Setting(1, 4, ahead=2)), Choice(512, SMALL_TILE)]}, {512: True, 2048: False}
    )
    again = Choices.from_json(json.loads(json.dumps(choices.as_json())))
    assert again == choices


@pytest.mark.parametrize("damage", [{"products": [{}]}, {"segments": {"x": 1}, "products": []}, {}])
def test_damaged_choices_are_refused(damage) -> None:
    with pytest.raises(EngineError, match="damaged"):
        Choices.from_json(damage)


def test_segments_are_for_the_numbers_of_rows_that_they_are_faster_at() -> None:
    choices = Choices(segments={64: False, 512: True, 2048: False})
    assert [choices.segments_for(rows) for rows in (1, 64, 65, 512, 513, 4096)] == [
        *(False, False, True, True, False, False)
    ]
    assert not Choices().segments_for(512)


def test_what_was_measured_once_is_not_measured_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WICORE_CACHE", str(tmp_path))
    device, measured = EmulatedDevice(), []

    def measure() -> Choices:
        measured.append(1)
        return Choices({QKV: [Choice(8, Setting(1, 4))]})

    limits = Limits(512, (1, 2, 4), 100)
    first = build.tuned(device, CONFIG, limits, measure)
    assert build.tuned(device, CONFIG, limits, measure) == first
    assert len(measured) == 1
    build.tuned(EmulatedDevice(sms=8), CONFIG, limits, measure)
    build.tuned(device, CONFIG, Limits(1024, (1, 2, 4), 100), measure)
    assert len(measured) == 3


def test_rows_are_measured_up_to_the_most_that_there_are() -> None:
    assert rows_to_measure(600) == (8, 16, 32, 64, 128, 256, 512, 600)
    assert rows_to_measure(8) == (8,)
