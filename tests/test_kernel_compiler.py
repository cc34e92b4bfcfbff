"""Kernels compile for every card without one, and what was compiled is kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from wicore.engine.tensorrt import compiler
from wicore.engine.tensorrt.compiler import architecture, compile_kernel, compile_text, variants
from wicore.engine.tensorrt.device import KERNELS
from wicore.errors import EngineError

pytest.importorskip("cuda.bindings.nvrtc")

PROBES = Path(__file__).parent / "emulation" / "sources" / "probes.cu"
SOURCES = [*sorted(KERNELS.glob("*.cu")), PROBES]
CASES = [
    pytest.param(path, macros, id=" ".join([path.stem, *(f"{k}={v}" for k, v in macros.items())]))
    for path in SOURCES
    for macros in variants(path.read_text())
]
ELF = b"\x7fELF"
KERNEL = '#include "common.cuh"\nextern "C" __global__ void twice(float* x) { x[threadIdx.x] *= FACTOR; }\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "twice.cu"
    path.write_text(KERNEL)
    return path


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The architectures compiled for since."""
    done: list[str] = []

    def counted(text: str, path: Path, defines: dict[str, str], arch: str) -> compiler.Compiled:
        done.append(arch)
        return compile_text(text, path, defines, arch)

    monkeypatch.setattr(compiler, "compile_text", counted)
    return done


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)], ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize(("path", "macros"), CASES)
def test_every_kernel_compiles_without_spilling(
    path: Path, macros: dict[str, str], capability: tuple[int, int]
) -> None:
    text = path.read_text()
    if "// requires: sm_90a" in text and capability != (9, 0):
        with pytest.raises(EngineError, match=r"expected compute capability 9\.0"):
            architecture(text, path.name, capability)
        return
    done = compile_text(text, path, macros, architecture(text, path.name, capability))
    assert done.cubin.startswith(ELF)
    if capability == (9, 0):
        spills = [
            line for line in done.log.splitlines() if "spill" in line and " 0 bytes spill stores" not in line
        ]
        assert spills == [], done.log


def test_a_kernel_is_compiled_once(source: Path, compilations: list[str]) -> None:
    folder = source.parent / "cache"
    first = compile_kernel(source, {"FACTOR": "2.0f"}, (9, 0), folder)
    assert first.startswith(ELF)
    assert compile_kernel(source, {"FACTOR": "2.0f"}, (9, 0), folder) == first
    assert compilations == ["sm_90"]
    compile_kernel(source, {"FACTOR": "3.0f"}, (9, 0), folder)
    compile_kernel(source, {"FACTOR": "2.0f"}, (8, 9), folder)
    source.write_text(KERNEL.replace("*=", "+="))
    compile_kernel(source, {"FACTOR": "2.0f"}, (9, 0), folder)
    assert compilations == ["sm_90", "sm_90", "sm_89", "sm_90"]


def test_a_change_in_an_included_file_compiles_again(source: Path, compilations: list[str]) -> None:
    folder, header = source.parent / "cache", source.parent / "outer.cuh"
    source.write_text(KERNEL.replace("common.cuh", "outer.cuh"))
    header.write_text('#include "inner.cuh"\n')
    for factor in (2, 3, 3):
        (source.parent / "inner.cuh").write_text(f"#define FACTOR {factor}\n")
        compile_kernel(source, {}, (8, 0), folder)
    assert compilations == ["sm_80", "sm_80"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:40] + b"x" + data[41:]]
)
def test_a_damaged_file_is_compiled_again(source: Path, compilations: list[str], damage: object) -> None:
    folder = source.parent / "cache"
    cubin = compile_kernel(source, {"FACTOR": 2}, (9, 0), folder)
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))  # type: ignore[operator]
    assert compile_kernel(source, {"FACTOR": 2}, (9, 0), folder) == cubin
    assert kept.read_bytes() == whole
    assert len(compilations) == 2


def test_a_folder_that_cannot_be_written_costs_only_time(source: Path) -> None:
    blocked = source.parent / "file"
    blocked.touch()
    assert compile_kernel(source, {"FACTOR": 2}, (9, 0), blocked / "cache").startswith(ELF)


def test_the_cache_is_in_the_cache_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WICORE_CACHE", str(source.parent / "own"))
    compile_kernel(source, {"FACTOR": 2}, (9, 0))
    assert [path.suffix for path in (source.parent / "own" / "kernels").iterdir()] == [".cubin"]


def test_what_the_compiler_says_is_in_the_error(source: Path) -> None:
    with pytest.raises(EngineError, match=r"twice\.cu: NVRTC cannot compile it for sm_90:(.|\n)*FACTOR"):
        compile_kernel(source, {}, (9, 0))
    with pytest.raises(EngineError, match=r"kernels/none\.cu: cannot be read"):
        compile_kernel("none.cu", {}, (9, 0))


def test_the_architecture_is_the_newest_that_the_card_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "supported_architectures", lambda: (75, 80, 86, 89, 90))
    found = [architecture("", "x.cu", capability) for capability in ((8, 0), (8, 7), (8, 9), (9, 0))]
    assert found == ["sm_80", "sm_86", "sm_89", "sm_90"]
    assert architecture("// requires: sm_90a\n", "x.cu", (9, 0)) == "sm_90a"
    with pytest.raises(
        EngineError, match=r"capability 12\.0: NVRTC [\d.]+ cannot compile for it; install a newer"
    ):
        architecture("", "x.cu", (12, 0))
    with pytest.raises(EngineError, match=r"expected 8\.0 or newer; found 7\.5"):
        architecture("", "x.cu", (7, 5))


def test_a_source_declares_its_variants() -> None:
    text = "// requires: sm_90a\n// variant: HEAD_DIM=128 INT8\n// variant: HEAD_DIM=256\n"
    assert variants(text) == [{"HEAD_DIM": "128", "INT8": "1"}, {"HEAD_DIM": "256"}]
    assert variants("") == [{}]


def test_missing_parts_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    compiler.nvrtc_version()  # kept from here on
    broken = ModuleType("cuda.bindings.nvrtc")

    def version() -> None:
        raise RuntimeError("libnvrtc.so.13: cannot open")

    broken.nvrtcVersion = version  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings.nvrtc", broken)
        patch.setattr("cuda.bindings.nvrtc", broken)
        with pytest.raises(EngineError, match=r"libnvrtc.so.13: cannot open.*install nvidia-cuda-nvrtc"):
            compile_text(KERNEL, source, {}, "sm_90")
    with monkeypatch.context() as patch:
        patch.delattr("cuda.bindings.nvrtc")
        patch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
        with pytest.raises(EngineError, match=r"cuda-bindings is not installed.*install wicore\[gpu\]"):
            compile_text(KERNEL, source, {}, "sm_90")


def test_headers_are_found_in_a_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    major = compiler.nvrtc_version()[0]
    for name, version in (("old", major - 1), ("new", major)):
        (tmp_path / name / "include").mkdir(parents=True)
        (tmp_path / name / "include" / "cuda_fp16.h").touch()
        (tmp_path / name / "include" / "cuda.h").write_text(f"#define CUDA_VERSION {version}020\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "new"))
    assert compiler.header_folders.__wrapped__()[0] == tmp_path / "new" / "include"


def test_missing_headers_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(EngineError, match=r"cuda_fp16\.h.*install nvidia-cuda-runtime"):
        compiler.header_folders.__wrapped__()
