"""Keys: who is let in, and what of the service each sees."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import simple_websocket
from flask.testing import FlaskClient

from api import keyring
from api.app import create_app
from api.keyring import KeyRing
from api.services import Services, build
from tests.fixtures.service import HANDSHAKE
from tests.services import settings_for, start_api, stop
from tests.waiting import free_port
from wicore.access.keys import Limits, client_id, digest_of
from wicore.access.store import KeyStore, require_keys
from wicore.config import Settings
from wicore.errors import ConfigError, Unavailable

pytestmark = pytest.mark.valkey

TELL = {"kind": "completion", "prompt": "Tell", "max_tokens": 3}
CONFIGURED = "configured-key-with-enough-bits"


class Keys:
    """Two clients and an operator."""

    def __init__(self, store: KeyStore) -> None:
        self.anna = store.create("anna", Limits())[1]
        self.ben = store.create("ben", Limits())[1]
        self.operator = store.create("operator", Limits(), admin=True)[1]


@pytest.fixture
def settings(valkey_url: str) -> Settings:
    return settings_for(valkey_url, engine__kind="null")


@pytest.fixture
def store(redis_client: Any) -> KeyStore:
    return KeyStore(redis_client)


@pytest.fixture
def keys(store: KeyStore) -> Keys:
    return Keys(store)


@pytest.fixture
def new_client(redis_client: Any) -> Iterator[Callable[[Settings], FlaskClient]]:
    opened: list[Services] = []

    def make(settings: Settings) -> FlaskClient:
        opened.append(build(settings))
        return create_app(settings, opened[-1]).test_client()

    yield make
    for services in opened:
        services.relay.close()
        services.redis.close()


@pytest.fixture
def client(new_client: Callable[[Settings], FlaskClient], settings: Settings) -> FlaskClient:
    return new_client(settings)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def submit(client: FlaskClient, key: str, **fields: Any) -> str:
    answer = client.post("/v1/jobs", json=TELL | fields, headers=bearer(key))
    assert answer.status_code == 202
    return str(answer.json["id"])


def make(client: FlaskClient, key: str, door: str) -> str:
    """Where something of this key's is that the door shows; its id comes last."""
    if "/v1/responses" in door:
        body = {"input": "Once", "background": True}
        answer = client.post("/v1/responses", json=body, headers=bearer(key))
    elif "/v1/files" in door or "/v1/batches" in door:
        form = {"purpose": "batch", "file": (io.BytesIO(b"{}"), "lines.jsonl")}
        answer = client.post("/v1/files", data=form, headers=bearer(key))
    if "/v1/batches" in door:
        sent, endpoint = answer.json["id"], "/v1/chat/completions"
        body = {"input_file_id": sent, "endpoint": endpoint, "completion_window": "24h"}
        answer = client.post("/v1/batches", json=body, headers=bearer(key))
    if "/v1/jobs" in door:
        answer = client.post("/v1/jobs", json=TELL, headers=bearer(key))
    return f"{door.split('/<')[0].split()[1]}/{answer.json['id']}"


# --- every door -----------------------------------------------------------------------------------

OPEN, ANY_KEY, OWNER, OPERATOR = "open", "any key", "owner", "operator"
DOORS = {
    "GET /": OPEN,
    "GET /static/<path:name>": OPEN,
    "GET /health": OPEN,
    "GET /ready": OPEN,
    "GET /openapi.json": OPEN,
    "GET /docs": OPEN,
    "POST /v1/chat/completions": ANY_KEY,
    "POST /v1/completions": ANY_KEY,
    "POST /v1/tokenize": ANY_KEY,
    "GET /v1/models": ANY_KEY,
    "GET /v1/models/<path:name>": ANY_KEY,
    "POST /v1/jobs": ANY_KEY,
    "GET /v1/jobs": ANY_KEY,
    "GET /v1/jobs/<job_id>": OWNER,
    "DELETE /v1/jobs/<job_id>": OWNER,
    "GET /v1/jobs/<job_id>/events": OWNER,
    "GET /v1/jobs/<job_id>/stream": OWNER,
    "GET /v1/stream": ANY_KEY,
    "POST /v1/files": ANY_KEY,
    "GET /v1/files": ANY_KEY,
    "GET /v1/files/<file_id>": OWNER,
    "GET /v1/files/<file_id>/content": OWNER,
    "DELETE /v1/files/<file_id>": OWNER,
    "POST /v1/batches": ANY_KEY,
    "GET /v1/batches": ANY_KEY,
    "GET /v1/batches/<batch_id>": OWNER,
    "POST /v1/batches/<batch_id>/cancel": OWNER,
    "POST /v1/responses": ANY_KEY,
    "GET /v1/responses/<name>": OWNER,
    "DELETE /v1/responses/<name>": OWNER,
    "POST /v1/responses/<name>/cancel": OWNER,
    "GET /v1/responses/<name>/input_items": OWNER,
    "GET /v1/dead": OPERATOR,
    "DELETE /v1/dead": OPERATOR,
    "GET /v1/dead/<letter_id>": OPERATOR,
    "DELETE /v1/dead/<letter_id>": OPERATOR,
    "POST /v1/dead/<letter_id>/retry": OPERATOR,
    "GET /status": OPERATOR,
    "GET /metrics": OPERATOR,
}
"""Every door, and whom it serves. What is its owner's is a 404 to every other key."""
SOCKETS = {"GET /v1/stream", "GET /v1/jobs/<job_id>/stream"}


def knock(client: FlaskClient, door: str, key: str | None, thing: str = "nobody") -> Any:
    """What a door answers that is given no body; what it has by id is `thing`'s."""
    method, rule = door.split()
    headers = (bearer(key) if key else {}) | (HANDSHAKE if door in SOCKETS else {})
    thing = "index.html" if rule.startswith("/static/") else thing
    answer = client.open(re.sub("<[^>]+>", thing, rule), method=method, headers=headers)
    answer.get_data()
    answer.close()  # a file's
    return answer


def test_the_table_has_every_door(client: FlaskClient) -> None:
    found = {
        f"{method} {rule.rule}"
        for rule in client.application.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert found == set(DOORS)


@pytest.mark.parametrize("door", DOORS)
def test_without_a_good_key_only_open_doors_answer(client: FlaskClient, keys: Keys, door: str) -> None:
    for key in (None, "no-key-of-ours", keys.anna + "x", keys.anna[:-1], ""):
        answer = knock(client, door, key)
        if DOORS[door] == OPEN:
            assert answer.status_code in (200, 503)
        else:
            assert (answer.status_code, answer.json["error"]["code"]) == (401, "unauthenticated")
            assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("door", [door for door, whom in DOORS.items() if whom == OWNER])
def test_what_is_anothers_looks_as_if_it_were_not_there(client: FlaskClient, keys: Keys, door: str) -> None:
    place = make(client, keys.anna, door)
    thing = place.rpartition("/")[2]
    assert client.get(place, headers=bearer(keys.anna)).status_code == 200
    others = knock(client, door, keys.ben, thing)
    nobodys = knock(client, door, keys.ben, "f" * len(thing))
    assert (others.status_code, nobodys.status_code) == (404, 404)
    assert others.text.replace(thing, "") == nobodys.text.replace("f" * len(thing), "")
    still = client.get(place, headers=bearer(keys.anna))
    assert still.status_code == 200
    assert still.json.get("status") != "cancelled"


@pytest.mark.parametrize("door", [door for door, whom in DOORS.items() if whom == OPERATOR])
def test_what_tells_of_everybody_is_for_operators(client: FlaskClient, keys: Keys, door: str) -> None:
    refused = knock(client, door, keys.anna)
    assert (refused.status_code, refused.json["error"]["code"]) == (403, "forbidden")
    assert knock(client, door, keys.operator).status_code in (200, 404)


# --- jobs -----------------------------------------------------------------------------------------


def listed(client: FlaskClient, key: str, **query: Any) -> list[str]:
    answer = client.get("/v1/jobs", query_string=query, headers=bearer(key))
    assert answer.status_code == 200
    return [job["id"] for job in answer.json["data"]]


def test_a_key_lists_its_own_jobs_page_by_page_and_an_operator_all(client: FlaskClient, keys: Keys) -> None:
    whose = [keys.anna, keys.ben, keys.ben, keys.anna, keys.ben, keys.anna]
    jobs = [(key, submit(client, key)) for key in whose]
    of_anna = [job for key, job in jobs if key == keys.anna]
    client.delete(f"/v1/jobs/{of_anna[0]}", headers=bearer(keys.anna))
    newest_first = listed(client, keys.anna)
    assert set(newest_first) == set(of_anna)
    assert listed(client, keys.anna, limit=2) == newest_first[:2]
    assert listed(client, keys.anna, limit=2, after=newest_first[1]) == newest_first[2:]
    assert listed(client, keys.anna, status="cancelled") == of_anna[:1]
    assert set(listed(client, keys.anna, status="queued")) == set(of_anna[1:])
    assert listed(client, keys.ben, status="cancelled") == []
    assert set(listed(client, keys.operator)) == {job for _, job in jobs}
    foreign = client.get(f"/v1/jobs?after={newest_first[0]}", headers=bearer(keys.ben))
    assert (foreign.status_code, foreign.json["error"]["code"]) == (404, "unknown_job")


def test_jobs_that_came_without_a_key_are_the_operators_to_see(
    client: FlaskClient, keys: Keys, new_site: Any
) -> None:
    job = new_site().submit().id
    assert client.get(f"/v1/jobs/{job}", headers=bearer(keys.anna)).status_code == 404
    assert client.get(f"/v1/jobs/{job}", headers=bearer(keys.operator)).status_code == 200


def test_two_keys_may_use_the_same_idempotency_key(client: FlaskClient, keys: Keys) -> None:
    def ask(key: str) -> str:
        headers = bearer(key) | {"Idempotency-Key": "one"}
        return str(client.post("/v1/jobs", json=TELL, headers=headers).json["id"])

    assert ask(keys.anna) == ask(keys.anna) != ask(keys.ben)


def test_no_answer_names_the_client_of_a_job(client: FlaskClient, keys: Keys) -> None:
    job = submit(client, keys.anna)
    answer = client.get(f"/v1/jobs/{job}", headers=bearer(keys.operator)).text
    assert client_id(digest_of(keys.anna)) not in answer
    assert keys.anna not in answer


# --- keys -----------------------------------------------------------------------------------------


def test_without_any_key_everybody_is_an_operator(client: FlaskClient) -> None:
    job = client.post("/v1/jobs", json=TELL, headers=bearer("anything")).json["id"]
    assert client.get(f"/v1/jobs/{job}").status_code == 200
    assert client.get("/status").status_code == 200


def test_the_first_key_closes_the_service_and_revoking_the_last_does_not_open_it(
    client: FlaskClient, store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "FRESH_S", 0.0)
    assert client.get("/v1/jobs").status_code == 200
    key, secret = store.create("only", Limits())
    assert client.get("/v1/jobs").status_code == 401
    assert client.get("/v1/jobs", headers=bearer(secret)).status_code == 200
    store.revoke("only")
    assert client.get("/v1/jobs", headers=bearer(secret)).status_code == 401
    assert client.get("/v1/jobs").status_code == 401
    assert [(kept.id, kept.revoked_ms is not None) for kept in store.all()] == [(key.id, True)]


def test_a_secret_is_kept_nowhere(store: KeyStore, redis_client: Any) -> None:
    _, secret = store.create("anna", Limits())
    kept = redis_client.hgetall("wicore:keys")
    assert len(secret) >= 43
    assert secret.encode() not in b"".join([*kept, *kept.values()])


def test_keys_of_the_settings_count_beside_those_of_the_command(
    new_client: Callable[[Settings], FlaskClient], valkey_url: str, keys: Keys
) -> None:
    named = {"name": "web", "admin": True}
    for given in ({"key": CONFIGURED}, {"sha256": digest_of(CONFIGURED)}):
        client = new_client(settings_for(valkey_url, api__keys=[named | given]))
        for key in (CONFIGURED, keys.operator):
            assert client.get("/status", headers=bearer(key)).status_code == 200
        assert client.get("/status", headers=bearer(keys.anna)).status_code == 403
        assert client.get("/status").status_code == 401


def test_the_keys_are_read_once_in_a_while_and_an_outage_is_told_to_all(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    reads = []

    class Store:
        def all(self) -> list[Any]:
            reads.append(None)
            if len(reads) > 1:
                raise Unavailable("Redis is away")
            return []

    ring = KeyRing(Store(), settings.api)  # type: ignore[arg-type]
    for _ in range(10):
        assert ring.identify("a").admin
    assert len(reads) == 1
    monkeypatch.setattr(ring, "_read_at", float("-inf"))
    for _ in range(10):
        with pytest.raises(Unavailable):
            ring.identify("a")
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("host", "starts"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.7", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_an_address_that_others_reach_needs_a_key(
    store: KeyStore, valkey_url: str, host: str, starts: bool
) -> None:
    def refusal(**more: Any) -> str | None:
        try:
            require_keys(settings_for(valkey_url, api__host=host, **more).api, store)
        except ConfigError as err:
            return err.message
        return None

    assert (refusal() is None) == starts
    assert "wicore keys create" in (refusal() or "wicore keys create")
    assert refusal(api__allow_anonymous=True) is None
    assert refusal(api__keys=[{"name": "web", "key": CONFIGURED}]) is None
    store.create("anna", Limits())
    assert refusal() is None
    store.revoke("anna")
    assert (refusal() is None) == starts


def test_an_address_that_others_reach_serves_nobody_without_a_key(
    new_client: Callable[[Settings], FlaskClient], valkey_url: str
) -> None:
    # Even if it came up, as when its last key is revoked later.
    assert new_client(settings_for(valkey_url, api__host="0.0.0.0")).get("/v1/jobs").status_code == 401
    assert new_client(
        settings_for(valkey_url, api__host="0.0.0.0", api__allow_anonymous=True)
    ).get("/v1/jobs").status_code == 200  # fmt: skip


# --- sockets of a running service -----------------------------------------------------------------


@pytest.fixture
def served(valkey_url: str) -> Iterator[Settings]:
    """A process that serves, under a prefix of its own."""
    settings = settings_for(
        valkey_url,
        engine__kind="null",
        redis__prefix="keyed",
        api__port=free_port(),
        api__max_client_sockets=2,
    )
    process = start_api(settings)
    yield settings
    stop(process)


def open_socket(settings: Settings, path: str, key: str) -> simple_websocket.Client:
    """As a browser does it, which can send no header."""
    url = f"ws://127.0.0.1:{settings.api.port}{path}"
    return simple_websocket.Client(url, subprotocols=["wicore", f"wicore-key.{key}"])


def test_sockets_are_let_in_by_subprotocol_and_closed_when_the_key_is_revoked(
    redis_client: Any, served: Settings
) -> None:
    store = KeyStore(redis_client, "keyed")
    keys = Keys(store)
    with httpx.Client(base_url=f"http://127.0.0.1:{served.api.port}", timeout=20) as http:
        job = http.post("/v1/jobs", json=TELL, headers=bearer(keys.anna)).json()["id"]

        def refused(path: str, key: str) -> int:
            offer = {"Sec-WebSocket-Protocol": f"wicore, wicore-key.{key}"}
            return http.get(path, headers=HANDSHAKE | offer).status_code

        assert refused(f"/v1/jobs/{job}/stream", keys.ben) == 404
        assert refused("/v1/stream", "nobodys") == 401
        annas = [open_socket(served, path, keys.anna) for path in (f"/v1/jobs/{job}/stream", "/v1/stream")]
        assert refused("/v1/stream", keys.anna) == 429  # api.max_client_sockets are open
    bens = open_socket(served, "/v1/stream", keys.ben)
    assert {ws.subprotocol for ws in (*annas, bens)} == {"wicore"}
    bens.send(json.dumps({"type": "resume", "job": job}))
    assert json.loads(bens.receive(20))["error"]["code"] == "unknown_job"
    store.revoke("anna")
    for ws in annas:
        with pytest.raises(simple_websocket.ConnectionClosed) as closed:
            ws.receive(20)
        assert closed.value.reason == 1008
    assert bens.connected
    bens.close()
