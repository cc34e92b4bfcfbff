"""`GET /metrics`, read back as Prometheus would."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from api.app import create_app
from api.callers import Caller
from api.counts import counts_folder
from api.metrics import LATENCIES, TOKENS, Families, cache_families, worker_families
from api.services import Services, build
from tests.heartbeats import KV, beat
from tests.queue_site import Site
from tests.services import ROOT, follow, running_worker, settings_for, start_api, stop
from tests.waiting import free_port, until
from wicore.request import JobBody, Priority

Samples = dict[tuple[str, ...], float]


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(family: Metric, *labels: str, suffix: str = "") -> Samples:
    """Values by those labels."""
    return {
        tuple(sample.labels[label] for label in labels): sample.value
        for sample in family.samples
        if sample.name.endswith(suffix)
    }


def collected(*heartbeats: dict[str, Any]) -> dict[str, Metric]:
    return families(generate_latest(Families(cache_families(heartbeats))).decode())


@pytest.fixture
def told() -> dict[str, Metric]:
    """The families of one worker."""
    return collected({"worker": "w1", "kv": KV})


def test_blocks_are_a_gauge_whose_states_add_up_to_the_pool(told: dict[str, Metric]) -> None:
    family = told["wicore_kv_blocks"]
    assert family.type == "gauge"
    blocks = samples(family, "worker", "tier", "pool", "state")
    assert blocks[("w1", "device", "global", "cached")] == 2
    assert blocks[("w1", "host", "global", "cached")] == 19
    assert sum(blocks.values()) == 10 + 4 + 20


def test_moves_are_counted_by_pool_and_tiers(told: dict[str, Metric]) -> None:
    family = told["wicore_kv_bytes_moved"]
    assert family.type == "counter"
    assert samples(family, "worker", "pool", "source", "target") == {
        ("w1", "global", "device", "host"): 4096,
        ("w1", "window", "device", "host"): 128,
        ("w1", "global", "host", "device"): 512,
    }
    assert {sample.name for sample in family.samples} == {"wicore_kv_bytes_moved_total"}


def test_hits_are_counted_by_tier_and_misses_by_reason(told: dict[str, Metric]) -> None:
    hits = samples(told["wicore_kv_hit_tokens"], "worker", "tier", suffix="_total")
    assert hits == {("w1", "device"): 640, ("w1", "host"): 64, ("w1", "nvme"): 0}
    misses = samples(told["wicore_kv_miss_blocks"], "worker", "reason", suffix="_total")
    assert misses == {("w1", "absent"): 7, ("w1", "checksum"): 1}


def test_a_histogram_has_cumulative_buckets_a_sum_and_a_count(told: dict[str, Metric]) -> None:
    family = told["wicore_kv_move_seconds"]
    assert family.type == "histogram"
    where = ("worker", "source", "target")
    assert samples(family, *where, "le", suffix="_bucket") == {
        ("w1", "device", "host", "0.001"): 5,
        ("w1", "device", "host", "0.01"): 5,
        ("w1", "device", "host", "+Inf"): 6,
    }
    assert samples(family, *where, suffix="_sum") == {("w1", "device", "host"): 0.25}
    assert samples(family, *where, suffix="_count") == {("w1", "device", "host"): 6}
    ages = samples(told["wicore_kv_victim_age_tokens"], "worker", "tier", "le", suffix="_bucket")
    assert ages == {
        ("w1", "device", "1000.0"): 0,
        ("w1", "device", "10000.0"): 2,
        ("w1", "device", "+Inf"): 2,
    }


def test_each_worker_has_its_own_samples_and_one_that_tells_nothing_has_none() -> None:
    told = collected(
        {"worker": "w1", "kv": KV},
        {"worker": "w2", "kv": {"hit_tokens": {"device": 5}}},
        {"worker": "w3", "kv": None},
        {"worker": "w4"},
    )
    hits = samples(told["wicore_kv_hit_tokens"], "worker", "tier", suffix="_total")
    assert hits[("w1", "device")] == 640
    assert hits[("w2", "device")] == 5
    assert {worker for worker, _ in hits} == {"w1", "w2"}


def test_every_family_is_there_without_a_worker() -> None:
    told = collected()
    assert {"wicore_kv_blocks", "wicore_kv_bytes_moved", "wicore_kv_move_seconds"} < set(told)
    assert all(family.documentation and not family.samples for family in told.values())


def test_images_are_counted_where_a_worker_encodes_any() -> None:
    images = {"encode_seconds": {"bounds": [1.0], "counts": [2, 1], "sum": 4.5}, "cache_hits": 7}
    beats = [{"worker": "w1", "images": images}, {"worker": "w2", "images": None}]
    told = families(generate_latest(Families(worker_families(beats))).decode())
    assert samples(told["wicore_image_cache_hits"], "worker", suffix="_total") == {("w1",): 7}
    counts = samples(told["wicore_image_encode_seconds"], "worker", suffix="_count")
    assert counts == {("w1",): 3}


def test_a_worker_of_an_older_version_has_what_it_tells() -> None:
    told = families(generate_latest(Families(worker_families([{"worker": "w1"}]))).decode())
    assert samples(told["wicore_worker_info"], "worker") == {("w1",): 1}
    assert not told["wicore_time_to_first_token_seconds"].samples


@pytest.fixture
def services(redis_client: Any, valkey_url: str) -> Iterator[Services]:
    services = build(settings_for(valkey_url))
    yield services
    services.relay.close()
    services.redis.close()


def scraped(services: Services) -> dict[str, Metric]:
    answer = create_app(services.settings, services).test_client().get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    return families(answer.text)


@pytest.mark.valkey
def test_the_door_tells_what_live_workers_do(services: Services) -> None:
    beat(services.redis, "w1", kv=KV)
    for _ in range(2):  # and asking counts nothing twice
        hits = samples(scraped(services)["wicore_kv_hit_tokens"], "worker", "tier", suffix="_total")
        assert hits[("w1", "host")] == 64


@pytest.mark.valkey
def test_what_a_worker_serves_is_measured(services: Services) -> None:
    with running_worker(services.settings, "w1") as worker:
        body = JobBody(kind="completion", prompt="Once upon", max_tokens=5, ignore_eos=True)
        jobs = [services.accept(body, Priority.NORMAL, Caller("")).id for _ in range(3)]
        for job in jobs:
            assert list(follow(services.redis, job))[-1]["type"] == "done"
        until(lambda: not worker._held)
        worker._heartbeat._beat()
        told = scraped(services)
    of = ("worker", "model_name")
    who = ("w1", "tiny")
    assert samples(told["wicore_generation_tokens"], *of, suffix="_total") == {who: 15}
    finished = samples(told["wicore_request_success"], "finished_reason", suffix="_total")
    assert finished == {("length",): 3}
    for name in (*(f"{name}_seconds" for name in LATENCIES), *TOKENS):
        count = samples(told[f"wicore_{name}"], *of, suffix="_count")[who]
        buckets = samples(told[f"wicore_{name}"], "le", suffix="_bucket")
        assert buckets[("+Inf",)] == count
        assert count == {"inter_token_latency_seconds": 12}.get(name, 3) or name == "iteration_tokens"
    assert samples(told["wicore_requests_accepted"], suffix="_total") == {(): 3}
    assert samples(told["wicore_requests_leased"], suffix="_total") == {(): 3}
    ended = samples(told["wicore_requests_ended"], "status", suffix="_total")
    assert ended == {("succeeded",): 3, ("failed",): 0, ("cancelled",): 0, ("expired",): 0}


@pytest.mark.valkey
def test_what_dead_workers_leave_is_counted(site: Site, services: Services) -> None:
    site.submit()
    site.worker().pop(1)
    site.lose_workers()
    told = scraped(services)
    assert samples(told["wicore_requests_redelivered"], suffix="_total") == {(): 1}
    waiting = samples(told["wicore_num_requests_waiting"], "priority")
    assert (waiting[("suspect",)], waiting[("normal",)]) == (1, 0)
    site.worker("w2").hand_back(site.worker("w2").pop(1))
    assert samples(scraped(services)["wicore_requests_handed_back"], suffix="_total") == {(): 1}


@pytest.mark.valkey
def test_each_process_of_an_api_counts_for_all_of_them(redis_client: Any, valkey_url: str) -> None:
    settings = settings_for(valkey_url, api__port=free_port(), api__workers=2, telemetry__access_log=False)
    url = f"http://127.0.0.1:{settings.api.port}"
    api = start_api(settings)
    try:
        for _ in range(20):  # a connection each, so that both processes get some
            assert httpx.get(f"{url}/v1/jobs/nobodys").status_code == 404
        for _ in range(6):
            told = families(httpx.get(f"{url}/metrics").text)
            counted = samples(told["wicore_http_requests"], "route", "status", suffix="_total")
            assert counted[("/v1/jobs/<job_id>", "404")] == 20
            count = samples(told["wicore_http_request_duration_seconds"], "route", suffix="_count")
            assert count[("/v1/jobs/<job_id>",)] == 20
    finally:
        stop(api)


@pytest.mark.valkey
def test_a_cleaner_of_temporary_files_costs_counts_and_nothing_else(
    redis_client: Any, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    settings = settings_for(valkey_url, api__port=free_port(), telemetry__access_log=False)
    url = f"http://127.0.0.1:{settings.api.port}"
    api = start_api(settings)
    try:
        (folder,) = tmp_path.glob("wicore-counts-*")
        shutil.rmtree(folder)
        assert httpx.get(f"{url}/metrics").status_code == 200
        shutil.rmtree(folder)
        (old,) = psutil.Process(api.pid).children()
        old.kill()  # a new process takes its place, and begins to count
        until(lambda: [p.pid for p in psutil.Process(api.pid).children() if p.pid != old.pid])
        transport = httpx.HTTPTransport(retries=5)
        with httpx.Client(base_url=url, transport=transport, timeout=20) as client:
            assert client.get("/v1/jobs/nobodys").status_code == 404
            counted = families(client.get("/metrics").text)["wicore_http_requests"]
        assert samples(counted, "status", suffix="_total")[("404",)] == 1
    finally:
        stop(api)


def test_what_a_killed_api_counted_with_is_taken_away_by_the_next_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    other = tmp_path / "wicore-counts-not-ours"
    other.mkdir()
    living, lock = counts_folder()
    script = (
        "import os, signal, sys, tempfile; from api.counts import counts_folder;"
        "tempfile.tempdir = sys.argv[1]; print(counts_folder()[0], flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=False
    )
    left = Path(killed.stdout.strip())
    assert left.is_dir()
    following, its_lock = counts_folder()
    assert set(tmp_path.iterdir()) == {other, Path(living), Path(following)}
    os.close(lock)
    os.close(its_lock)


def test_without_redis_the_door_is_unavailable() -> None:
    away = settings_for("unix:///nowhere/at/all.sock")
    answer = create_app(away).test_client().get("/metrics")
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "unavailable")


# --- dashboard and alerts -------------------------------------------------------------------------


def exposed(told: dict[str, Metric]) -> set[str]:
    """Names by which samples can be asked for."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return {f"{name}{suffix}" for name, family in told.items() for suffix in suffixes[family.type]}


DASHBOARD = ROOT / "docker/grafana/dashboards/wicore.json"


def expressions() -> Iterator[str]:
    """Every query of the dashboard and of the alert rules."""
    board = json.loads(DASHBOARD.read_text())
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (variable["query"]["query"] for variable in board["templating"]["list"][1:])
    for group in yaml.safe_load((ROOT / "docker/prometheus/rules.yml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


@pytest.mark.valkey
def test_every_metric_of_the_dashboard_and_the_alerts_exists(services: Services) -> None:
    names = {name for text in expressions() for name in re.findall(r"\bwicore_\w+", text)}
    assert len(names) > 25
    assert names <= exposed(scraped(services))


@pytest.mark.valkey
def test_metrics_are_named_as_prometheus_wants_it(services: Services) -> None:
    beat(services.redis, "w1", kv=KV)
    told = scraped(services)
    for name, family in told.items():
        assert re.fullmatch(r"wicore_[a-z0-9_]+", name)
        assert family.documentation.endswith(".")
        assert not name.endswith(("_count", "_sum", "_bucket", "_total", "_ms", "_milliseconds"))
        labels = {frozenset(sample.labels.keys() - {"le"}) for sample in family.samples}
        assert len(labels) <= 1, name
        assert not any(label.startswith("__") for found in labels for label in found)
    text = "".join(name for name in told)
    assert "created" not in text


def test_panels_of_the_dashboard_neither_overlap_nor_share_an_id() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_grafana_s_own_models_read_the_dashboard_and_leave_nothing_out() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="it is made for Python 3.11 and newer")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard, Panel
    from grafana_foundation_sdk.models.prometheus import Dataquery

    register_default_plugins()
    written = json.loads(DASHBOARD.read_text())
    board = Dashboard.from_json(written)
    assert list(left_out(written, json.loads(JSONEncoder().encode(board)))) == []
    queries = [query for panel in board.panels if isinstance(panel, Panel) for query in panel.targets or ()]
    assert len(queries) > 25
    assert all(isinstance(query, Dataquery) for query in queries)


def left_out(written: Any, read: Any, path: str = "") -> Iterator[str]:
    """Where `read` does not say what `written` does."""
    if isinstance(written, dict) and isinstance(read, dict):
        for key, value in written.items():
            yield from left_out(value, read.get(key), f"{path}.{key}")
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        for index, value in enumerate(written):
            yield from left_out(value, read[index], f"{path}.{index}")
    elif written != read:
        yield path
