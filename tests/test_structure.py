"""The two rules on who may import whom, read from the syntax of every module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PURE = ["wicore/scheduler", "wicore/hmt", "wicore/sampling.py", "wicore/request.py"]
PURE_MAY_IMPORT = {
    # the language
    *("__future__", "bisect", "collections", "dataclasses", "enum", "functools", "hashlib", "heapq"),
    *("itertools", "math", "operator", "re", "threading", "typing", "uuid"),
    # of concurrent.futures only Executor, as the type of an argument
    "concurrent.futures",
    # numbers and validation
    *("numpy", "pydantic"),
    # the pure core itself, and the contracts it shares with the rest
    *("wicore.scheduler", "wicore.hmt", "wicore.sampling", "wicore.request"),
    *("wicore.errors", "wicore.engine.base"),
}
NEVER_IN_THE_LIBRARY = {"api", "workers", "flask", "flask_sock", "gunicorn"}
DOES_IO = {"open", "print", "input", "exec", "eval", "__import__"}


def sources(*paths: str) -> list[Path]:
    found: list[Path] = []
    for path in map(ROOT.joinpath, paths):
        found += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return found


def imports(source: str, package: str) -> set[str]:
    """Absolute names of all modules imported anywhere in `source`, a module of `package`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            names.add(".".join([*base, *([node.module] if node.module else [])]))
    return names


def within(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in allowed)


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources(*PURE), ids=relative)
def test_the_pure_core_imports_only_what_is_pure(path):
    found = imports(path.read_text(), package_of(path))
    assert {name for name in found if not within(name, PURE_MAY_IMPORT)} == set()


@pytest.mark.parametrize("path", sources(*PURE), ids=relative)
def test_the_pure_core_calls_nothing_that_reads_or_writes_outside(path):
    called = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert called & DOES_IO == set()


@pytest.mark.parametrize("path", sources("wicore"), ids=relative)
def test_the_library_imports_no_process_and_no_web_framework(path):
    found = imports(path.read_text(), package_of(path))
    assert {name for name in found if within(name, NEVER_IN_THE_LIBRARY)} == set()


def test_every_part_of_the_pure_core_is_looked_at():
    assert all(sources(path) for path in PURE)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import redis", "redis"),
        ("def f():\n    from flask.json import dumps", "flask.json"),
        ("from ..queue import schema", "wicore.queue"),
        ("from . import clock", "wicore.hmt"),
        ("import time as t", "time"),
    ],
)
def test_an_import_is_seen_wherever_and_however_it_is_written(source, module):
    assert imports(source, "wicore.hmt") == {module}
