"""Suspects: jobs whose worker died. Who is tried next, who is blamed, and who is acquitted."""

from __future__ import annotations

import pytest

from tests.queue_site import Site, ids
from wicore.request import Priority

pytestmark = pytest.mark.valkey


def test_a_worker_takes_one_suspect_at_a_time(site: Site) -> None:
    for _ in range(3):
        site.submit()
    site.worker("dead").pop(3)
    site.lose_workers()
    fresh = [site.submit().id for _ in range(2)]
    worker = site.worker()
    batch = worker.pop(10)
    assert [delivery.suspect for delivery in batch] == [True, False, False]
    assert ids(batch)[1:] == fresh
    assert worker.pop(10, held=batch, suspects=False) == []
    assert not worker.wait(0, suspects=False), "a suspect that may not be taken woke the worker"
    site.finish(batch[0])
    assert [d.suspect for d in worker.pop(10, held=batch[1:])] == [True]


def test_of_several_suspects_the_most_urgent_is_tried_first(site: Site) -> None:
    levels = (Priority.BATCH, Priority.INTERACTIVE, Priority.BATCH, Priority.NORMAL, Priority.INTERACTIVE)
    jobs = [site.submit(level).id for level in levels]
    site.worker("dead").pop(5)
    site.lose_workers()
    site.producer.cancel(jobs[0])
    tried = [site.worker(f"w{i}").pop(1)[0].level for i in range(4)]
    assert tried == [Priority.INTERACTIVE, Priority.INTERACTIVE, Priority.NORMAL, Priority.BATCH]
    assert site.worker().pop(1) == []
    assert not site.redis.exists(site.keys.suspect)


def test_beside_a_suspect_a_dying_worker_costs_others_no_attempt(site: Site) -> None:
    poison = site.submit(job_id="poison").id
    site.worker("w1").pop(1)
    site.lose_workers()
    beside = [site.submit(job_id=f"beside{i}").id for i in range(3)]
    assert ids(site.worker("w2").pop(4)) == [poison, *beside]
    site.lose_workers()
    assert [site.producer.record(job).attempts for job in (poison, *beside)] == [2, 0, 0, 0]
    assert site.producer.suspects() == 4


def test_the_mates_of_a_suspect_are_spared_whoever_is_reaped_first(site: Site) -> None:
    site.submit(job_id="poison")
    site.worker("w1").pop(1)
    site.lose_workers()
    site.submit(job_id="beside")
    site.worker("w2").pop(2)
    tags = {job: site.redis.hget(site.keys.job(job), "tag") for job in ("poison", "beside")}
    for job in ("poison", "beside"):
        site.redis.zadd(site.keys.leases, {tags[job]: 1})
        site.reap()
    assert site.producer.record("poison").attempts == 2
    assert site.producer.record("beside").attempts == 0


def test_a_suspect_that_ended_well_is_blamed_for_nothing_later(site: Site) -> None:
    site.submit(job_id="cleared")
    site.worker("w1").pop(1)
    site.lose_workers()
    worker = site.worker("w2")
    (delivery,) = worker.pop(1)
    site.finish(delivery)
    site.submit(job_id="next")
    worker.pop(1)
    site.lose_workers()
    assert site.producer.record("next").attempts == 1


def test_a_poison_takes_no_other_job_with_it_and_dies_in_as_many_crashes_as_allowed(site: Site) -> None:
    """Every worker that steps the poison dies with all it holds; the others end well."""
    jobs = [site.submit(job_id="poison" if i == 7 else f"good{i}").id for i in range(16)]
    crashes = 0
    for n in range(200):
        worker = site.worker(f"w{n}")
        held = worker.pop(16)
        if not held:
            break
        if "poison" in ids(held):
            crashes += 1
            site.lose_workers()
        else:
            for delivery in held:
                site.finish(delivery)
    assert crashes == 3
    statuses = {job: site.producer.record(job).status for job in jobs}
    assert [job for job, status in statuses.items() if status != "succeeded"] == ["poison"]
    assert len(site.dead()) == 1


def test_an_acquitted_suspect_is_one_of_many_again(site: Site) -> None:
    """Its worker's death then counts for all, and the next suspect may be taken beside it."""
    jobs = [site.submit(job_id=f"j{i}").id for i in range(3)]
    site.worker("w1").pop(3)
    site.lose_workers()
    worker = site.worker("w2")
    (first,) = worker.pop(3)
    worker.acquit(first)
    (second,) = worker.pop(3, held=[first])
    worker.acquit(first)
    site.lose_workers()
    attempts = {job: site.producer.record(job).attempts for job in jobs}
    assert attempts[second.job_id] == 2, "a late word about the first ended the trial of the second"
    assert attempts[first.job_id] == 1
    (third,) = worker.pop(1)
    worker.acquit(third)
    site.submit(job_id="beside")
    worker.pop(1, held=[third], suspects=False)
    site.lose_workers()
    assert site.producer.record("beside").attempts == 1


def test_a_worker_that_gives_up_leaves_its_jobs_as_its_death_would(site: Site) -> None:
    jobs = [site.submit(job_id=f"j{i}").id for i in range(120)]
    worker, other = site.worker("w1"), site.worker("w2")
    mine, [kept] = worker.pop(119), other.pop(1)
    site.start(mine[0])
    assert worker.give_up() == 119
    assert site.producer.suspects() == 119
    assert {site.producer.record(job).attempts for job in jobs} == {1}
    assert site.start(mine[1]) == [0], "what the worker still wants to write is refused"
    assert site.finish(kept) == 1, "another worker's leases are its own"
    assert worker.give_up() == 0


def test_a_worker_that_gives_up_beside_a_suspect_blames_that_one_alone(site: Site) -> None:
    site.submit(job_id="poison")
    site.worker("w1").pop(1)
    site.lose_workers()
    site.submit(job_id="beside")
    worker = site.worker("w2")
    assert ids(worker.pop(2)) == ["poison", "beside"]
    worker.give_up()
    assert [site.producer.record(job).attempts for job in ("poison", "beside")] == [2, 0]
