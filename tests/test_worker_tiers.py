"""The KV tiers in a real worker on a real queue: restarts, kills, and the look ahead."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from api.metrics import Families, cache_families
from tests.services import follow, running_worker, settings_for, worker_process
from tests.waiting import until
from wicore.queue.producer import Producer
from wicore.request import Priority, parse_job

pytestmark = pytest.mark.valkey

LONG = "A long story about a small village by the sea. " * 12


def submit(client, prompt: str, max_tokens: int = 6, **fields: object) -> str:
    body = {"kind": "completion", "prompt": prompt, "temperature": 0.0, "ignore_eos": True, **fields}
    return Producer(client).submit(parse_job(body | {"max_tokens": max_tokens}), Priority.NORMAL).id


def text(client, job: str) -> str:
    return "".join(event["text"] for event in follow(client, job) if event["type"] == "token")


def tiered(url: str, folder: Path, **overrides: object):
    sizes = {"hmt__host_bytes": 8 * 2**20, "hmt__nvme_path": str(folder), "hmt__nvme_bytes": 16 * 2**20}
    return settings_for(url, **sizes | overrides)


def kv(worker) -> dict:
    return worker.status()["kv"]


def test_a_restarted_worker_goes_on_from_what_the_file_holds(redis_client, valkey_url, tmp_path) -> None:
    with running_worker(tiered(valkey_url, tmp_path), "first") as worker:
        expected = text(redis_client, submit(redis_client, LONG))
        assert kv(worker)["hit_tokens"].get("nvme", 0) == 0
    with running_worker(tiered(valkey_url, tmp_path), "second") as worker:
        assert text(redis_client, submit(redis_client, LONG)) == expected
        assert kv(worker)["hit_tokens"]["nvme"] > 100
        assert kv(worker)["direct_io"] in (True, False)


def test_a_job_whose_worker_was_killed_resumes_with_the_blocks_it_left(
    redis_client, valkey_url, tmp_path
) -> None:
    settings = tiered(valkey_url, tmp_path)
    with running_worker(tiered(valkey_url, tmp_path / "other"), "undisturbed"):
        expected = text(redis_client, submit(redis_client, LONG, 200))
    process = worker_process(settings)
    job = submit(redis_client, LONG, 200)
    heard = 0
    for event in follow(redis_client, job):
        heard += event["type"] == "token"
        if heard == 60:
            break
    process.kill()
    process.wait()
    with running_worker(settings, "heir") as worker:
        assert text(redis_client, job) == expected
        assert kv(worker)["hit_tokens"]["nvme"] > 100


def test_prefixes_of_jobs_that_wait_in_the_queue_are_raised_meanwhile(
    redis_client, valkey_url, tmp_path
) -> None:
    with running_worker(tiered(valkey_url, tmp_path), "first"):
        expected = text(redis_client, submit(redis_client, LONG))
    settings = tiered(valkey_url, tmp_path, scheduler__max_batch=1)
    with running_worker(settings, "second") as worker:
        busy = submit(redis_client, "Something else entirely", 2000, n=1)
        until(lambda: worker.status()["running"], "the first job runs")
        job = submit(redis_client, LONG)
        until(lambda: kv(worker)["moved_bytes"].get("nvme>host"), "its prefix is raised")
        assert Producer(redis_client).record(job).status == "queued"
        Producer(redis_client).cancel(busy)
        assert text(redis_client, job) == expected
        assert kv(worker)["hit_tokens"]["host"] > 100
        assert kv(worker)["hit_tokens"].get("nvme", 0) == 0


def test_what_a_worker_tells_of_its_tiers_is_fit_for_prometheus(redis_client, valkey_url, tmp_path) -> None:
    with running_worker(tiered(valkey_url, tmp_path)) as worker:
        text(redis_client, submit(redis_client, LONG))
        text(redis_client, submit(redis_client, LONG))
        until(lambda: kv(worker)["moved_bytes"].get("host>nvme"), "blocks are saved")
        told = [{"worker": "w", "kv": kv(worker)}]
    found = {
        (
            sample.name,
            *(sample.labels.get(name) for name in ("tier", "pool", "source", "target")),
        ): sample.value
        for family in text_string_to_metric_families(generate_latest(Families(cache_families(told))).decode())
        for sample in family.samples
    }
    assert found["wicore_kv_hit_tokens_total", "device", None, None, None] > 100
    assert found["wicore_kv_bytes_moved_total", None, "global", "host", "nvme"] > 0
    assert found["wicore_kv_move_seconds_count", None, None, "device", "host"] > 0
    states = [
        v for (name, *at), v in found.items() if name == "wicore_kv_blocks" and at[:2] == ["nvme", "global"]
    ]
    assert states
