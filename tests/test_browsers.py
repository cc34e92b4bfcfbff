"""What pages of other sites may do, and what every answer tells a browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from api.app import create_app
from api.services import build
from tests.fixtures.service import HANDSHAKE
from tests.services import settings_for
from wicore.access.keys import Limits
from wicore.access.store import KeyStore
from wicore.config import load_settings
from wicore.errors import ConfigError

pytestmark = pytest.mark.valkey

HERE, FRIEND, STRANGER = "http://localhost", "https://friend.example", "https://stranger.example"
TELL = {"kind": "completion", "prompt": "Tell", "max_tokens": 3}


class Site:
    """The service under some settings."""

    def __init__(self, url: str, **settings: Any) -> None:
        given = {f"api__{name}": value for name, value in settings.items()}
        self.services = build(settings_for(url, engine__kind="null", **given))
        self.client: FlaskClient = create_app(self.services.settings, self.services).test_client()

    def close(self) -> None:
        self.services.relay.close()
        self.services.redis.close()


@pytest.fixture
def site(redis_client: Any, valkey_url: str, request: pytest.FixtureRequest) -> Iterator[Site]:
    site = Site(valkey_url, **getattr(request, "param", {}))
    yield site
    site.close()


lets_a_friend_call = pytest.mark.parametrize(
    "site", [{"cors_origins": f"{FRIEND},https://b.example"}], indirect=True
)


@pytest.mark.parametrize(
    "origin", [STRANGER, "null", "http://localhost:8001", "http://localhost.stranger.example"]
)
def test_a_strangers_page_makes_no_job_and_opens_no_socket(site: Site, origin: str) -> None:
    sent = site.client.post("/v1/jobs", json=TELL, headers={"Origin": origin})
    opened = site.client.get("/v1/stream", headers={**HANDSHAKE, "Origin": origin})
    for answer in (sent, opened):
        assert (answer.status_code, answer.json["error"]["param"]) == (403, "Origin")
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert site.services.producer.list() == []


def test_a_page_from_here_and_no_page_at_all_may_call(site: Site) -> None:
    for headers in ({"Origin": HERE}, {}):
        assert site.client.post("/v1/jobs", json=TELL, headers=headers).status_code == 202


def test_a_name_that_was_made_to_point_here_is_refused(site: Site) -> None:
    def ask(host: str) -> Any:
        return site.client.post("/v1/jobs", json=TELL, headers={"Host": host, "Origin": f"http://{host}"})

    for host in ("127.0.0.1:8000", "localhost:8000", "[::1]:8000"):
        assert ask(host).status_code == 202
    for host in ("rebound.example", "rebound.example:8000", "10.0.0.1"):
        assert (ask(host).status_code, ask(host).json["error"]["param"]) == (403, "Host")


@pytest.mark.parametrize("site", [{"allow_anonymous": True, "host": "0.0.0.0"}], indirect=True)
def test_behind_a_proxy_any_name_of_the_service_is_good(site: Site) -> None:
    assert site.client.get("/v1/jobs", headers={"Host": "wicore.example"}).status_code == 200


def test_a_key_is_asked_for_nothing_more(site: Site) -> None:
    secret = KeyStore(site.services.redis).create("anna", Limits())[1]
    headers = {"Origin": STRANGER, "Host": "wicore.example", "Authorization": f"Bearer {secret}"}
    assert site.client.post("/v1/jobs", json=TELL, headers=headers).status_code == 202


@lets_a_friend_call
def test_a_friends_page_may_call_and_read(site: Site) -> None:
    wanted = "authorization,content-type,x-stainless-lang"
    asked = {
        "Origin": FRIEND,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": wanted,
    }
    preflight = site.client.options("/v1/jobs", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == FRIEND
    assert preflight.headers["Access-Control-Allow-Headers"] == wanted
    assert "DELETE" in preflight.headers["Access-Control-Allow-Methods"]
    for answer in (
        site.client.post("/v1/jobs", json=TELL, headers={"Origin": FRIEND}),
        site.client.post("/v1/jobs", json={}, headers={"Origin": FRIEND}),
    ):
        assert answer.headers["Access-Control-Allow-Origin"] == FRIEND
        assert "X-Job-Id" in answer.headers["Access-Control-Expose-Headers"]
        assert "Origin" in answer.headers["Vary"]
        assert "Access-Control-Allow-Credentials" not in answer.headers


@lets_a_friend_call
def test_a_preflight_needs_no_key_and_a_strangers_gets_no_leave(site: Site) -> None:
    KeyStore(site.services.redis).create("anna", Limits())
    for origin, leave in ((FRIEND, FRIEND), (STRANGER, None)):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answer = site.client.options("/v1/chat/completions", headers=headers)
        assert answer.headers.get("Access-Control-Allow-Origin") == leave


@pytest.mark.parametrize("path", ["/health", "/v1/jobs", "/nowhere", "/v1/jobs/nobody"])
def test_every_answer_tells_browsers_to_take_no_liberties(site: Site, path: str) -> None:
    headers = site.client.get(path).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "origins", ["friend.example", "https://a.example/", "https://a.example, https://b", "*,*"]
)
def test_origins_that_no_browser_sends_are_refused(origins: str) -> None:
    with pytest.raises(ConfigError, match="cors_origins"):
        load_settings(environ={}, overrides={"api.cors_origins": origins})
