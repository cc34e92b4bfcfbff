"""Compiles kernels for the host with g++ or clang++.

Libraries are kept by a digest of all that they are made of.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from wicore.engine.tensorrt.device import KERNELS
from wicore.errors import EngineError

_HERE = Path(__file__).parent
_FLAGS = (
    *("-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-Bsymbolic"),
    # No contraction: the card's sums are spelt out with fmaf where they are meant.
    *("-ffp-contract=off", "-fno-strict-aliasing", "-fcf-protection=none", "-U_FORTIFY_SOURCE"),
    # Misaligned accesses and overruns of arrays end in an illegal instruction, which the launch reports.
    *("-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-variable"),
    *("-Wno-unused-but-set-variable", "-Wno-attributes", "-Wno-maybe-uninitialized", "-Wno-unused-value"),
)
_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__attribute__\s*\(\(.*?\)\)\s*)?(\w+)\s*\(')


class NoCompiler(EngineError):
    """There is no C++ compiler on this machine."""


def build(source: Path, defines: Mapping[str, int | str]) -> Path:
    """The library of a kernel source; raises EngineError with the compiler's messages."""
    cxx, version = compiler()
    macros = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    flags = [*_FLAGS, *_machine_flags(), "-DWICORE_EMULATED", *macros, f"-I{_HERE}", f"-I{KERNELS}"]
    digest = hashlib.sha256()
    for part in (version, *flags, source.name):
        digest.update(part.encode() + b"\0")
    sources = {
        source,
        *source.parent.glob("*.cuh"),
        *KERNELS.glob("*.cuh"),
        *_HERE.glob("*.h"),
        Path(__file__),
    }
    for path in sorted(sources):
        digest.update(path.read_bytes() + b"\0")
    folder = _cache_folder()
    target = folder / f"{source.stem}-{digest.hexdigest()[:32]}.so"
    # Test processes that run side by side want the same libraries at the same time: one compiles.
    with open(folder / f"{target.name}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=folder) as work:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        unit = Path(work) / "unit.cc"
        unit.write_text(_unit(source, _kernels(cxx, source, flags)))
        library = Path(work) / "library.so"
        _run([cxx, *flags, str(unit), "-o", str(library)], source)
        library.replace(target)
    return target


def _unit(source: Path, kernels: list[str]) -> str:
    """The translation unit: the source, and C entries for its kernels."""
    lines = ['#include "cuda_emulation.h"', "namespace {", f'#include "{source}"', "}  // namespace"]
    export = 'extern "C" __attribute__((visibility("default"))) int'
    for name in kernels:
        lines += [
            f"{export} parameters_{name}(int* sizes) {{ return emulation::parameter_sizes({name}, sizes); }}",
            f"{export} launch_{name}(void** args, const unsigned* grid, const unsigned* block,",
            "    size_t shared, int order, int dependent, char* message, size_t message_bytes) {",
            f"  return emulation::launch_kernel({name}, args, grid, block, shared, order, dependent,",
            "                                  message, message_bytes);",
            "}",
        ]
    return "\n".join(lines) + "\n"


def _kernels(cxx: str, source: Path, flags: list[str]) -> list[str]:
    """The names of the source's kernels, also of those that macros make."""
    only = [flag for flag in flags if flag.startswith(("-D", "-I", "-std"))]
    command = [cxx, "-E", "-P", *only, "-DWICORE_LISTING", "-include", "cuda_emulation.h", str(source)]
    command[-1:-1] = ["-x", "c++"]
    return list(dict.fromkeys(_KERNEL.findall(_run(command, source))))


def _run(command: list[str], source: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"{source.name}: does not compile for the emulation:\n{done.stderr[:8000]}")
    return done.stdout


@cache
def compiler() -> tuple[str, str]:
    """The compiler and its version."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path, subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    raise NoCompiler("the emulation of kernels needs g++; install it or set CXX")


@cache
def _machine_flags() -> tuple[str, ...]:
    """Hardware conversion to and from half, and fused multiplication, where the processor has them."""
    if platform.machine() != "x86_64":
        return ()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    found = set(re.findall(r"\w+", text.partition("flags")[2].partition("\n")[0]))
    return ("-mavx2", "-mfma", "-mf16c") if {"avx2", "fma", "f16c"} <= found else ()


def _cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"wicore-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
