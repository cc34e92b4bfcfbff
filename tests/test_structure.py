"""The rules that keep the parts apart, and the package honest about what it needs."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "wicore").rglob("*.py"))
CODE = sorted(path for part in ("wicore", "workers", "api") for path in (ROOT / part).rglob("*.py"))
CORE = sorted(
    path
    for pattern in (
        "scheduler/**/*.py",
        "hmt/**/*.py",
        "sampling.py",
        "request.py",
        "messages.py",
        "fields.py",
    )
    for path in (ROOT / "wicore").glob(pattern)
)
EDGE = {"redis", "flask", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"}
CLOCK_AND_FILES = {"os", "io", "pathlib", "time", "datetime", "tempfile", "shutil", "socket", "subprocess"}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, by absolute name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_the_library_knows_neither_api_nor_workers(path: Path) -> None:
    assert packages(path) & {"api", "workers", "flask", "gunicorn"} == set()


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_touches_no_server_engine_clock_or_file(path: Path) -> None:
    assert packages(path) & (EDGE | CLOCK_AND_FILES) == set()
    outside = {name for name in imports(path) if re.match(r"wicore\.(queue|stream|config|commands)\b", name)}
    assert outside == set()


def distributions() -> Mapping[str, set[str]]:
    """What is installed, by the packages that it has. Python 3.10's own does not see those that share one."""
    found = defaultdict(set)
    for distribution in importlib.metadata.distributions():
        names = (distribution.read_text("top_level.txt") or "").split()
        names += [file.parts[0] for file in distribution.files or () if file.suffix == ".py"]
        for name in names:
            found[name.removesuffix(".py")].add(distribution.metadata["Name"])
    return found


def test_every_library_that_is_imported_is_declared() -> None:
    declared = {
        re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("_", "-")
        for line in importlib.metadata.requires("wicore") or []
    }
    known = distributions()
    ours = {"wicore", "workers", "api", *sys.stdlib_module_names}
    undeclared = {
        f"{package} in {name_of(path)}"
        for path in CODE
        for package in packages(path) - ours
        if package in known and not declared & {name.lower().replace("_", "-") for name in known[package]}
    }
    assert undeclared == set()


def test_every_requirement_is_pinned() -> None:
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for line in importlib.metadata.requires("wicore") or []:
        name = re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("_", "-")
        assert name in pinned, f"{name}: not in constraints.txt; run `make constraints`"
