"""The page and its files, without a browser; what it does in one is in tests/browser."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from api.app import create_app
from api.page import STATIC
from wicore.config import load_settings

FILES = sorted(path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.is_file())
OWN = [name for name in FILES if not name.startswith("vendor/")]


@pytest.fixture(scope="module")
def get() -> Callable[..., Any]:
    """Asks for a path; the answer is read whole, so that no file stays open."""
    client = create_app(load_settings(environ={})).test_client()
    return partial(client.get, buffered=True)


def linked(name: str) -> set[str]:
    """The files that a file of the page asks for, as paths under STATIC."""
    text = (STATIC / name).read_text()
    if name.endswith(".html"):
        return set(re.findall(r'"static/([^"#]+)"', text))
    imports = re.findall(r'^(?:import|export) .*?from "\./([^"]+)";', text, re.MULTILINE)
    return {str(Path(name).parent / other) for other in imports} | set(re.findall(r"`static/([^#`$]+)", text))


def test_the_page_is_served_without_redis_model_or_key(get: Callable[..., Any]) -> None:
    answer = get("/")
    assert (answer.status_code, answer.mimetype) == (200, "text/html")


def test_every_file_that_is_asked_for_is_there_and_every_script_is_asked_for() -> None:
    described = (STATIC.parent / "templates" / "docs.html.jinja").read_text()
    asked = {"index.html", *re.findall(r'"/static/([^"#]+)"', described)}
    unseen = ["index.html"]
    while unseen:
        new = linked(unseen.pop()) - asked
        asked |= new
        unseen += [name for name in new if name.endswith(".js") and not name.startswith("vendor/")]
    assert asked - set(FILES) == set()
    assert {name for name in OWN if name.endswith((".js", ".css"))} - asked == set()


@pytest.mark.parametrize(
    ("name", "mimetype"),
    [("js/main.js", "text/javascript"), ("css/base.css", "text/css"), ("icons.svg", "image/svg+xml")],
)
def test_a_file_comes_as_what_browsers_take_it_for(get: Callable[..., Any], name: str, mimetype: str) -> None:
    answer = get(f"/static/{name}")
    assert (answer.status_code, answer.mimetype) == (200, mimetype)
    assert answer.data == (STATIC / name).read_bytes()


def test_an_unchanged_file_is_not_sent_again(get: Callable[..., Any]) -> None:
    first = get("/static/js/main.js")
    assert first.headers["Cache-Control"] == "no-cache"
    again = get("/static/js/main.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_a_vendored_file_whose_path_has_its_version_is_not_asked_for_again(get: Callable[..., Any]) -> None:
    (script,) = [name for name in FILES if name.endswith("uPlot.iife.min.js")]
    assert "max-age=31536000" in get(f"/static/{script}").headers["Cache-Control"]


@pytest.mark.parametrize(
    "path",
    ["nothing.js", "", "js", "../page.py", "%2e%2e/page.py", "js/../../page.py", "..%5cpage.py", "%00"],
)
def test_nothing_but_files_of_the_page_is_served(get: Callable[..., Any], path: str) -> None:
    answer = get(f"/static/{path}")
    assert answer.status_code == 404
    assert answer.json["error"]["code"] == "not_found"


def test_the_policy_allows_no_other_host_and_nothing_inline(get: Callable[..., Any]) -> None:
    policy = get("/").headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize("name", [name for name in OWN if name.endswith((".html", ".css", ".js", ".svg"))])
def test_the_page_names_no_other_host_and_holds_nothing_inline(name: str) -> None:
    text = (STATIC / name).read_text()
    hosts = set(re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z0-9.-]+", text))
    assert hosts - {"http://www.w3.org"} == set()
    if name.endswith(".html"):
        assert re.search(r"<style|\sstyle=|\son[a-z]+=|<script>", text) is None


def test_vendored_files_are_the_ones_that_their_list_says() -> None:
    listed = dict(
        reversed(line.split("  "))
        for line in (STATIC / "vendor/README.txt").read_text().splitlines()
        if re.match(r"[0-9a-f]{64}  ", line)
    )
    there = {
        name.removeprefix("vendor/"): hashlib.sha256((STATIC / name).read_bytes()).hexdigest()
        for name in FILES
        if name.startswith("vendor/") and not name.endswith(".txt")
    }
    assert there == listed
