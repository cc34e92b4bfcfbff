"""Checkpoints: weights by name, from a Hugging Face folder or a GGUF file, memory-mapped.

Nothing is read before it is asked for, so that a worker's memory holds the weights in the engine's
format only, and the embedding table can stay on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from wicore.cache import cache_folder
from wicore.errors import CheckpointError
from wicore.gemma3.config import Gemma3Config, published
from wicore.gemma3.files import OpenFile, Place
from wicore.gemma3.hf_config import config_of_folder, read_json

log = logging.getLogger("wicore.model")

Bytes = NDArray[np.uint8]
Float = NDArray[np.float32]

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DIGEST_BYTES = 32 * 2**20
"""Of the parts whose digests make that of a tensor; then their pages are given back."""
_DIGEST_THREADS = 8
"""One hashes some 8 GB/s from the page cache."""
_TOWER_PREFIXES = ("vision_tower.", "multi_modal_projector.")
_SAMPLES = 16
_SAMPLE_BYTES = 256


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as its file holds it."""

    shape: tuple[int, ...]
    dtype: str
    """The file format's name of the element type, e.g. "BF16" or "Q4_K"."""
    raw: Bytes
    """[rows, bytes a row], memory-mapped; a vector is one row."""
    decode: Callable[[Bytes], Float]
    """Rows of `raw` as float32 [rows, width]."""
    place: Place | None = None
    """Of `raw` in its file. None: there is `raw` alone."""

    def read_into(self, target: Bytes, first: int, end: int) -> None:
        """Copy rows `first` to `end - 1` of `raw` to `target`, contiguous and as large.

        By reads of the file where it has a place there: they take no page faults, and a file that has become
        shorter is a CheckpointError, not the end of the process.
        """
        row_bytes = int(self.raw.shape[1])
        if self.place is None:
            np.copyto(target, self.raw[first:end].reshape(-1))  # lets go of the interpreter
        else:
            self.place.file.read_into(target, self.place.at + first * row_bytes)


class Checkpoint:
    """An opened Gemma 3 checkpoint; `open_checkpoint` makes one. Read-only and thread-safe.

    Names are Hugging Face's for a text-only model (`model.layers.0.self_attn.q_proj.weight`), and those of
    `Gemma3Config.vision_shapes` for a vision tower, whatever prefixes the file uses. Norm weights of the text
    model are the w of (1 + w). Nothing is scaled or fused.
    """

    def __init__(
        self,
        path: Path,
        config: Gemma3Config,
        tensors: Mapping[str, StoredTensor],
        tokenizer: Callable[[], bytes],
    ) -> None:
        """Raises CheckpointError when a tensor of the model is missing or has another shape."""
        self.path = path
        self.config = config
        self._tensors = tensors
        self._tokenizer = tokenizer
        for name, shape in (config.tensor_shapes() | config.vision_shapes()).items():
            found = self.stored(name).shape
            if found != shape:
                raise CheckpointError(f"{path}: {name}: expected shape {list(shape)}, found {list(found)}")

    def names(self) -> list[str]:
        """Every tensor of the file, sorted; those outside the model keep the file's names."""
        return sorted(self._tensors)

    def read(self, name: str) -> Float:
        """A whole tensor as a new float32 array. Raises CheckpointError for an unknown name."""
        tensor = self.stored(name)
        return tensor.decode(tensor.raw).reshape(tensor.shape)

    def rows(self, name: str, ids: Sequence[int] | NDArray[np.integer]) -> Float:
        """Rows of a matrix as float32 [len(ids), width]; only these are read from disk.

        Raises CheckpointError for an unknown name, IndexError for an id outside of the matrix.
        """
        tensor = self.stored(name)
        wanted = np.asarray(ids, dtype=np.int64)
        if wanted.size and wanted.min() < 0:  # numpy would count from the end
            raise IndexError(f"{name}: row {wanted.min()} is negative")
        return tensor.decode(tensor.raw[wanted])

    def stored(self, name: str) -> StoredTensor:
        """A tensor in its file's format, for conversions. Raises CheckpointError for an unknown name."""
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: expected tensor {name}, not found among {len(self._tensors)} tensors"
            ) from None

    @property
    def dtype(self) -> str:
        """How the bulk of the weights is stored, e.g. "BF16" or "Q4_K"."""
        sizes: dict[str, int] = {}
        for name in self.config.tensor_shapes():
            tensor = self._tensors[name]
            if not name.endswith("embed_tokens.weight"):
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.raw.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @cached_property
    def content_digest(self) -> str:
        """Hex digest of the configuration and of every tensor's name, type, shape and bytes.

        Reads the whole file, once, on several threads, and gives its pages back as it goes. For what outlives
        the process, where an edit of one weight must tell; `fingerprint` is for people and takes no time.
        """
        parts = [
            (name, start)
            for name in self.names()
            for start in range(0, self._tensors[name].raw.size, _DIGEST_BYTES)
        ]
        digest = xxhash.xxh3_128(repr(self.config).encode())
        with ThreadPoolExecutor(min(_DIGEST_THREADS, os.cpu_count() or 1), "digest") as pool:
            for (name, start), found in zip(parts, pool.map(self._digest_of_part, parts), strict=True):
                if start == 0:
                    tensor = self._tensors[name]
                    digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
                digest.update(found)
        return digest.hexdigest()

    def _digest_of_part(self, part: tuple[str, int]) -> bytes:
        name, start = part
        stored = self._tensors[name].raw.reshape(-1)[start : start + _DIGEST_BYTES]
        digest = xxhash.xxh3_128(stored.data).digest()  # lets go of the interpreter
        _release(stored)
        return digest

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest to tell checkpoints apart at a glance; see `content_digest`.

        Covers the configuration, every tensor's name, type and shape, and samples of its bytes: two
        trainings of the same model differ, in far less than the time of reading the file.
        """
        digest = hashlib.sha256(repr(self.config).encode())
        for name in self.names():
            tensor = self._tensors[name]
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            flat = tensor.raw.reshape(-1)
            for start in np.linspace(0, max(0, flat.size - _SAMPLE_BYTES), _SAMPLES, dtype=np.int64):
                digest.update(flat[start : start + _SAMPLE_BYTES].tobytes())
        return digest.hexdigest()

    @cached_property
    def tokenizer_model(self) -> bytes:
        """The SentencePiece model. Raises CheckpointError when the checkpoint has none."""
        return self._tokenizer()

    def release_pages(self) -> None:
        """Let the system take back the memory of what was read; later reads map it in again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        views = (getattr(tensor.raw, "_mmap", None) for tensor in self._tensors.values())
        for file in {id(view): view for view in views if view is not None}.values():
            file.madvise(mmap.MADV_DONTNEED)


def _release(mapped: Bytes) -> None:
    """`Checkpoint.release_pages` of a stretch of a mapped file; of other memory, nothing happens."""
    file = getattr(mapped, "_mmap", None)
    if file is None or not mapped.size or not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = mapped.ctypes.data - np.frombuffer(file, np.uint8).ctypes.data
    start = first - first % mmap.PAGESIZE
    file.madvise(mmap.MADV_DONTNEED, start, first + mapped.nbytes - start)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face folder (safetensors, sharded or not) or a .gguf file.

    Raises CheckpointError, saying what was expected and what was found, when anything is missing,
    truncated, misshapen or not Gemma 3.
    """
    from wicore.gemma3.gguf import open_gguf  # it builds a Checkpoint, so it imports this module

    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.is_file() and path.suffix.lower() == ".gguf":
            return open_gguf(path)
        found = "another kind of file" if path.exists() else "nothing"
    except OSError as err:
        raise CheckpointError(f"{path}: expected a readable checkpoint, found: {err}") from err
    raise CheckpointError(f"{path}: expected a checkpoint folder or a .gguf file, found {found}")


def models_folder() -> Path:
    """Where fetched models live: `models` in the cache folder."""
    return cache_folder() / "models"


def resolve_model(name_or_path: str) -> Path:
    """The checkpoint that a setting means: a path that exists, else a fetched model's folder.

    Raises CheckpointError with the command that fetches a known model.
    """
    path = Path(name_or_path)
    try:
        path = path.expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as err:  # too long a name, a closed folder, an unknown user's home
        raise CheckpointError(f"model {name_or_path!r}: expected a path, found: {err}") from None
    if published(name_or_path) is None:
        raise CheckpointError(
            f"model {name_or_path!r}: expected a checkpoint folder, a .gguf file or a known name "
            "(gemma-3-270m); found no such path or name"
        )
    cached = models_folder() / name_or_path
    if not cached.exists():
        raise CheckpointError(
            f"model {name_or_path!r}: expected {cached}, found nothing; "
            f"run `wicore model fetch {name_or_path}`, or set model.path to your own checkpoint"
        )
    return cached


# --- Hugging Face folders -----------------------------------------------------------------------


def decode_plain(dtype: str) -> Callable[[Bytes], Float]:
    """Decoder of rows of F32, F16 or BF16 elements, little-endian."""
    if dtype == "BF16":
        return lambda raw: (_view(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    kind = "<f4" if dtype == "F32" else "<f2"
    return lambda raw: _view(raw, kind).astype(np.float32)


def _view(raw: Bytes, kind: str) -> NDArray[np.generic]:
    # A fancy-indexed or offset row need not be aligned; a copy of it is.
    return np.ascontiguousarray(raw).view(kind)


def canonical_name(name: str) -> str:
    """A tensor's name as `Checkpoint` has it, from the prefixes of any transformers layout."""
    for prefix in ("language_model.model.", "model.language_model."):
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    tower = name.removeprefix("model.")
    if tower.startswith(_TOWER_PREFIXES):
        return tower.replace("vision_tower.vision_model.", "vision_tower.", 1)
    return name.removeprefix("language_model.")


def _open_folder(folder: Path) -> Checkpoint:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: expected config.json, found {_listing(folder)}")
    config = config_of_folder(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        for name, tensor in _read_safetensors(file):
            if name in tensors:
                raise CheckpointError(f"{file}: expected each tensor once, found {name} again")
            tensors[name] = tensor
    if config.vision is not None and not any(name.startswith(_TOWER_PREFIXES) for name in tensors):
        log.info(
            "%s: config.json describes a vision tower, the files hold none: text alone is served", folder
        )
        config = replace(config, vision=None)
    return Checkpoint(folder, config, tensors, lambda: _read_tokenizer(folder))


def _weight_files(folder: Path) -> list[Path]:
    """In transformers' order of preference: one file, an index of shards, shards without an index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        return [folder / name for name in _shards(index)]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: expected *.safetensors, found {_listing(folder)}")
    return files


def _shards(index: Path) -> list[str]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, Mapping):
        raise CheckpointError(f"{index}: expected weight_map, found {shards!r}")
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: expected names of files beside it, found {name!r}")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: expected this shard (the index names it)")
    return sorted(set(shards.values()))


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "an empty folder"


def _read_tokenizer(folder: Path) -> bytes:
    path = folder / "tokenizer.model"
    try:
        return path.read_bytes()
    except OSError:
        raise CheckpointError(f"{path}: expected the SentencePiece model, found nothing readable") from None


def _read_safetensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of one file (format: https://github.com/huggingface/safetensors#format)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path}: expected a safetensors header, found a length of {length} in a file of {size} bytes"
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise CheckpointError(f"{path}: expected a JSON header, found other bytes") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: expected a JSON object as header, found {type(header).__name__}")
    header.pop("__metadata__", None)
    begin, opened = 8 + length, OpenFile.of(path)
    data = np.memmap(path, np.uint8, "r", offset=begin) if size > begin else np.empty(0, np.uint8)
    for name, entry in header.items():
        tensor = _stored_tensor(path, name, entry, data)
        place = Place(opened, begin + int(entry["data_offsets"][0])) if opened else None
        yield canonical_name(name), replace(tensor, place=place)


def _stored_tensor(path: Path, name: str, entry: Mapping[str, object], data: Bytes) -> StoredTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])  # type: ignore[attr-defined]
        begin, end = (int(n) for n in entry["data_offsets"])  # type: ignore[attr-defined]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path}: {name}: expected dtype, shape and data_offsets, found {entry}"
        ) from None
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{path}: {name}: expected one of {', '.join(_ITEM_BYTES)}, found {dtype}")
    if not 0 <= begin <= end or any(n < 0 for n in shape):
        raise CheckpointError(
            f"{path}: {name}: expected a shape and a range of bytes, found {list(shape)}, {begin} to {end}"
        )
    if end > data.size:
        raise CheckpointError(
            f"{path}: {name}: expected {end} bytes of data, found {data.size}: the file is truncated"
        )
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{path}: {name}: expected bytes for {dtype} {list(shape)}, found {end - begin}"
        )
    rows = math.prod(shape[:-1])
    row_bytes = math.prod(shape[-1:]) * _ITEM_BYTES[dtype]
    return StoredTensor(shape, dtype, data[begin:end].reshape(rows, row_bytes), decode_plain(dtype))
