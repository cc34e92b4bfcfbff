"""Compiles kernels with NVRTC, for one compute capability, and keeps what it compiled.

A source in `kernels/` may say in comments of their own lines:

- `// requires: sm_90a`: compile for that architecture's own instructions; other cards refuse it.
- `// variant: HEAD_DIM=128 INT8=1`: a set of macros that is in use; tests compile each.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from wicore.cache import cache_folder
from wicore.engine.tensorrt.device import KERNELS
from wicore.errors import EngineError

FLAGS = ("--std=c++17", "--ptxas-options=-v")
"""No fast math: sums, divisions and the sines of RoPE are as exact as written."""

_REQUIRES = re.compile(r"^// requires: sm_(\d+)(\d)a\s*$", re.MULTILINE)
_VARIANT = re.compile(r"^// variant:(.*)$", re.MULTILINE)
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Compiled:
    """A cubin, and what the assembler says about it: each kernel's registers, spills and stack."""

    cubin: bytes
    log: str


def compile_kernel(
    source: str | Path,
    defines: Mapping[str, int | str],
    capability: tuple[int, int],
    folder: Path | None = None,
) -> bytes:
    """The cubin of `kernels/<source>` (or of a path), from the cache or newly compiled.

    The cache holds files by a digest of the sources, macros, architecture, flags and NVRTC's version; one
    that is damaged, or a folder that cannot be written, costs a compilation and nothing else.
    folder: of the cache, by default `kernels` in the cache folder.
    Raises EngineError with the compiler's log, or with what to install.
    """
    path = KERNELS / source
    text = _read(path)
    arch = architecture(text, path.name, capability)
    kept = (folder or cache_folder() / "kernels") / f"{path.stem}-{_digest(path, text, defines, arch)}.cubin"
    if (cubin := _load(kept)) is None:
        cubin = compile_text(text, path, defines, arch).cubin
        _keep(kept, cubin)
    return cubin


def compile_text(text: str, path: Path, defines: Mapping[str, int | str], arch: str) -> Compiled:
    """Compile, whatever the cache holds. `path` names the source; its folder is searched for includes."""
    nvrtc = _nvrtc()
    folders = [path.parent, KERNELS, *header_folders()]
    options = [
        f"--gpu-architecture={arch}",
        *FLAGS,
        *(f"-D{name}={value}" for name, value in sorted(defines.items())),
        *(f"-I{folder}" for folder in folders),
    ]
    program = _check(nvrtc, nvrtc.nvrtcCreateProgram(text.encode(), path.name.encode(), 0, [], []))
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = bytearray(_check(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
        _check(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
        words = log.rstrip(b"\0").decode(errors="replace").strip()
        if int(result):
            raise EngineError(f"kernels/{path.name}: NVRTC cannot compile it for {arch}:\n{words[:8000]}")
        cubin = bytearray(_check(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        _check(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return Compiled(bytes(cubin), words)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def architecture(text: str, name: str, capability: tuple[int, int]) -> str:
    """What to compile a source for: "sm_90a" where it requires that, else the newest architecture known to
    NVRTC whose code the card runs. Raises EngineError where the card, or NVRTC, is not fit for it."""
    major, minor = capability
    if match := _REQUIRES.search(text):
        if (int(match[1]), int(match[2])) != capability:
            raise EngineError(
                f"kernels/{name}: expected compute capability {match[1]}.{match[2]}; found {major}.{minor}"
            )
        return f"sm_{match[1]}{match[2]}a"
    if major < 8:
        raise EngineError(f"compute capability: expected 8.0 or newer; found {major}.{minor}")
    known = supported_architectures()
    fit = [arch for arch in known if arch // 10 == major and arch % 10 <= minor]
    if not fit:
        version = ".".join(map(str, nvrtc_version()))
        raise EngineError(
            f"compute capability {major}.{minor}: NVRTC {version} cannot compile for it; "
            "install a newer nvidia-cuda-nvrtc"
        )
    return f"sm_{max(fit)}"


def variants(text: str) -> list[dict[str, str]]:
    """The sets of macros that a source declares; one empty set where it declares none."""
    found = [_macros(match) for match in _VARIANT.findall(text)]
    return found or [{}]


def _macros(words: str) -> dict[str, str]:
    pairs = (word.partition("=") for word in words.split())
    return {name: value or "1" for name, _, value in pairs}


@cache
def nvrtc_version() -> tuple[int, int]:
    """NVRTC's version; EngineError where it cannot be loaded."""
    nvrtc = _nvrtc()
    result, major, minor = nvrtc.nvrtcVersion()
    _check(nvrtc, (result,))
    return major, minor


@cache
def supported_architectures() -> Sequence[int]:
    """What NVRTC compiles for, e.g. 90."""
    nvrtc = _nvrtc()
    return tuple(_check(nvrtc, nvrtc.nvrtcGetSupportedArchs()))


@cache
def header_folders() -> Sequence[Path]:
    """Where CUDA's headers are: of the nvidia-cuda-runtime wheel, or of an installed toolkit.

    Those of NVRTC's own major version go first. Raises EngineError where there are none.
    """
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(place) for place in (spec.submodule_search_locations or ()) if place] if spec else []
    homes = [Path(home) for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    major = nvrtc_version()[0]
    candidates = [
        *(place / f"cu{major}" / "include" for place in wheels),
        *(place / "cuda_runtime" / "include" for place in wheels),
        *(home / "include" for home in homes),
        Path(f"/usr/local/cuda-{major}/include"),
        Path("/usr/local/cuda/include"),
        Path("/usr/include"),
    ]
    found = [folder for folder in candidates if (folder / "cuda_fp16.h").is_file()]
    found.sort(key=lambda folder: _headers_major(folder) != major)
    if not found:
        raise EngineError(
            "CUDA's headers (cuda_fp16.h) are not found; install nvidia-cuda-runtime "
            "(nvidia-cuda-runtime-cu12 for CUDA 12), or set CUDA_HOME to a toolkit"
        )
    # Before CUDA 12.3 cuda_fp16.h wants headers of other wheels.
    others = [place / part / "include" for place in wheels for part in ("cuda_cccl", "cuda_nvcc")]
    return (found[0], *(folder for folder in (*others, found[0] / "cccl") if folder.is_dir()))


def _headers_major(folder: Path) -> int | None:
    """The CUDA version of a folder of headers."""
    for name in ("cuda_runtime_api.h", "cuda.h"):
        try:
            text = (folder / name).read_text(errors="replace")
        except OSError:
            continue
        if match := re.search(r"^#define (?:CUDART_VERSION|CUDA_VERSION)\s+(\d+)", text, re.MULTILINE):
            return int(match[1]) // 1000
    return None


def _nvrtc() -> Any:
    """The bindings; EngineError with what to install."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as err:
        raise EngineError(
            f"cuda-bindings is not installed ({err}); install wicore[gpu] or wicore[rtx]"
        ) from err
    try:
        nvrtc.nvrtcVersion()
    except Exception as err:  # the loader's own classes, other ones in every version
        raise EngineError(
            f"NVRTC cannot be loaded ({err}); install nvidia-cuda-nvrtc (nvidia-cuda-nvrtc-cu12 for CUDA 12)"
        ) from err
    return nvrtc


def _check(nvrtc: Any, answer: tuple[Any, ...]) -> Any:
    """The value of a call's answer; EngineError where the call failed."""
    result, *values = answer
    if int(result):
        name = nvrtc.nvrtcGetErrorString(result)[1]
        raise EngineError(f"NVRTC: {name.decode() if isinstance(name, bytes) else name}")
    return values[0] if values else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as err:
        raise EngineError(f"kernels/{path.name}: cannot be read: {err}") from err


def _digest(path: Path, text: str, defines: Mapping[str, int | str], arch: str) -> str:
    """Of everything that decides what the cubin is."""
    digest = hashlib.sha256()
    parts = [arch, *FLAGS, str(nvrtc_version()), *(f"{k}={v}" for k, v in sorted(defines.items())), text]
    for part in (*parts, *_included(text, path.parent, set())):
        digest.update(f"{len(part)}:".encode() + part.encode())
    return digest.hexdigest()[:32]


def _included(text: str, folder: Path, seen: set[str]) -> list[str]:
    """The texts of the files that a source includes by "name", and of those that these include."""
    texts = []
    for name in _INCLUDE.findall(text):
        path = next((p for p in (folder / name, KERNELS / name) if p.is_file()), None)
        if path and name not in seen:
            seen.add(name)
            inner = _read(path)
            texts += [inner, *_included(inner, folder, seen)]
    return texts


def _load(path: Path) -> bytes | None:
    """A kept cubin; None where there is none, or it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, cubin = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


def _keep(path: Path, cubin: bytes) -> None:
    """Write whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(cubin).digest() + cubin)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
    except OSError:
        pass  # a cache: the cubin is at hand
