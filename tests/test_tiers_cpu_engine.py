"""The CPU engine under the scheduler with every tier: the same bytes, whatever lies where."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.engines import FIXTURES
from tests.workload import Server, folder_settings, mixed_jobs, settings_of
from wicore.engine.cpu import CpuEngine
from wicore.engine.sizing import kv_format, kv_layout, tier_sizes
from wicore.gemma3.checkpoint import Checkpoint, open_checkpoint

JOBS = mixed_jobs(200, 500, longest=560, output=8)
UNLIMITED = 200_000


def server(checkpoint: Checkpoint, **overrides: object) -> Server:
    steps = {"hmt__block_tokens": 16, "scheduler__max_batch": 8, "scheduler__token_budget": 128}
    settings = settings_of(**steps | overrides)
    device = tier_sizes(settings, kv_layout(settings, checkpoint.config)).device
    engine = CpuEngine(
        checkpoint,
        weights="float32",
        kv=kv_format(settings.engine),
        threads=1,
        block_tokens=16,
        global_blocks=device["global"],
        window_blocks=device["window"],
    )
    return Server(settings, engine)


def run(service: Server, jobs=JOBS) -> list[list[int]]:
    outputs = service.serve(jobs)
    service.flush()
    service.scheduler.check()
    service.close()
    return outputs


@pytest.fixture(scope="module", params=["float32", "int8"])
def unlimited(request) -> tuple[str, list[list[int]], int]:
    """(KV format, output of every job, tokens of the working set) when the device holds everything."""
    checkpoint = open_checkpoint(FIXTURES / "tiny")
    service = server(checkpoint, engine__kv=request.param, hmt__device_tokens=UNLIMITED, hmt__host_bytes=0)
    outputs = run(service)
    stats = service.cache.manager.stats.global_pool
    return request.param, outputs, (stats.total - stats.free) * 16


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2, 0.05])
def test_output_does_not_depend_on_how_much_the_device_holds(share, unlimited, tmp_path: Path) -> None:
    kv, expected, working_set = unlimited
    service = server(
        open_checkpoint(FIXTURES / "tiny"),
        engine__kv=kv,
        hmt__device_tokens=max(256, int(working_set * share)),
        hmt__host_bytes=(5 if kv == "float32" else 2) * 2**20,
        **folder_settings(tmp_path, 48),
    )
    assert run(service) == expected
    stats = service.cache.manager.stats
    device = stats.pools["device"]["global"]
    assert device.lost <= device.evicted / 100  # what had to grow at once, before it was saved
    if share < 0.3:
        assert stats.hit_tokens["host"] > 0
    if share < 0.1:
        assert service.scheduler.preemptions > 0
        assert service.streamed_steps > 0


def test_kv_of_a_checkpoint_that_was_changed_under_its_path_is_never_used(tmp_path: Path) -> None:
    path, folder = tmp_path / "model", folder_settings(tmp_path / "kv", 48)
    shutil.copytree(FIXTURES / "tiny", path)
    jobs = JOBS[:10]
    run(server(open_checkpoint(path), **folder), jobs)
    again = server(open_checkpoint(path), **folder)
    assert again.cache.manager.stats.pools["nvme"]["global"].cached > 0
    again.close()
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2000] ^= 0x10  # one bit of one weight
    weights.write_bytes(data)
    changed = server(open_checkpoint(path), **folder)
    assert changed.cache.manager.stats.pools["nvme"]["global"].cached == 0
    run(changed, jobs)
    assert changed.cache.manager.stats.hit_tokens.get("nvme", 0) == 0
