"""`GET /status`: what waits, who works, and the sum of their KV caches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from api.app import create_app
from api.callers import Caller
from api.services import Services, build
from api.status import add_up
from tests.heartbeats import KV, beat
from tests.services import running_worker, settings_for
from wicore import __version__
from wicore.config import Settings
from wicore.request import JobBody, Priority

NOTHING_WAITS = {"interactive": 0, "normal": 0, "batch": 0, "background": 0, "suspect": 0}


@pytest.fixture
def settings(valkey_url: str) -> Settings:
    return settings_for(valkey_url, engine__kind="null")


@pytest.fixture
def services(redis_client: Any, settings: Settings) -> Iterator[Services]:
    services = build(settings)
    yield services
    services.relay.close()
    services.redis.close()


@pytest.fixture
def client(services: Services) -> FlaskClient:
    return create_app(services.settings, services).test_client()


@pytest.mark.valkey
def test_a_service_without_workers_answers_all_the_same(client: FlaskClient) -> None:
    answer = client.get("/status")
    assert answer.status_code == 200
    told = answer.json
    assert told.pop("versions").keys() == {"wicore", "python", "redis"}
    assert told == {"version": __version__, "queue": NOTHING_WAITS, "rates": {}, "workers": [], "kv": {}}


@pytest.mark.valkey
def test_what_waits_is_counted_by_level(client: FlaskClient, services: Services) -> None:
    for level in (Priority.NORMAL, Priority.NORMAL, Priority.BACKGROUND):
        services.accept(JobBody(kind="completion", prompt="Once"), level, Caller(""))
    assert client.get("/status").json["queue"] == NOTHING_WAITS | {"normal": 2, "background": 1}


@pytest.mark.valkey
def test_a_running_worker_is_shown_by_its_heartbeat(client: FlaskClient, settings: Settings) -> None:
    with running_worker(settings, "w1") as worker:
        worker._heartbeat._beat()
        (shown,) = client.get("/status").json["workers"]
    assert (shown["id"], shown["slots"], shown["running"]) == ("w1", settings.scheduler.max_batch, 0)
    assert 0 <= shown["age_s"] < 5
    assert shown.keys().isdisjoint({"worker", "lifeline"})
    assert shown["version"] == __version__
    assert shown["latency"]["time_to_first_token"] == {"count": 0, "sum": 0}
    assert shown["requests"]["running"] == 0


@pytest.mark.valkey
def test_workers_of_any_model_are_shown_and_their_caches_added_up(
    client: FlaskClient, services: Services
) -> None:
    beat(services.redis, "w1", model="tiny", kv=KV)
    beat(services.redis, "w2", model="other", kv=KV | {"direct_io": True})
    beat(services.redis, "w3")
    status = client.get("/status").json
    assert [worker["id"] for worker in status["workers"]] == ["w1", "w2", "w3"]
    assert [worker.get("kv", {}).get("direct_io") for worker in status["workers"]] == [None, True, None]
    assert status["kv"]["tiers"]["device"]["global"] == {"total": 20, "free": 6, "used": 10, "cached": 4}
    assert status["kv"]["hit_tokens"] == {"device": 1280, "host": 128, "nvme": 0}
    assert status["kv"]["move_seconds"] == {"device>host": {"count": 12, "sum": 0.5}}
    assert "direct_io" not in status["kv"]


def test_a_service_whose_redis_is_away_is_unavailable() -> None:
    away = settings_for("unix:///nowhere/at/all.sock")
    answer = create_app(away).test_client().get("/status")
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "unavailable")
    assert "Redis at unix:///nowhere/at/all.sock cannot be reached" in answer.json["error"]["message"]
    assert "Retry-After" in answer.headers


def test_workers_that_tell_different_things_are_added_as_far_as_they_agree() -> None:
    parts = [
        {"a": 1, "b": {"c": 0.5}, "text": "x", "list": [1], "yes": True},
        {"a": 2, "b": {"d": 2}, "e": None},
        {"a": {"later": 1}, "b": 7},
    ]
    assert add_up(parts) == {"a": {"later": 1}, "b": {"c": 0.5, "d": 2}}
    assert add_up(parts[:2]) == {"a": 3, "b": {"c": 0.5, "d": 2}}
    assert add_up([]) == {}
