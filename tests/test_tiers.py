"""The engine under the scheduler with host memory and a file below: what tiers must never change."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from errno import EIO, ENOSPC
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checking_engine import VOCABULARY, CheckingEngine, checking_layout
from tests.waiting import until
from tests.workload import Job, Server, folder_settings, mixed_jobs, settings_of
from wicore.engine.base import Completed, SequenceInput, StepPlan
from wicore.engine.sizing import tier_sizes
from wicore.hmt.moves import Fault, Move, Outcome
from wicore.tiers.block_file import BlockFile

LONGEST = 900
JOBS = mixed_jobs(200, VOCABULARY, longest=LONGEST)
FEW = JOBS[:60]
UNLIMITED = 200_000
STEPS = {"hmt__block_tokens": 16, "scheduler__max_batch": 8, "scheduler__token_budget": 128}


def server(**overrides: object) -> Server:
    """Around the engine that verifies whatever KV it reads."""
    settings = settings_of(**STEPS | overrides)
    layout = checking_layout(16, window=64)
    device = tier_sizes(settings, layout).device
    return Server(settings, CheckingEngine(layout, device["global"], device["window"]))


def small(folder: Path, **overrides: object) -> Server:
    """A device and host memory that hold little, and a file in `folder` that holds all."""
    sizes = {"hmt__device_tokens": 1024, "hmt__host_bytes": 100_000, **folder_settings(folder, 16)}
    return server(**sizes | overrides)


def run(service: Server, jobs: Sequence[Job], **options: Callable[[], None]) -> list[list[int]]:
    """Serve, save everything, and stop in good order."""
    outputs = service.serve(jobs, **options)
    service.flush()
    service.scheduler.check()
    service.close()
    return outputs


def misses(service: Server) -> Mapping[str, int]:
    return service.cache.manager.traffic.misses


@pytest.fixture(scope="module")
def few() -> list[list[int]]:
    """Output of FEW when the device holds everything."""
    return run(server(hmt__device_tokens=UNLIMITED, hmt__host_bytes=0), FEW)


def test_a_restart_finds_what_the_file_holds(few, tmp_path: Path) -> None:
    first = small(tmp_path)
    assert run(first, FEW) == few
    again = small(tmp_path)
    assert run(again, FEW) == few
    assert again.cache.manager.stats.hit_tokens["nvme"] > 0
    assert again.prefilled < first.prefilled / 2


def test_preempted_sequences_come_back_without_computing_their_blocks_again(few, tmp_path: Path) -> None:
    wide = server(hmt__device_tokens=UNLIMITED, hmt__host_bytes=4 * 2**20)
    run(wide, FEW)
    narrow = server(hmt__device_tokens=1024, hmt__host_bytes=4 * 2**20)
    assert run(narrow, FEW) == few
    preempted = narrow.scheduler.preemptions
    assert preempted > 0
    # What was in no full block, and no more, but for the window's own checkpoint.
    assert narrow.prefilled - wide.prefilled < preempted * 48


# --- faults -------------------------------------------------------------------------------------------


def flip_bits(folder: Path) -> None:
    rng = random.Random(1)
    for path in folder.glob("*/*.blocks"):
        with path.open("r+b") as file:
            for _ in range(path.stat().st_size // 20_000):
                at = rng.randrange(path.stat().st_size)
                file.seek(at)
                [byte] = file.read(1)
                file.seek(at)
                file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def truncate(folder: Path) -> None:
    for path in folder.glob("*/*.blocks"):
        os.truncate(path, path.stat().st_size // 20)


def lose_the_index(folder: Path) -> None:
    for path in folder.glob("*/*.journal"):
        path.unlink()


def garble_the_index(folder: Path) -> None:
    for path in folder.glob("*/*.journal"):
        data = bytearray(path.read_bytes())
        data[len(data) // 3 :: 7] = bytes(len(data[len(data) // 3 :: 7]))
        path.write_bytes(data)


@pytest.mark.parametrize(
    "harm", [flip_bits, truncate, lose_the_index, garble_the_index], ids=lambda f: f.__name__
)
def test_a_harmed_file_costs_misses_and_nothing_else(harm, few, tmp_path: Path) -> None:
    run(small(tmp_path), FEW)
    harm(tmp_path)
    harmed = small(tmp_path)
    assert run(harmed, FEW) == few
    if harm is flip_bits:
        assert misses(harmed)["checksum"] > 0
    mended = small(tmp_path)
    assert run(mended, FEW) == few
    assert mended.cache.manager.stats.hit_tokens["nvme"] > 0
    assert sum(misses(mended)[fault.value] for fault in Fault) == 0


def failing(call: Callable[..., int], error: int, every: int) -> Callable[..., int]:
    """The system call, but each `every`-th one fails."""
    count = itertools.count(1)

    def sometimes(*args: object) -> int:
        if next(count) % every == 0:
            raise OSError(error, os.strerror(error))
        return call(*args)

    return sometimes


@pytest.mark.parametrize(
    ("name", "error", "every"),
    [
        ("pwritev", ENOSPC, 1),
        ("pwritev", EIO, 3),
        ("preadv", EIO, 1),
        ("preadv", EIO, 3),
    ],
    ids=["full disk", "writes fail", "no read succeeds", "reads fail"],
)
def test_a_failing_disk_costs_misses_and_nothing_else(
    name, error, every, few, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "preadv":
        run(small(tmp_path), FEW)
    service = small(tmp_path)  # opened while all was well
    monkeypatch.setattr(os, name, failing(getattr(os, name), error, every))
    assert run(service, FEW) == few
    assert misses(service)["io"] > 0


def test_a_slow_disk_holds_no_step_up(few, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = small(tmp_path)
    gate, write = threading.Event(), BlockFile.write
    monkeypatch.setattr(BlockFile, "write", lambda *args: (gate.wait(60), write(*args))[1])
    assert service.serve(FEW) == few  # not one block was written meanwhile
    assert service.cache.manager.stats.pools["nvme"]["global"].cached == 0
    gate.set()
    service.flush()
    assert service.cache.manager.stats.pools["nvme"]["global"].cached > 0
    service.close()


def test_a_process_killed_while_it_writes_leaves_a_usable_file(few, tmp_path: Path) -> None:
    for lines in (5, 20, 35):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.tiers_process", str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(lines):
            assert process.stdout.readline()
        process.kill()
        process.wait()
        process.stdout.close()
    service = small(tmp_path)
    assert run(service, FEW) == few
    assert service.cache.manager.stats.hit_tokens["nvme"] > 0


# --- choosing -----------------------------------------------------------------------------------------


def test_what_is_slower_to_raise_than_to_compute_is_computed(few, tmp_path: Path) -> None:
    run(small(tmp_path), FEW)
    service = small(tmp_path)
    rates = service.cache.manager.traffic.rates
    # A disk of a few kilobytes a second, beside a prefill that is measured as it goes.
    crawl = Move("global", "nvme", "host", (0,), (0,), (b"",), (b"",))
    rates.observe_move(Outcome(crawl, 1.0), 4096)
    service.cache.manager.observe_prefill(1000, 1.0)
    assert run(service, FEW) == few
    assert misses(service)["slower"] > 0


def test_a_step_that_waited_for_blocks_says_nothing_of_how_fast_prompts_are_computed(tmp_path: Path) -> None:
    cache, table = small(tmp_path).cache, np.arange(2, dtype=np.int32)
    share = SequenceInput(1, np.arange(32, dtype=np.int32), 0, table, table, 0, None)
    cache.observe(StepPlan((replace(share, arriving=(Completed(),)),)), 100.0)
    assert cache.manager.traffic.rates.prefill is None
    cache.observe(StepPlan((share,)), 0.5)
    assert cache.manager.traffic.rates.prefill == 64


def test_two_workers_never_share_a_file(few, tmp_path: Path) -> None:
    one, other = small(tmp_path), small(tmp_path)
    assert {path.parent.name for path in tmp_path.glob("*/global.blocks")} == {"0", "1"}
    assert run(one, FEW) == few
    assert run(other, FEW) == few


@pytest.mark.parametrize("blocked", [False, True], ids=["while nothing is written", "amid a write"])
def test_what_is_abandoned_is_not_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocked: bool
) -> None:
    """After a failure of the engine neither what waits to be saved nor what is being written may count."""
    begun, go_on = threading.Event(), threading.Event()
    write = BlockFile.write

    def slow(*arguments: Any) -> Mapping[int, Fault]:
        begun.set()
        assert go_on.wait(30)
        return write(*arguments)

    monkeypatch.setattr(BlockFile, "write", slow)
    service = small(tmp_path)
    service.serve(FEW[:20])
    if blocked:
        service.cache.tend()
        assert begun.wait(30), "no block was on its way to the file"
    abandoned = threading.Thread(target=service.cache.abandon)
    abandoned.start()
    until(lambda: service.cache._mover._abandoned, "the cache is abandoned")  # type: ignore[union-attr]
    go_on.set()
    abandoned.join(30)
    service.engine.close()
    monkeypatch.undo()
    again = small(tmp_path)
    assert [pool.cached for pool in again.cache.manager.stats.pools["nvme"].values()] == [0, 0]
    again.close()
