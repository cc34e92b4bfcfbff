"""What a model needs: the figures are those that follow from the published shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from wicore.cli import main
from wicore.exit_codes import ExitCode
from wicore.gemma3.checkpoint import Checkpoint
from wicore.gemma3.config import PUBLISHED
from wicore.gemma3.inspect import KVMemory, human_bytes, inspect, render

KIB, MIB = 1024, 1024**2


def kv(name: str, context: int, dtype: str = "bfloat16") -> KVMemory:
    report = inspect(name, PUBLISHED[name])
    return next(kv for kv in report.kv if (kv.context, kv.dtype) == (context, dtype))


def test_27b_needs_80_kib_a_token_and_416_mib_for_its_windows() -> None:
    for context in (8192, 32_768, 131_072):
        assert kv("gemma-3-27b", context).windowed == context * 80 * KIB + 416 * MIB


def test_27b_at_its_full_context_needs_11_gb_with_windows_and_67_gb_without() -> None:
    full = kv("gemma-3-27b", 131_072)
    assert full.windowed / 1e9 == pytest.approx(11.2, abs=0.05)
    assert full.all_positions / 1e9 == pytest.approx(66.6, abs=0.05)


def test_windows_save_nothing_below_their_length() -> None:
    short = kv("gemma-3-27b", 1024)
    assert short.windowed == short.all_positions


def test_float32_kv_is_twice_that_of_bfloat16() -> None:
    assert kv("gemma-3-4b", 8192, "float32").windowed == 2 * kv("gemma-3-4b", 8192).windowed


def test_weights_are_reckoned_with_their_scales() -> None:
    weights = inspect("gemma-3-270m", PUBLISHED["gemma-3-270m"]).weights
    parameters = 268_098_176
    assert weights == {
        "float32": 4 * parameters,
        "bfloat16": 2 * parameters,
        "int8": parameters * 36 // 32,
        "int4": parameters * 20 // 32,
    }


def test_no_context_beyond_the_models_own_is_listed() -> None:
    contexts = {kv.context for kv in inspect("gemma-3-270m", PUBLISHED["gemma-3-270m"]).kv}
    assert contexts == {1024, 8192, 32_768}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (11_173_625_856, "10.4 GiB")]
)
def test_bytes_are_shown_in_the_largest_unit_that_leaves_one(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_report_of_every_published_model_fits_a_terminal(name: str) -> None:
    text = render(inspect(name, PUBLISHED[name]))
    assert max(map(len, text.splitlines())) <= 100
    for label in ("layers", "parameters", "int8", "windowed", "all positions"):
        assert label in text


def test_the_tower_of_a_model_with_images_is_reported() -> None:
    report = inspect("gemma-3-27b", PUBLISHED["gemma-3-27b"])
    assert report.parameters + report.vision_parameters == 27_432_406_640  # what Hugging Face counts
    text = render(report)
    assert "27 layers of 1,152" in text
    assert "896 x 896 pixels in 4,096 patches, 256 tokens" in text
    assert "vision" not in render(inspect("gemma-3-1b", PUBLISHED["gemma-3-1b"]))


def test_the_command_reports_a_checkpoint_and_how_it_is_stored(tiny_path: Path, tiny: Checkpoint) -> None:
    result = CliRunner().invoke(main, ["model", "inspect", str(tiny_path)])
    assert result.exit_code == ExitCode.OK
    assert "8: 1 global, 7 window of 64" in result.output
    assert f"stored as   BF16\nfingerprint {tiny.fingerprint[:16]}" in result.output


def test_the_command_reports_in_json_for_scripts(tiny_path: Path, tiny: Checkpoint) -> None:
    result = CliRunner().invoke(main, ["model", "inspect", "--json", str(tiny_path)])
    report = json.loads(result.output)
    assert report["parameters"] == tiny.config.parameters
    assert report["config"]["layers"] == 8


def test_the_command_knows_published_models_without_their_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WICORE_CACHE", str(tmp_path))
    result = CliRunner().invoke(main, ["model", "inspect", "gemma-3-27b"])
    assert result.exit_code == ExitCode.OK
    assert "27,009,346,304" in result.output
    assert "stored as" not in result.output


def test_the_command_does_not_pass_a_broken_checkpoint_off_as_the_published_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WICORE_CACHE", str(tmp_path))
    (tmp_path / "models" / "gemma-3-270m").mkdir(parents=True)
    result = CliRunner().invoke(main, ["model", "inspect", "gemma-3-270m"])
    assert result.exit_code == ExitCode.CONFIG
    assert "expected config.json, found an empty folder" in result.output
