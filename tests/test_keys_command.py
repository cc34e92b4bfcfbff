"""`wicore keys`, with a Redis of its own and with the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from wicore.access.keys import digest_of
from wicore.access.store import KeyStore
from wicore.cli import main
from wicore.client import Client
from wicore.exit_codes import ExitCode

pytestmark = pytest.mark.valkey


@pytest.fixture
def store(redis_client: Any) -> KeyStore:
    return KeyStore(redis_client)


@pytest.fixture
def environ(valkey_url: str) -> dict[str, str]:
    return {"WICORE_REDIS__URL": valkey_url}


def wicore(environ: dict[str, str], *arguments: str) -> Result:
    return CliRunner().invoke(main, ["keys", *arguments], env=environ)


def test_a_key_is_shown_once_then_listed_without_its_secret(store: KeyStore, environ: dict[str, str]) -> None:
    made = wicore(environ, "create", "web", "--requests-per-minute", "60", "--model", "a", "--model", "b")
    secret = made.stdout.strip()
    (kept,) = store.all()
    assert made.exit_code == ExitCode.OK
    assert (kept.digest, kept.requests_per_minute, kept.models) == (digest_of(secret), 60, ("a", "b"))
    listed = wicore(environ, "list").stdout
    assert secret not in listed
    for word in ("web", kept.id, "client", "requests_per_minute 60", "models a,b"):
        assert word in listed


def test_a_revoked_key_stays_listed_and_its_name_can_be_used_again(
    store: KeyStore, environ: dict[str, str]
) -> None:
    wicore(environ, "create", "web", "--admin")
    again = wicore(environ, "create", "web")
    assert (again.exit_code, "exists" in again.stderr) == (ExitCode.REFUSED, True)
    assert wicore(environ, "revoke", "web").exit_code == ExitCode.OK
    assert wicore(environ, "revoke", "web").exit_code == ExitCode.REFUSED
    assert wicore(environ, "create", "web").exit_code == ExitCode.OK
    assert [key.revoked_ms is None for key in store.all()] == [False, True]
    assert "revoked" in wicore(environ, "list").stdout


def test_a_key_of_the_settings_is_listed(store: KeyStore, environ: dict[str, str]) -> None:
    environ["WICORE_API__KEYS"] = '[{"name": "site", "key": "configured-key-with-enough-bits"}]'
    listed = wicore(environ, "list").stdout
    assert "site" in listed
    assert "configured-key" not in listed


@pytest.mark.parametrize(
    "arguments", [("-web",), ("a b",), ("web", "--burst", "5"), ("web", "--parallel", "0"), ("web\n",)]
)
def test_a_bad_name_or_limit_makes_no_key(
    store: KeyStore, environ: dict[str, str], arguments: tuple[str, ...]
) -> None:
    assert wicore(environ, "create", *arguments).exit_code == ExitCode.USAGE
    assert store.all() == []


def test_keys_can_be_made_before_the_service_runs_and_while_it_does(short_folder: Path) -> None:
    from wicore.queue.embedded import EmbeddedValkey

    environ = {"WICORE_REDIS__DATA_DIR": str(short_folder), "WICORE_REDIS__URL": ""}
    assert wicore(environ, "create", "before").exit_code == ExitCode.OK
    with EmbeddedValkey(short_folder):
        assert wicore(environ, "create", "during").exit_code == ExitCode.OK
        assert [line.split()[0] for line in wicore(environ, "list").stdout.splitlines()] == [
            "before",
            "during",
        ]


def test_a_key_in_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WICORE_API_KEY", "mine")
    with Client("http://127.0.0.1:1") as client:
        assert client._http.headers["Authorization"] == "Bearer mine"
