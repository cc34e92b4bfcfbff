"""The access log: what it says of a request, and what it keeps to itself."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from flask.testing import FlaskClient

from api.access_log import log
from api.app import create_app
from api.services import Services, build
from tests.fixtures.service import HANDSHAKE
from tests.services import api_process, running_worker, settings_for
from tests.waiting import free_port, until
from wicore.config import Settings

pytestmark = pytest.mark.valkey

SECRET = "tell nobody"
ASK = {"prompt": SECRET, "max_tokens": 3}


class Lines(logging.Handler):
    """The entries written, as parsed."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    @property
    def last(self) -> dict[str, Any]:
        entry: dict[str, Any] = json.loads(self.texts[-1])
        return entry


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)


def settings_of(url: str, **more: Any) -> Settings:
    return settings_for(url, engine__kind="null", engine__null_step_ms=1.0, **more)


@pytest.fixture
def services(redis_client: Any, valkey_url: str) -> Iterator[Services]:
    services = build(settings_of(valkey_url))
    yield services
    services.relay.close()
    services.redis.close()


@pytest.fixture
def client(services: Services) -> FlaskClient:
    return create_app(services.settings, services).test_client()


def test_a_line_says_who_asked_for_what_and_how_it_went(client: FlaskClient, lines: Lines) -> None:
    headers = {"X-Request-Id": "mine", "Authorization": "Bearer k"}
    answer = client.post("/v1/jobs", json={"kind": "completion", **ASK}, headers=headers)
    entry = lines.last
    expected = {
        "request_id": "mine",
        "method": "POST",
        "route": "/v1/jobs",
        "path": "/v1/jobs",
        "status": 202,
    }
    assert entry.items() >= expected.items()
    assert (entry["job"], entry["bytes"]) == (answer.json["id"], len(answer.data))
    assert entry["client"]
    assert "k" not in entry.values()
    assert entry["ms"] >= 0
    assert entry["time"].endswith("+00:00")
    assert len(lines.texts) == 1


def test_a_prompt_is_not_in_the_log_unless_asked_for(
    services: Services, client: FlaskClient, valkey_url: str, lines: Lines
) -> None:
    client.post("/v1/jobs", json={"kind": "completion", **ASK})
    assert SECRET not in lines.texts[-1]
    told = create_app(settings_of(valkey_url, telemetry__log_prompts=True), services).test_client()
    told.post("/v1/jobs", json={"kind": "completion", **ASK})
    assert json.loads(lines.last["body"])["prompt"] == SECRET


def test_the_line_of_a_stream_comes_with_its_end(
    services: Services, client: FlaskClient, lines: Lines
) -> None:
    with running_worker(services.settings):
        answer = client.post("/v1/completions", json={**ASK, "stream": True})
        assert not lines.texts
        size = len(answer.data)
        answer.close()
    assert (lines.last["status"], lines.last["bytes"]) == (200, size)
    assert lines.last["job"] == answer.headers["X-Job-Id"]


@pytest.mark.parametrize(
    ("path", "route", "status"),
    [("/nowhere", "", 404), ("/v1/jobs/nobodys", "/v1/jobs/<job_id>", 404), ("/v1/completions", "", 405)],
)
def test_what_is_refused_is_logged_as_well(
    client: FlaskClient, lines: Lines, path: str, route: str, status: int
) -> None:
    client.get(path)
    assert (lines.last["path"], lines.last["route"], lines.last["status"]) == (path, route, status)


def test_the_served_api_writes_bare_lines_to_standard_output(redis_client: Any, valkey_url: str) -> None:
    settings = settings_of(valkey_url, api__port=free_port())
    api = api_process(settings, stdout=subprocess.PIPE)
    url = f"http://127.0.0.1:{settings.api.port}"
    try:
        until(lambda: answers(url))
        with socket.create_connection(("127.0.0.1", settings.api.port), 20) as ws:
            head = "".join(f"{name}: {value}\r\n" for name, value in HANDSHAKE.items())
            ws.sendall(f"GET /v1/stream HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode())
            assert b" 101 " in ws.recv(1000)
    finally:
        api.terminate()
        output, _ = api.communicate(timeout=30)
    entries = [json.loads(line) for line in output.splitlines()]
    seen = [(entry["route"], entry["status"]) for entry in entries]
    assert {("/health", 200), ("/v1/stream", 101)} <= set(seen)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
