"""The `wicore` command: help, exit codes, settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from wicore.cli import COMMANDS, main
from wicore.errors import CheckpointError, ConfigError, EngineError, InvalidRequest, QueueFull, WicoreError
from wicore.exit_codes import ExitCode, exit_code


def test_help_lists_commands_examples_and_exit_codes() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == ExitCode.OK
    for word in [*COMMANDS, "Examples:", "Exit codes:", *(code.name.lower() for code in ExitCode)]:
        assert word in result.output


def test_help_imports_none_of_the_heavy_libraries() -> None:
    probe = (
        "import sys\nfrom wicore.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('pydantic', 'httpx', 'numpy', 'redis', 'yaml') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_listed_explains_itself(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == ExitCode.OK
    assert "Usage:" in result.output


def test_an_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(main, ["serve"])
    assert result.exit_code == ExitCode.USAGE
    assert "No such command 'serve'" in result.output


@pytest.mark.parametrize(
    ("err", "code"),
    [
        (ConfigError("x"), ExitCode.CONFIG),
        (CheckpointError("x"), ExitCode.CONFIG),
        (QueueFull("x"), ExitCode.UNAVAILABLE),
        (InvalidRequest("x"), ExitCode.REFUSED),
        (EngineError("x"), ExitCode.INTERNAL),
    ],
)
def test_every_error_has_its_exit_code(err: WicoreError, code: ExitCode) -> None:
    assert exit_code(err) is code


def test_an_error_is_one_line_and_a_traceback_only_on_request() -> None:
    environ = {"WICORE_API__PROT": "1"}
    result = CliRunner().invoke(main, ["config", "show"], env=environ)
    assert result.exit_code == ExitCode.CONFIG
    assert result.output == "error: WICORE_API__PROT: unknown setting; did you mean WICORE_API__PORT?\n"
    assert isinstance(
        CliRunner().invoke(main, ["--debug", "config", "show"], env=environ).exception, ConfigError
    )


def test_config_show_names_each_source_and_masks_passwords(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("api: {port: 81}\n")
    environ = {"WICORE_REDIS__URL": "redis://me:secret@there/0"}
    result = CliRunner().invoke(main, ["config", "show", "--config", str(path)], env=environ)
    assert f"  port: 81  # {path}\n" in result.output
    assert "  url: redis://me:***@there/0  # the environment\n" in result.output
    assert "  host: 127.0.0.1  # default\n" in result.output
    assert yaml.safe_load(result.output)["queue"]["lease_s"] == 20.0


def test_config_defaults_is_a_settings_file() -> None:
    assert CliRunner().invoke(main, ["config", "defaults"]).output.startswith("# Every setting")


def test_a_worker_without_redis_says_what_to_set() -> None:
    result = CliRunner().invoke(main, ["worker"], env={"WICORE_REDIS__URL": ""})
    assert result.exit_code == ExitCode.CONFIG
    assert "WICORE_REDIS__URL" in result.output


def test_the_worker_takes_the_place_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("redis: {url: 'redis://there'}\n")
    calls: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda program, argv, environ: calls.append((argv, environ)))
    assert CliRunner().invoke(main, ["worker", "--config", str(path)]).exit_code == ExitCode.OK
    [(argv, environ)] = calls
    assert argv == [sys.executable, "-m", "workers.gpu"]
    assert environ["WICORE_CONFIG"] == str(path)
