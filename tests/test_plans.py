"""The folder of plans: what counts as sound, what is built, and `wicore plan`."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.fake_tensorrt import FakeTensorRT
from wicore.cli import main
from wicore.engine.tensorrt import networks, plans, trt_api
from wicore.engine.tensorrt.networks import KINDS, SegmentShape
from wicore.engine.tensorrt.plans import (
    PlanCache,
    PlanKey,
    Tuning,
    build_missing,
    build_plan,
    parse_buckets,
    plan_keys,
    plans_folder,
    useful_buckets,
)
from wicore.engine.tensorrt.trt_api import Backend, Card, find_card, load_backend
from wicore.engine.tensorrt.vision_networks import VISION_KINDS, VisionShape
from wicore.errors import EngineError
from wicore.exit_codes import ExitCode
from wicore.gemma3.config import PUBLISHED, VisionConfig

SHAPE = SegmentShape(hidden=64, inner=96, attention=64, qkv=128, vocab=512, eps=1e-6)
KEY = PlanKey("tensorrt", "8.6.0", "9.0", "middle", "float16", 64, SHAPE)
TOWER = VisionConfig(1152, 27, 16, 4304, 896, 14, 256, 1e-6, 255_999, 256_000, 262_144)
NEWER = dataclasses.replace(KEY, version="11.0.0")
H200 = Card("NVIDIA H200", "9.0", "13.0")


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "plans")


@pytest.fixture(scope="session")
def rtx() -> Backend:
    """TensorRT for RTX, which builds without a GPU."""
    if not os.environ.get("CI"):
        pytest.importorskip("tensorrt_rtx")
    return load_backend("tensorrt_rtx")


def installed(version: str, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """TensorRT on an H200, in this process."""
    module = FakeTensorRT(version)
    backend = Backend("tensorrt", module)
    monkeypatch.setattr(plans, "load_backend", lambda name: backend)
    monkeypatch.setattr(plans, "find_card", lambda: H200)
    return module


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    return installed("8.6.0", monkeypatch)


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    return installed("11.0.0", monkeypatch)


# --- the folder ---------------------------------------------------------------------------------


def test_a_plan_comes_back_as_it_was_stored(cache: PlanCache) -> None:
    assert cache.load(KEY) is None
    path = cache.store(KEY, b"plan" * 1000)
    assert cache.load(KEY) == b"plan" * 1000
    assert path.name == f"{KEY.digest}.plan"
    assert os.listdir(cache.folder) == [path.name]  # nothing half-written stays


CHANGES: dict[str, Any] = {
    "backend": "tensorrt_rtx",
    "version": "10.0.1",
    "capability": "8.9",
    "kind": "last",
    "half": "bfloat16",
    "rows": 128,
    "shape": dataclasses.replace(SHAPE, eps=1e-5),
    "revision": networks.REVISION + 1,
}


def test_every_part_of_the_key_tells_plans_apart(cache: PlanCache) -> None:
    assert CHANGES.keys() == {field.name for field in dataclasses.fields(PlanKey)}
    cache.store(KEY, b"plan")
    for name, value in CHANGES.items():
        assert cache.load(dataclasses.replace(KEY, **{name: value})) is None, name


def test_a_key_survives_its_text() -> None:
    assert PlanKey.parse(KEY.text()) == KEY
    tower = VisionShape.of(PUBLISHED["gemma-3-27b"])
    key = dataclasses.replace(KEY, kind="vision_middle", shape=tower)
    assert PlanKey.parse(key.text()) == key


def cut(data: bytes) -> bytes:
    return data[:-1]


def longer(data: bytes) -> bytes:
    return data + b"x"


def flipped(data: bytes) -> bytes:
    return data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]


def emptied(data: bytes) -> bytes:
    return b""


def of_another_format(data: bytes) -> bytes:
    return b"ftrt" + data[4:]


def huge_key(data: bytes) -> bytes:
    return data[:12] + b"\xff\xff\xff\xff" + data[16:]


DAMAGES = [cut, longer, flipped, emptied, of_another_format, huge_key]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_file_counts_as_absent_and_is_told_of(
    cache: PlanCache, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    path = cache.store(KEY, b"plan" * 100)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.load(KEY) is None
    assert str(path) in caplog.text
    assert cache.missing([KEY]) == [KEY]
    (entry,) = cache.entries()
    assert (entry.problem or "").startswith("damaged: ")


def test_a_plan_under_anothers_name_counts_as_absent(
    cache: PlanCache, caplog: pytest.LogCaptureFixture
) -> None:
    other = dataclasses.replace(KEY, rows=512)
    cache.store(KEY, b"plan").rename(cache.path(other))
    assert cache.load(other) is None
    assert "another key" in caplog.text


def test_a_folder_that_cannot_be_written_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="set WICORE_CACHE"):
        PlanCache(tmp_path / "file").store(KEY, b"plan")


def test_entries_are_listed_newest_first_and_old_revisions_marked(cache: PlanCache) -> None:
    old = dataclasses.replace(KEY, revision=0)
    os.utime(cache.store(old, b"old"), (1, 1))
    cache.store(KEY, b"new")
    found = [(entry.key, entry.problem) for entry in cache.entries()]
    assert found == [(KEY, None), (old, f"of network revision 0; this is {networks.REVISION}")]


def test_the_folder_is_beside_the_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WICORE_CACHE", str(tmp_path))
    assert plans_folder() == tmp_path / "plans"


def test_a_model_has_every_kind_at_every_bucket_but_a_small_head(fake: FakeTensorRT) -> None:
    keys = plan_keys(Backend("tensorrt", fake), "9.0", SHAPE, (64, 512))
    bodies = [(kind, rows) for kind in ("first", "middle", "last") for rows in (64, 512)]
    assert [(key.kind, key.rows) for key in keys] == [*bodies, ("head", 64)]


def test_buckets_larger_than_a_step_are_left_out() -> None:
    buckets = parse_buckets("512,64,2048,8192")
    assert buckets == (64, 512, 2048, 8192)
    assert useful_buckets(buckets, 512) == (64, 512)
    assert useful_buckets(buckets, 513) == (64, 512, 2048)
    assert useful_buckets(buckets, 16) == (64,)
    assert useful_buckets(buckets, 100_000) == buckets


# --- building -----------------------------------------------------------------------------------


def test_plans_are_built_in_parallel_and_only_once(rtx: Backend, cache: PlanCache) -> None:
    keys = plan_keys(rtx, "8.9", SHAPE, (16, 64))
    told: list[PlanKey] = []
    built = build_missing(cache, keys, jobs=2, on_built=lambda one: told.append(one.key))
    assert sorted(key.digest for key in told) == sorted(key.digest for key in keys)
    assert all(one.path.is_file() and one.nbytes > 1000 for one in built)
    assert build_missing(cache, keys, jobs=2) == []


def test_a_damaged_plan_is_built_again_and_no_other(rtx: Backend, cache: PlanCache) -> None:
    keys = plan_keys(rtx, "8.9", SHAPE, (16,), kinds=("first", "head"))
    for key in keys:
        build_plan(key, cache)
    path = cache.path(keys[1])
    path.write_bytes(flipped(path.read_bytes()))
    assert [one.key for one in build_missing(cache, keys)] == [keys[1]]
    assert cache.missing(keys) == []


def test_an_error_in_a_building_process_arrives_as_itself(rtx: Backend, cache: PlanCache) -> None:
    keys = plan_keys(rtx, "9.0", SHAPE, (16,), kinds=("head",))
    with pytest.raises(EngineError, match=r"builds for compute capability .*; not 9\.0"):
        build_missing(cache, keys)
    assert cache.entries() == []


class Terminal(io.StringIO):
    """Standard error as a person has it."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_shows_how_far_it_is(
    rtx: Backend, cache: PlanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(plans.sys, "stderr", terminal)
    build_missing(cache, plan_keys(rtx, "8.9", SHAPE, (16,), kinds=("head",)))
    assert "building plans:   0%" in terminal.getvalue()
    assert "100%" in terminal.getvalue()


def dying(*_: object) -> None:
    os._exit(9)


def test_a_building_process_that_dies_is_an_error(
    rtx: Backend, cache: PlanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "build_plan", dying)
    with pytest.raises(EngineError, match="died"):
        build_missing(cache, plan_keys(rtx, "8.9", SHAPE, (16,), kinds=("head",)))


def test_a_plan_of_another_version_is_not_built_by_this_one(fake: FakeTensorRT, cache: PlanCache) -> None:
    with pytest.raises(EngineError, match=r"of tensorrt 10\.1; 8\.6\.0 is installed"):
        build_plan(dataclasses.replace(KEY, version="10.1"), cache)


def test_tensorrt_builds_for_the_card_that_is_there_only(
    fake: FakeTensorRT, cache: PlanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match=r"NVIDIA H200 has compute capability 9\.0, not 8\.9"):
        build_plan(dataclasses.replace(KEY, capability="8.9"), cache)
    monkeypatch.setattr(plans, "find_card", lambda: None)
    with pytest.raises(EngineError, match=r"there is none here.*--backend tensorrt_rtx"):
        build_plan(KEY, cache)


def test_what_tensorrt_measured_is_kept_for_the_next_build(newer: FakeTensorRT, cache: PlanCache) -> None:
    build_plan(NEWER, cache)
    build_plan(dataclasses.replace(NEWER, rows=512), cache)
    assert newer.builders[1].config.timing.lines == {b"kernel0", b"kernel1"}
    (path,) = cache.folder.glob("timing-*.cache")
    assert path.read_bytes() == b"kernel0 kernel1"


def test_tensorrt_8_is_not_given_measurements_that_it_cannot_read(
    fake: FakeTensorRT, cache: PlanCache
) -> None:
    build_plan(KEY, cache)
    assert fake.builders[0].config.timing is None
    assert not list(cache.folder.glob("timing-*"))


def test_builders_that_end_together_lose_no_measurement(newer: FakeTensorRT, cache: PlanCache) -> None:
    threads = [
        threading.Thread(target=build_plan, args=(dataclasses.replace(NEWER, rows=1 + i), cache))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = {line for builder in newer.builders for line in builder.config.timing.lines}
    (path,) = cache.folder.glob("timing-*.cache")
    assert set(path.read_bytes().split()) == seen


def test_without_a_driver_there_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(trt_api.ctypes, "CDLL", absent)
    assert find_card() is None


# --- tuning -------------------------------------------------------------------------------------

TUNED: dict[str, str | int] = {"card": "NVIDIA H200", "driver": "580", "revision": 3}


def test_tuning_comes_back_under_its_own_key_only(tmp_path: Path) -> None:
    assert Tuning.load(tmp_path, TUNED) is None
    path = Tuning(TUNED, {"qkv": {"64": "skinny"}}).save(tmp_path)
    assert re.fullmatch(r"tuning-[0-9a-f]{32}\.json", path.name)
    loaded = Tuning.load(tmp_path, dict(reversed(TUNED.items())))
    assert loaded is not None
    assert loaded.values == {"qkv": {"64": "skinny"}}
    assert Tuning.load(tmp_path, TUNED | {"revision": 4}) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"key": {}}', '{"key": 1, "values": {}}', "\xff"])
def test_damaged_tuning_counts_as_absent(tmp_path: Path, text: str) -> None:
    Tuning(TUNED, {}).save(tmp_path).write_bytes(text.encode("latin-1"))
    assert Tuning.load(tmp_path, TUNED) is None


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("WICORE_CACHE", str(tmp_path))
    monkeypatch.delenv("WICORE_CONFIG", raising=False)
    return tmp_path


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["plan", *arguments])


def test_building_needs_a_models_name_only_and_listing_shows_what_came(
    here: Path, rtx: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dataclasses.replace(PUBLISHED["gemma-3-27b"], vision=TOWER)
    monkeypatch.setattr("wicore.commands.plan.published", lambda name: model)
    config = here / "mine.yaml"
    config.write_text("model: {path: gemma-3-27b}\nengine: {plan_rows: '16,64,512'}\n")
    options = [
        "--config",
        str(config),
        "--backend",
        "tensorrt_rtx",
        "--compute-capability",
        "8.9",
        "--jobs",
        "2",
    ]
    result = run("build", *options, "--rows", "16")
    assert result.exit_code == ExitCode.OK, result.output
    assert f"8 plans of tensorrt_rtx {rtx.version} for compute capability 8.9" in result.stdout
    assert "8 built" in result.stdout
    assert "middle segment, 16 rows" in result.stderr
    assert "0 built" in run("build", *options, "--rows", "16").stdout

    found = json.loads(run("list", "--json").stdout)
    assert sorted(entry["key"]["kind"] for entry in found) == sorted((*KINDS, *VISION_KINDS))
    widths = {entry["key"]["kind"]: entry["key"]["shape"]["hidden"] for entry in found}
    assert widths == dict.fromkeys(KINDS, 5376) | dict.fromkeys(VISION_KINDS, 1152)
    assert all(entry["bytes"] > 1000 and entry["age_s"] >= 0 for entry in found)
    assert {(entry["fits"], entry["reason"]) for entry in found} == {(False, "no GPU here")}
    shown = run("list").stdout
    assert shown.count("does not fit: no GPU here") == 8
    assert "hidden 5376, inner 21504" in shown


def test_rebuild_builds_what_is_there(here: Path, rtx: Backend) -> None:
    options = ["--backend", "tensorrt_rtx", "--compute-capability", "8.9", "--rows", "16"]
    for extra, built in ([], 4), ([], 0), (["--rebuild"], 4):
        result = run("build", *options, *extra)
        assert f"{built} built" in result.stdout, result.output


def test_a_list_says_what_fits_this_machine(
    here: Path, fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PlanCache(plans_folder())
    for change in ({}, {"version": "8.5.3"}, {"capability": "8.9"}, {"backend": "tensorrt_rtx"}):
        cache.store(dataclasses.replace(KEY, **change), b"plan")
    (cache.folder / "torn.plan").write_bytes(b"WICORE")
    monkeypatch.setattr(trt_api, "find_card", lambda: H200)
    monkeypatch.setattr(trt_api, "installed_backends", lambda: [Backend("tensorrt", fake)])
    reasons = {entry["reason"] for entry in json.loads(run("list", "--json").stdout)}
    assert reasons == {
        None,
        "tensorrt 8.6.0 is installed",
        "the GPU here is 9.0",
        "tensorrt_rtx is not installed",
        "damaged: not a plan file of this version",
    }


def test_an_empty_list_names_the_command_that_fills_it(here: Path) -> None:
    result = run("list")
    assert (result.exit_code, result.stdout) == (ExitCode.OK, "")
    assert "`wicore plan build`" in result.stderr
    assert json.loads(run("list", "--json").stdout) == []


def test_without_a_gpu_the_card_must_be_named(here: Path, rtx: Backend) -> None:
    result = run("build", "--backend", "tensorrt_rtx")
    assert result.exit_code == ExitCode.CONFIG
    assert "--compute-capability" in result.stderr


def test_without_any_tensorrt_the_extras_are_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_api, "installed_backends", lambda: [])
    result = run("build", "--compute-capability", "8.9")
    assert result.exit_code == ExitCode.INTERNAL
    assert "wicore[gpu]" in result.stderr


@pytest.mark.parametrize("rows", ["a", "64,", "64,x"])
def test_bad_rows_are_a_usage_error(here: Path, rows: str) -> None:
    assert run("build", "--rows", rows).exit_code == ExitCode.USAGE
