"""`wicore doctor`: each fault is found and comes with its fix."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from click.testing import CliRunner
from redis.exceptions import ResponseError

from tests.emulation import EmulatedDevice
from wicore.cli import main
from wicore.commands import doctor
from wicore.commands.redis_checks import check_replicas, check_rights
from wicore.config import load_settings
from wicore.errors import EngineError
from wicore.exit_codes import ExitCode
from wicore.queue.connection import connect

SAFE = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}


class Configured:
    """A Redis client of which only the configuration is looked at."""

    def __init__(self, values: dict[str, str]) -> None:
        self.values = values

    def config_get(self, name: str) -> dict[bytes, bytes]:
        return {name.encode(): self.values[name].encode()}


class Managed:
    """A hosted Redis that keeps its configuration to itself."""

    def config_get(self, name: str) -> dict[str, str]:
        raise ResponseError("unknown command 'CONFIG'")


def found(values: dict[str, str]) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.check_durability(Configured(values))}


def test_a_durable_redis_passes() -> None:
    assert {check.status for check in found(SAFE).values()} == {"ok"}
    assert {check.status for check in found({**SAFE, "appendfsync": "always"}).values()} == {"ok"}


@pytest.mark.parametrize(
    ("name", "value"), [("appendonly", "no"), ("appendfsync", "no"), ("maxmemory-policy", "allkeys-lru")]
)
def test_a_redis_that_may_lose_jobs_fails_with_the_command_that_helps(name: str, value: str) -> None:
    checks = found({**SAFE, name: value})
    bad = checks.pop(f"redis {name}")
    assert (bad.status, bad.detail) == ("fail", value)
    assert f"CONFIG SET {name} {SAFE[name]}" in bad.fix
    assert {check.status for check in checks.values()} == {"ok"}


def test_a_redis_that_hides_its_configuration_is_a_warning() -> None:
    assert {check.status for check in doctor.check_durability(Managed())} == {"warn"}


@pytest.mark.valkey
def test_missing_rights_are_a_warning_that_names_them(redis_client: Any, valkey_url: str) -> None:
    redis_client.execute_command(
        "ACL", "SETUSER", "limited", "on", "nopass", "~*", "&*", "+@all", "-client|list"
    )
    client = connect(valkey_url.replace("unix://", "unix://limited:any@"))
    try:
        assert check_rights(redis_client).status == "ok"
        check = check_rights(client)
    finally:
        client.close()
        redis_client.acl_deluser("limited")
    assert (check.status, "client|list" in check.detail) == ("warn", True)
    assert "+client|list" in check.fix


@pytest.mark.valkey
def test_a_replica_in_place_of_the_master_is_a_failure(redis_client: Any) -> None:
    redis_client.execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        check = check_replicas(redis_client, 0, behind_sentinel=False)
    finally:
        redis_client.execute_command("REPLICAOF", "NO", "ONE")
    assert (check.status, check.fix) == (
        "fail",
        "let redis.url name the master, or the sentinels that know it",
    )
    assert check_replicas(redis_client, 0, behind_sentinel=False).status == "ok"


def test_a_missing_package_is_named() -> None:
    check = doctor.check_packages(["click>=8", "no-such-thing>=1", 'other; extra == "dev"'])
    assert (check.status, check.detail, check.fix) == (
        "fail",
        "missing: no-such-thing",
        "pip install no-such-thing",
    )


GPU = load_settings(environ={"WICORE_ENGINE__KIND": "tensorrt"})


def test_an_engine_that_cannot_be_imported_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    check = doctor.check_engine(GPU)
    assert check.status == "fail"
    assert "wicore[gpu]" in check.fix


def test_a_gpu_that_is_not_there_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(index: int) -> None:
        raise EngineError("GPU 0: CUDA shows 0 GPUs to this process")

    monkeypatch.setattr("wicore.engine.tensorrt.cuda.CudaDevice", none)
    check = doctor.check_engine(GPU)
    assert (check.status, "CUDA shows 0 GPUs" in check.detail) == ("fail", True)


@pytest.mark.parametrize(("capability", "status"), [((9, 0), "ok"), ((8, 9), "warn")])
def test_a_gpu_is_described_and_only_some_need_tensorrt(monkeypatch, capability, status) -> None:
    card = EmulatedDevice(capability=capability)
    monkeypatch.setattr("wicore.engine.tensorrt.cuda.CudaDevice", lambda index: card)
    monkeypatch.setattr("wicore.engine.tensorrt.trt_api.installed_backends", list)
    check = doctor.check_engine(GPU)
    assert (check.status, "emulation, 8.6 GB free" in check.detail) == (status, True)


def test_more_host_memory_than_there_is_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wicore.engine.tensorrt.cuda.CudaDevice", lambda index: EmulatedDevice())
    monkeypatch.setattr("wicore.engine.tensorrt.pinned.available_memory", lambda: 48 * 10**9)
    environ = {"WICORE_ENGINE__KIND": "tensorrt", "WICORE_HMT__HOST_BYTES": "64000000000"}
    check = doctor.check_engine(load_settings(environ=environ))
    assert check.status == "fail"
    assert "64.0 GB of host memory are asked for, 48.0 GB are free" in check.detail
    assert "hmt.host_bytes" in check.fix


def test_bad_settings_are_a_failure_that_names_the_key() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"], env={"WICORE_API__PORT": "x"})
    assert result.exit_code == ExitCode.FAILED
    last = json.loads(result.output.splitlines()[-1])
    assert (last["name"], last["status"]) == ("settings", "fail")
    assert "WICORE_API__PORT" in last["detail"]


def test_a_port_that_another_program_uses_is_a_failure() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        settings = load_settings(environ={}, overrides={"api.port": other.getsockname()[1]})
        check = doctor.check_port(settings, service=None)
    assert check.status == "fail"
    assert "WICORE_API__PORT" in check.fix


@pytest.fixture
def api() -> Iterator[Any]:
    """A server whose answer to every GET is the `reply` of the test."""

    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = server.reply  # type: ignore[attr-defined]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Door) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "workers", "verdict"), [(200, 2, "ok"), (503, 0, "fail")], ids=["ready", "no worker"]
)
def test_a_running_service_tells_its_workers(api: Any, status: int, workers: int, verdict: str) -> None:
    api.reply = status, json.dumps({"ready": status == 200, "workers": workers, "missing": []}).encode()
    service = doctor.ask(f"http://127.0.0.1:{api.server_port}/ready")
    settings = load_settings(environ={}, overrides={"api.port": api.server_port})
    assert doctor.check_port(settings, service).status == "ok"
    assert doctor.check_workers(settings, service).status == verdict


@pytest.mark.parametrize("text", [b"<html>", b"[1]", b'{"ready": true}'])
def test_another_program_on_the_port_is_not_taken_for_the_service(api: Any, text: bytes) -> None:
    api.reply = 200, text
    assert doctor.ask(f"http://127.0.0.1:{api.server_port}/ready") is None


def test_the_table_shows_each_fix_below_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [doctor.Check("one", "ok", "fine"), doctor.Check("two", "fail", "broken", "mend it")]
    monkeypatch.setattr(doctor, "examine", lambda config: iter(checks))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == ExitCode.FAILED
    lines = result.output.splitlines()
    assert lines[1].split() == ["fail", "two", "broken"]
    assert lines[2].strip() == "fix: mend it"


def test_warnings_alone_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda config: iter([doctor.Check("one", "warn", "hm", "look")]))
    assert CliRunner().invoke(main, ["doctor"]).exit_code == ExitCode.OK


@pytest.mark.parametrize(
    ("host", "more", "status"),
    [
        ("127.0.0.1", {}, "ok"),
        ("0.0.0.0", {}, "fail"),
        ("0.0.0.0", {"api.allow_anonymous": True}, "ok"),
        ("0.0.0.0", {"api.keys": [{"name": "web", "key": "configured-key-with-enough-bits"}]}, "ok"),
        ("0.0.0.0", {"redis.url": None}, "warn"),
    ],
)
@pytest.mark.valkey
def test_a_service_that_would_be_open_to_the_network_is_told_to_make_a_key(
    redis_client: Any, valkey_url: str, host: str, more: dict[str, Any], status: str
) -> None:
    given = {"redis.url": valkey_url, "api.host": host} | more
    check = doctor.check_access(load_settings(environ={}, overrides=given))
    assert check.status == status
    assert ("wicore keys" in (check.fix or "")) == (status != "ok")
