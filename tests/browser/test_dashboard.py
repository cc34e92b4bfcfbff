"""The dashboard in a real browser: it moves, and it can act."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.browser.conftest import Service
from tests.waiting import until

pytestmark = [pytest.mark.browser, pytest.mark.valkey]

Open = Callable[..., Any]


@pytest.fixture
def page(service: Service, open_page: Open) -> Any:
    return open_page(f"{service.url}#dashboard")


def test_running_sequences_grow_token_by_token(service: Service, page: Any) -> None:
    job = service.submit(max_tokens=3000, n=1)
    row = page.locator(".sequence").filter(has_text=job[:8])
    row.wait_for()
    lengths = set()
    until(
        lambda: (
            lengths.add(int(row.locator(".row-figures").inner_text().split(" of ")[0].replace(",", "")))
            or len(lengths) > 5
        )
    )
    assert max(lengths) - min(lengths) < 60, "it moved by heartbeats alone"
    assert row.locator(".tail").inner_text().strip()
    assert "generated" in page.locator(".chart-card").first.inner_text()
    until(lambda: page.locator(".chart-card .now").first.inner_text() not in ("–", "0"))
    service.http.delete(f"/v1/jobs/{job}")
    row.wait_for(state="detached")


def test_what_waits_is_counted_by_priority(service: Service, page: Any) -> None:
    slots = service.settings.scheduler.max_batch
    jobs = [service.submit(max_tokens=3000, priority="batch") for _ in range(slots + 3)]
    batch = page.locator(".level-line").filter(has_text="batch")
    until(lambda: batch.locator("dd").inner_text() == "3")
    page.get_by_text(f"{slots} of {slots} slots").wait_for()
    for job in jobs:
        service.http.delete(f"/v1/jobs/{job}")
    until(lambda: batch.locator("dd").inner_text() == "0")


def test_workers_and_tiers_are_shown(service: Service, page: Any) -> None:
    worker = page.locator(".workers-card tbody tr")
    worker.wait_for()
    assert "null" in worker.inner_text()
    cache = page.get_by_role("img", name="Device, global")
    cache.wait_for()
    assert "free, of" in cache.get_attribute("aria-label")


def test_a_dead_letter_is_tried_again_or_dropped(service: Service, page: Any) -> None:
    letters = page.locator(".letter")
    letters.nth(1).wait_for()
    assert "3 attempts" in letters.first.inner_text()
    letters.last.get_by_role("button", name="Try again").click()
    page.locator(".dead-card").get_by_text("Queued again as job").wait_for()
    until(lambda: letters.count() == 1)
    retried = service.http.get("/v1/jobs?limit=100").json()["data"]
    (job,) = [job for job in retried if job["retry_of"]]
    until(lambda: service.record(job["id"])["status"] == "succeeded")
    letters.get_by_role("button", name="Drop").click()
    page.get_by_role("dialog").get_by_role("button", name="Drop").click()
    page.get_by_text("None: no job was given up").wait_for()
    assert service.http.get("/v1/dead").json()["data"] == []


def test_rates_are_of_what_each_worker_counted_between_its_heartbeats(page: Any) -> None:
    def beat(worker: str, at_ms: int, tokens: int, succeeded: int, found: int, moved: int) -> dict[str, Any]:
        kv = {
            "hit_tokens": {"device": found, "host": 0},
            "opened_tokens": 2 * found,
            "moved_bytes": {"host>device": {"global": moved}, "device>host": {"global": 2 * moved}},
        }
        finished = {"stop": succeeded - 1, "length": 1, "failed": 3}
        requests = {"generation_tokens": tokens, "finished": finished}
        return {"id": worker, "at_ms": at_ms, "requests": requests, "kv": kv}

    looks = [
        [beat("a", 1000, 100, 5, 10, 0), beat("b", 1500, 7, 0, 0, 0)],
        [beat("a", 3000, 140, 6, 20, 800), beat("b", 2500, 17, 0, 30, 0)],
        [beat("b", 2500, 17, 0, 30, 0), beat("c", 9000, 1_000_000, 1000, 1000, 1000)],
    ]
    _, second, third = page.evaluate(
        """async (looks) => {
          const { Rates } = await import(new URL("static/js/rates.js", document.baseURI));
          const rates = new Rates();
          return looks.map((workers) => {
            const { speeds, ...all } = rates.take({ workers });
            return { ...all, speeds: Object.fromEntries(speeds) };
          });
        }""",
        looks,
    )
    assert second["speeds"] == {"a": 20, "b": 10}
    assert (second["generated"], second["succeeded"], second["hit_rate"]) == (30, 0.5, 0.5)
    assert (second["raised"], second["demoted"]) == (400, 800)
    assert third["speeds"] == {"b": 10, "c": 0}, "nothing is known of a worker before its second heartbeat"


def test_a_service_that_does_not_answer_is_said_and_comes_back(service: Service, page: Any) -> None:
    page.locator(".workers-card tbody tr").wait_for()
    page.route("**/status", lambda route: route.abort())
    page.get_by_text("The service cannot be reached").wait_for()
    assert page.locator(".workers-card tbody tr").count() == 1
    page.unroute("**/status")
    page.get_by_text("The service cannot be reached").wait_for(state="hidden")
