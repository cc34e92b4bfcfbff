"""Plans on disk: found by what they depend on, checked when read, built when missing.

A folder, by default beside the models, holds

    <digest>.plan           one plan: a header with its key and checksum, then what TensorRT serialised
    timing-<digest>.cache   what TensorRT measured while it built, so that it need not again
    tuning-<digest>.json    what the engine measured: which kernel is fastest where

A plan depends on library and version, compute capability, network, types and shapes. All of that is its
key; the file's name is the key's digest. A file that is damaged, or whose key is another, counts as absent.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wicore.engine.tensorrt import networks, plan_kinds
from wicore.engine.tensorrt.networks import KINDS, HalfType
from wicore.engine.tensorrt.plan_kinds import AnyKind, AnyShape
from wicore.engine.tensorrt.trt_api import Backend, BackendName, BuildOptions, build, find_card, load_backend
from wicore.errors import EngineError

_LOG = logging.getLogger(__name__)
_MAGIC = b"WICOREPLAN1\n"
_HEADER = struct.Struct("<I32sQ")
"""After the magic: bytes of the key's JSON, SHA-256 of the plan, bytes of the plan; then both."""
_MAX_KEY_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class PlanKey:
    """All that a plan depends on."""

    backend: BackendName
    version: str
    """Of the library."""
    capability: str
    """Compute capability it runs on, e.g. "9.0"."""
    kind: AnyKind
    half: HalfType
    rows: int
    """Most rows of a run, and those it is fastest at."""
    shape: AnyShape
    revision: int = networks.REVISION
    """Of the network code."""

    def text(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> PlanKey:
        """From `text()`. Raises ValueError or TypeError for anything else."""
        data = json.loads(text)
        return cls(**{**data, "shape": plan_kinds.shape_from(data["kind"], data["shape"])})

    @property
    def digest(self) -> str:
        return _digest(self.text())

    @property
    def label(self) -> str:
        return f"{self.kind} segment, {self.rows} rows"


def plan_keys(
    backend: Backend,
    capability: str,
    shape: AnyShape,
    buckets: Sequence[int],
    *,
    half: HalfType = "float16",
    kinds: Sequence[AnyKind] = KINDS,
) -> list[PlanKey]:
    """The keys of a model's plans: every kind at every bucket of rows that it is built for."""
    return [
        PlanKey(backend.name, backend.version, capability, kind, half, rows, shape)
        for kind in kinds
        for rows in plan_kinds.rows_of(kind, shape, buckets)
    ]


def parse_buckets(text: str) -> tuple[int, ...]:
    """ "64,512" (the form of `engine.plan_rows`) as numbers, ascending."""
    return tuple(sorted({int(part) for part in text.split(",")}))


def useful_buckets(buckets: Sequence[int], most_rows: int) -> tuple[int, ...]:
    """Those that steps of up to `most_rows` rows use; larger ones would only take memory."""
    ascending = sorted(set(buckets))
    below = [rows for rows in ascending if rows < most_rows]
    return tuple(ascending[: len(below) + 1])


def plans_folder() -> Path:
    """$WICORE_CACHE/plans, else $XDG_CACHE_HOME/wicore/plans, else ~/.cache/wicore/plans."""
    # Imported here: where there are no checkpoints (a build machine), their libraries need not be.
    from wicore.gemma3.checkpoint import models_folder

    return models_folder().parent / "plans"


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """One file of the folder."""

    path: Path
    key: PlanKey | None
    """None when the file is damaged or of another WiCore."""
    nbytes: int
    modified: float
    """Seconds since the epoch."""
    problem: str | None
    """What is wrong with it."""


class PlanCache:
    """The folder of plans. Safe for many processes at once: a file appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: PlanKey) -> Path:
        return self.folder / f"{key.digest}.plan"

    def load(self, key: PlanKey) -> bytes | None:
        """The plan; None when it is absent, damaged or another's, which is logged."""
        path = self.path(key)
        try:
            found, plan = _parse(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as err:
            _LOG.warning("%s: %s; it will be built again", path, err)
            return None
        if found != key.text():
            _LOG.warning("%s: is the plan of another key; it will be built again", path)
            return None
        return plan

    def store(self, key: PlanKey, plan: bytes) -> Path:
        """Put a plan in its file. Raises EngineError when the folder cannot be written."""
        text = key.text().encode()
        header = _HEADER.pack(len(text), hashlib.sha256(plan).digest(), len(plan))
        path = self.path(key)
        _write(path, _MAGIC + header + text + plan)
        return path

    def remove(self, keys: Sequence[PlanKey]) -> None:
        """Forget plans, so that they are built again."""
        for key in keys:
            self.path(key).unlink(missing_ok=True)

    def missing(self, keys: Sequence[PlanKey]) -> list[PlanKey]:
        """Those without a sound file."""
        return [key for key in keys if self.load(key) is None]

    def entries(self) -> list[PlanEntry]:
        """Every plan file, newest first."""
        found = []
        for path in self.folder.glob("*.plan"):
            try:
                status, data = path.stat(), path.read_bytes()
            except OSError:  # removed meanwhile
                continue
            key, problem = None, None
            try:
                key = PlanKey.parse(_parse(data)[0])
                if key.revision != networks.REVISION:
                    problem = f"of network revision {key.revision}; this is {networks.REVISION}"
            except (ValueError, TypeError, KeyError) as err:
                problem = f"damaged: {err}"
            found.append(PlanEntry(path, key, status.st_size, status.st_mtime, problem))
        return sorted(found, key=lambda entry: (-entry.modified, entry.path.name))


def _parse(data: bytes) -> tuple[str, bytes]:
    """(key text, plan) of a file. Raises ValueError saying what is wrong."""
    start = len(_MAGIC) + _HEADER.size
    if not data.startswith(_MAGIC) or len(data) < start:
        raise ValueError("not a plan file of this version")
    key_bytes, checksum, plan_bytes = _HEADER.unpack_from(data, len(_MAGIC))
    if key_bytes > _MAX_KEY_BYTES or len(data) != start + key_bytes + plan_bytes:
        raise ValueError(f"{len(data)} bytes, {start + key_bytes + plan_bytes} expected")
    plan = data[start + key_bytes :]
    if hashlib.sha256(plan).digest() != checksum:
        raise ValueError("the checksum is wrong")
    return data[start : start + key_bytes].decode("utf-8", "replace"), plan


# --- building -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    key: PlanKey
    path: Path
    nbytes: int
    """Of the plan itself."""
    seconds: float


def build_plan(key: PlanKey, cache: PlanCache, options: BuildOptions | None = None) -> BuiltPlan:
    """Build one plan in this process and store it.

    Raises EngineError when the library is not there or another than the key's, or cannot build.
    """
    backend = load_backend(key.backend)
    _check(key, backend)
    started = time.monotonic()
    # TensorRT 8 cannot read back what it wrote of such networks, and says so for each plan.
    readable = not backend.ahead_of_time and not backend.version.startswith("8.")
    timing = _TimingCache(key, cache.folder) if readable else None
    plan = build(
        backend,
        lambda ops: plan_kinds.define(key.kind, key.shape, ops),
        half=key.half,
        rows=key.rows,
        capability=key.capability,
        options=options or BuildOptions(workspace_bytes=plan_kinds.workspace_bytes(key.kind)),
        timing=timing,
    )
    path = cache.store(key, plan)
    return BuiltPlan(key, path, len(plan), time.monotonic() - started)


def build_missing(
    cache: PlanCache,
    keys: Sequence[PlanKey],
    *,
    jobs: int = 0,
    options: BuildOptions | None = None,
    on_built: Callable[[BuiltPlan], None] = lambda built: None,
) -> list[BuiltPlan]:
    """Build what the cache lacks, `jobs` at a time, with a bar on standard error if that is a terminal.

    Each job is a process of its own: TensorRT's builders cannot be forked, and one that dies takes nothing
    else along. jobs=0: as many as there are cores, where building needs no card; on a card one, since
    builds that run together spoil each other's measurements. Raises the first EngineError; what was built
    until then is kept.
    """
    missing = cache.missing(keys)
    if not missing:
        return []
    if jobs < 1:
        ahead = all(load_backend(key.backend).ahead_of_time for key in missing)
        jobs = len(os.sched_getaffinity(0)) if ahead else 1
    # The slowest first, so that none of them is left alone at the end.
    missing.sort(key=lambda key: (key.kind not in ("middle", "last"), -key.rows))
    built: list[BuiltPlan] = []
    pool = concurrent.futures.ProcessPoolExecutor(
        min(jobs, len(missing)),
        mp_context=multiprocessing.get_context("spawn"),
        # Ctrl-C reaches these processes too, and Python's handler would wait for the build's end.
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
    )
    with _bar(len(missing)) as advance:
        try:
            tasks = [pool.submit(build_plan, key, cache, options) for key in missing]
            for task in concurrent.futures.as_completed(tasks):
                built.append(task.result())
                advance()
                on_built(built[-1])
        except concurrent.futures.process.BrokenProcessPool:
            raise EngineError(
                "a process that builds plans died, perhaps for lack of memory; try with fewer jobs"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return built


def _check(key: PlanKey, backend: Backend) -> None:
    if key.version != backend.version:
        raise EngineError(f"the plan is of {key.backend} {key.version}; {backend.version} is installed")
    if backend.ahead_of_time:
        return
    card = find_card()
    if card is None:
        raise EngineError(
            f"{backend.name} builds on the card that the plan is for, and there is none here; run this where "
            "the card is, or use --backend tensorrt_rtx"
        )
    if card.capability != key.capability:
        raise EngineError(
            f"{backend.name} builds on the card that the plan is for: {card.name} has compute capability "
            f"{card.capability}, not {key.capability}"
        )


class _TimingCache:
    """Sets and keeps a builder's timing cache: called before a build and after it."""

    def __init__(self, key: PlanKey, folder: Path) -> None:
        digest = _digest(f"{key.backend} {key.version} {key.capability}")
        self._path = folder / f"timing-{digest}.cache"
        self._cache: Any = None

    def __call__(self, config: Any) -> None:
        if self._cache is None:
            self._cache = config.create_timing_cache(self._read())
            config.set_timing_cache(self._cache, ignore_mismatch=False)
            return
        with _locked(self._path):  # another builder may have added to the file meanwhile
            self._cache.combine(config.create_timing_cache(self._read()), ignore_mismatch=False)
            _write(self._path, bytes(self._cache.serialize()))

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(desc="building plans", total=total, unit="plan") as bar:
        bar.refresh()
        yield lambda: bar.update() and None


# --- tuning -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tuning:
    """What an engine measured on one card: a JSON object under a key of all that could change it."""

    key: Mapping[str, str | int]
    """E.g. card, driver, revision of the kernels, shapes."""
    values: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path, key: Mapping[str, str | int]) -> Tuning | None:
        """What was saved under the same key; None when nothing was, or it is damaged."""
        try:
            data = json.loads(_tuning_path(folder, key).read_text("utf-8"))
            if data["key"] == dict(key) and isinstance(data["values"], dict):
                return cls(key, data["values"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as err:
            _LOG.warning("%s: %s; the engine measures again", _tuning_path(folder, key), err)
        return None

    def save(self, folder: Path) -> Path:
        """Write it whole. Raises EngineError when the folder cannot be written."""
        path = _tuning_path(folder, self.key)
        data = {"key": dict(self.key), "values": dict(self.values)}
        _write(path, json.dumps(data, sort_keys=True, indent=1).encode())
        return path


def _tuning_path(folder: Path, key: Mapping[str, str | int]) -> Path:
    return folder / f"tuning-{_digest(json.dumps(dict(key), sort_keys=True))}.json"


# --- files --------------------------------------------------------------------------------------


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _write(path: Path, data: bytes) -> None:
    """Replace a file's content in one step."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as err:
        raise EngineError(
            f"could not write {path}: {err}; set WICORE_CACHE to a folder that can be written"
        ) from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, which the system drops when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
