"""The report on a model: its numbers, and that people and scripts can read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from wicore.commands.model import model as model_commands
from wicore.errors import CheckpointError
from wicore.gemma3.checkpoint import Checkpoint
from wicore.gemma3.config import PUBLISHED
from wicore.gemma3.inspect import human_bytes, inspect, render


def run(*args: str) -> str:
    result = CliRunner().invoke(model_commands, ["inspect", *args], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_memory_of_the_27b_model_is_what_its_shape_says() -> None:
    report = inspect("27b", PUBLISHED["gemma-3-27b"])
    assert report.weights["bfloat16"] == 2 * report.parameters == 2 * 27_009_346_304
    kv = {(entry.context, entry.dtype): entry for entry in report.kv}
    a_position = 2 * 16 * 128 * 2  # K and V, heads, head_dim, bytes of bfloat16
    longest = kv[131_072, "bfloat16"]
    assert longest.all_positions == 62 * 131_072 * a_position
    assert longest.windowed == (10 * 131_072 + 52 * 1024) * a_position


def test_contexts_end_with_the_models_own() -> None:
    report = inspect("270m", PUBLISHED["gemma-3-270m"])
    assert sorted({entry.context for entry in report.kv}) == [1024, 8192, 32_768]


def test_the_text_of_a_checkpoint_names_what_matters(tiny_path: Path, tiny: Checkpoint) -> None:
    text = run(str(tiny_path))
    for part in (
        str(tiny_path),
        "330,304 (32,768 of them the embedding)",
        "8: 1 global, 7 window of 64",
        "4 query heads on 2 KV heads of 32",
        "linear factor 8",
        "BF16",
        tiny.fingerprint[:16],
    ):
        assert part in text
    assert max(len(line) for line in text.splitlines()[1:]) <= 100


def test_a_published_name_needs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WICORE_CACHE", str(tmp_path))
    text = run("gemma-3-27b-it")
    assert text.strip() == render(inspect("gemma-3-27b-it", PUBLISHED["gemma-3-27b"])).strip()
    assert "fingerprint" not in text


def test_scripts_get_json(tiny_path: Path, tiny: Checkpoint) -> None:
    report = json.loads(run(str(tiny_path), "--json"))
    assert report["parameters"] == tiny.config.parameters
    assert report["config"]["layers"] == 8
    assert report["fingerprint"] == tiny.fingerprint


def test_an_unknown_name_and_a_broken_checkpoint_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WICORE_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="no such path or name"):
        run("gemma-4-1t")
    (tmp_path / "models" / "gemma-3-1b").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"expected config\.json"):
        run("gemma-3-1b")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * 2**30 // 2, "1.5 GiB"), (2**52, "4096.0 TiB")],
)
def test_bytes_are_written_in_the_unit_that_fits(count: int, text: str) -> None:
    assert human_bytes(count) == text
