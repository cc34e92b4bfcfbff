"""`wicore bench kv`: a small run of each measurement."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from wicore.cli import main
from wicore.exit_codes import ExitCode
from wicore.hmt.policy import POLICIES

SMALL = ("--blocks", "4300", "--operations", "3000", "--sequences", "2")
HARDWARE = {"cpu", "cores", "python", "date"}


@pytest.fixture(scope="module")
def lines() -> dict[str, dict[str, object]]:
    """By measurement."""
    result = CliRunner().invoke(main, ["bench", "kv", *SMALL, "--policy", "a2cr"], catch_exceptions=False)
    assert result.exit_code == ExitCode.OK
    assert "a2cr: the tiers are filled" in result.stderr
    return {line["measurement"]: line for line in map(json.loads, result.stdout.splitlines())}


def test_the_pool_line_tells_the_time_of_each_kind_of_operation_and_the_memory(lines) -> None:
    line = lines["kv pool"]
    assert line.keys() >= {"policy", "blocks", "operations", "hit_rate", *HARDWARE}
    assert (line["policy"], line["blocks"]) == ("a2cr", 4300)
    assert 3000 <= line["operations"] < 3600
    kinds = line["microseconds_by_kind"]
    assert kinds.keys() == {"lookup", "acquire", "allocate", "register", "record", "release"}
    assert min(kinds.values()) < line["microseconds"] < max(kinds.values())
    assert 50 < line["bytes_a_block"] < 2000


def test_the_manager_line_tells_the_time_a_block_of_each_stage(lines) -> None:
    line = lines["kv manager"]
    assert line.keys() >= {"policy", "sequences", "blocks_a_sequence", "hit_rate", *HARDWARE}
    stages = line["microseconds_a_block"]
    assert stages.keys() == {"hash", "match", "open", "reserve", "commit", "move", "close"}
    assert all(value > 0 for value in stages.values())


def test_every_policy_is_measured_unless_some_are_named() -> None:
    result = CliRunner().invoke(main, ["bench", "kv", *SMALL[:4], "--sequences", "1"], catch_exceptions=False)
    named = [json.loads(line)["policy"] for line in result.stdout.splitlines()]
    assert named == [name for name in POLICIES for _ in range(2)]


def test_a_pool_too_small_for_the_mix_is_refused_by_name() -> None:
    result = CliRunner().invoke(main, ["bench", "kv", "--blocks", "100"])
    assert result.exit_code == ExitCode.USAGE
    assert "--blocks: 100" in result.stderr
