"""Settings: sources, precedence, and errors that name key, value and fix."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from wicore.config import FIELDS, Settings, default_yaml, load_settings, load_with_sources, variable
from wicore.errors import ConfigError

ROOT = Path(__file__).parent.parent


def written(tmp_path: Path, text: str, name: str = "mine.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def message(**sources: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(**{"environ": {}, **sources})  # type: ignore[arg-type]
    assert "\n" not in caught.value.message
    return caught.value.message


def test_without_any_source_the_defaults_hold() -> None:
    assert load_settings(environ={}) == Settings()


def test_the_default_file_states_every_default() -> None:
    path = ROOT / "configs" / "default.yaml"
    assert path.read_text() == default_yaml()
    settings, sources = load_with_sources(path, {})
    assert settings == Settings()
    assert set(sources.values()) == {str(path)}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_file_that_ships_is_valid(path: Path) -> None:
    load_settings(path, {})


def test_every_setting_says_what_it_means() -> None:
    assert [key for key, field in FIELDS.items() if not field.description] == []


def test_later_sources_win_key_by_key(tmp_path: Path) -> None:
    first = written(tmp_path, "api: {port: 1, host: a}\nqueue: {lease_s: 1}\n", "first.yaml")
    second = written(tmp_path, "api: {port: 2}\nscheduler: {max_batch: 2}\n", "second.yaml")
    environ = {"WICORE_API__PORT": "3", "WICORE_SCHEDULER__MAX_BATCH": "3"}
    settings, sources = load_with_sources([first, second], environ, {"api.port": 4, "api.workers": None})
    assert (settings.queue.lease_s, settings.scheduler.max_batch, settings.api.port) == (1.0, 3, 4)
    assert settings.api.host == "a"
    assert sources["queue.lease_s"] == str(first)
    assert sources["scheduler.max_batch"] == "the environment"
    assert sources["api.port"] == "the command line"
    assert sources["api.workers"] == "default"


def test_the_environment_names_the_files_when_none_is_given(tmp_path: Path) -> None:
    first = written(tmp_path, "api: {port: 1}\n", "first.yaml")
    second = written(tmp_path, "api: {port: 2}\n", "second.yaml")
    environ = {"WICORE_CONFIG": f"{first}:{second}"}
    assert load_settings(environ=environ).api.port == 2
    assert load_settings(first, environ).api.port == 1


@pytest.mark.parametrize("name", ["WICORE_API__PORT", "wicore_api__port", "Wicore_Api__Port"])
def test_variables_are_read_in_any_case(name: str) -> None:
    assert load_settings(environ={name: "81"}).api.port == 81


def test_every_setting_can_be_set_by_its_variable() -> None:
    for key, field in FIELDS.items():
        section, name = key.split(".")
        text = "null" if field.default is None else str(field.default).lower()
        if isinstance(field.default, str):
            text = field.default
        settings, sources = load_with_sources(environ={variable(key): text})
        assert sources[key] == "the environment"
        assert getattr(getattr(settings, section), name) == field.default


def test_an_empty_variable_counts_as_unset_and_null_as_none(tmp_path: Path) -> None:
    path = written(tmp_path, "redis: {url: 'redis://there'}\n")
    assert load_settings(path, {"WICORE_REDIS__URL": ""}).redis.url == "redis://there"
    assert load_settings(path, {"WICORE_REDIS__URL": "null"}).redis.url is None


def test_variables_of_others_and_the_documented_exceptions_are_left_alone() -> None:
    assert load_settings(environ={"PATH": "/bin", "WICORE_CACHE": "/c"}) == Settings()


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({"WICORE_API__PROT": "1"}, ["WICORE_API__PROT", "did you mean WICORE_API__PORT?"]),
        ({"wicore_api__prot": "1"}, ["wicore_api__prot", "did you mean WICORE_API__PORT?"]),
        ({"WICORE_API_PORT": "1"}, ["WICORE_API_PORT", "did you mean WICORE_API__PORT?"]),
        ({"WICORE_API__PORT__X": "1"}, ["WICORE_API__PORT__X", "unknown setting"]),
        ({"WICORE_SCHEDULER__PORT": "1"}, ["WICORE_SCHEDULER__PORT", "did you mean WICORE_API__PORT?"]),
        ({"WICORE_COLOUR": "1"}, ["WICORE_COLOUR", "unknown setting", "wicore config defaults"]),
        ({"WICORE_API": "{}"}, ["WICORE_API", "is a section", "WICORE_API__HOST"]),
        ({"WICORE_API__PORT": "99999"}, ["WICORE_API__PORT", "99999", "at least 1, at most 65535"]),
        ({"WICORE_API__PORT": "http"}, ["WICORE_API__PORT", "http", "a whole number"]),
        ({"WICORE_ENGINE__KIND": "gpu"}, ["WICORE_ENGINE__KIND", "gpu", "one of cpu, null, tensorrt"]),
        ({"WICORE_QUEUE__LEASE_S": "nan"}, ["WICORE_QUEUE__LEASE_S", "nan", "at least 0.2"]),
        ({"WICORE_QUEUE__DRAIN_S": "inf"}, ["WICORE_QUEUE__DRAIN_S", "inf"]),
        ({"WICORE_HMT__PREFIX_CACHE": "maybe"}, ["WICORE_HMT__PREFIX_CACHE", "maybe", "true or false"]),
    ],
)
def test_a_bad_variable_is_named_with_its_fix(environ: dict[str, str], parts: list[str]) -> None:
    text = message(environ=environ)
    assert [part for part in parts if part not in text] == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("api: {prot: 1}", ["api.prot in ", "mine.yaml", "did you mean api.port?"]),
        ("aip: {port: 1}", ["aip.port in ", "did you mean api.port?"]),
        ("api: 5", ["api in ", "is a section", "api.port"]),
        ("other:", ["other in ", "unknown setting"]),
        ("api: {1: 2}", ["api.1 in ", "unknown setting"]),
        ("api: {port: [1]}", ["api.port in ", "[1]", "a whole number"]),
        ("model: {path: 5}", ["model.path in ", "5", "text"]),
        ("hmt: {block_tokens: 3}", ["hmt.block_tokens in ", "3", "at least 16, at most 128"]),
        ("api: {port: null}", ["api.port in ", "null", "a whole number"]),
        ("- 1", ["mine.yaml", "must be a mapping"]),
        ("5", ["mine.yaml", "must be a mapping"]),
        ("api: [", ["mine.yaml", "not readable as YAML", "line 1"]),
        ("api: \x00", ["mine.yaml", "not readable as YAML"]),
    ],
)
def test_a_bad_file_is_named_with_its_fix(tmp_path: Path, text: str, parts: list[str]) -> None:
    told = message(file=written(tmp_path, text))
    assert [part for part in parts if part not in told] == []


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_settings(written(tmp_path, ""), {}) == Settings()
    assert load_settings(written(tmp_path, "api:\n"), {}) == Settings()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    assert "no such settings file" in message(file=tmp_path / "none.yaml")
    assert "no such settings file" in message(environ={"WICORE_CONFIG": str(tmp_path / "none.yaml")})


def test_an_override_is_checked_like_any_source() -> None:
    assert "did you mean api.port?" in message(overrides={"api.prot": 1})
    assert "api.port: 0" in message(overrides={"api.port": 0})


def test_a_password_in_a_bad_url_is_never_shown() -> None:
    text = message(environ={"WICORE_REDIS__URL": "http://me:pa:ss@w0rd/x@host/0"})
    assert "http://me:***@host/0" in text
    assert "w0rd" not in text


def test_the_error_carries_the_key_as_it_was_written() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(environ={"wicore_api__port": "x"})
    assert caught.value.param == "wicore_api__port"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Settings().api.port = 1  # type: ignore[misc]


def test_the_null_engine_can_be_named_in_a_variable(tmp_path):
    assert load_settings(environ={"WICORE_ENGINE__KIND": "null"}).engine.kind == "null"
    file = tmp_path / "settings.yaml"
    file.write_text("engine: {kind: null}")
    assert load_settings(file, environ={}).engine.kind == "null"
