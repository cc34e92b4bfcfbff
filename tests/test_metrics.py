"""`GET /metrics`, read back as Prometheus would."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from api.app import create_app
from api.metrics import CacheCollector
from api.services import build
from tests.heartbeats import KV, beat
from tests.services import settings_for

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
    return families(generate_latest(CacheCollector(heartbeats)).decode())


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
    assert set(told) == {
        *("wicore_kv_blocks", "wicore_kv_bytes_moved", "wicore_kv_hit_tokens", "wicore_kv_miss_blocks"),
        *("wicore_kv_move_seconds", "wicore_kv_victim_age_tokens"),
    }
    assert all(family.documentation and not family.samples for family in told.values())


@pytest.mark.valkey
def test_the_door_tells_what_live_workers_do(redis_client: Any, valkey_url: str) -> None:
    services = build(settings_for(valkey_url))
    client = create_app(services.settings, services).test_client()
    beat(services.redis, "w1", kv=KV)
    for _ in range(2):  # and asking counts nothing twice
        answer = client.get("/metrics")
        assert answer.status_code == 200
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        hits = samples(families(answer.text)["wicore_kv_hit_tokens"], "worker", "tier", suffix="_total")
        assert hits[("w1", "host")] == 64
    services.relay.close()
    services.redis.close()


def test_without_redis_the_door_is_unavailable() -> None:
    away = settings_for("unix:///nowhere/at/all.sock")
    answer = create_app(away).test_client().get("/metrics")
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "unavailable")
