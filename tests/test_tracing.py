"""One trace a job, over the processes that it passes through."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.collector import Collector, Span
from tests.images import asked, png
from tests.seeing import HeldEncoder, seeing_model
from tests.services import follow, running_worker, settings_for, start_api, stop, worker_process
from tests.waiting import free_port
from wicore.config import TelemetrySettings, load_settings
from wicore.errors import ConfigError
from wicore.queue.codec import decode, encode
from wicore.queue.producer import Producer
from wicore.request import JobBody, Priority, parse_job
from wicore.telemetry.tracing import tracer_of, valid_traceparent

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SENT = f"00-{TRACE}-{PARENT}-01"
BODY = JobBody(kind="completion", prompt="Once upon", max_tokens=5, ignore_eos=True)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


def named(spans: list[Span], name: str) -> Span:
    (span,) = [span for span in spans if span.name == name]
    return span


@pytest.mark.valkey
def test_a_trace_shows_each_stage_of_a_job_across_processes(
    redis_client: Any, valkey_url: str, collector: Collector
) -> None:
    settings = settings_for(valkey_url, api__port=free_port(), telemetry__otlp_endpoint=collector.url)
    worker = worker_process(settings)
    try:
        api = start_api(settings)
        try:
            url = f"http://127.0.0.1:{settings.api.port}/v1/jobs"
            answer = httpx.post(url, json=BODY.wire(), headers={"traceparent": SENT})
            job = answer.json()["id"]
            assert list(follow(redis_client, job))[-1]["type"] == "done"
        finally:
            stop(api)
    finally:
        stop(worker)  # each sends what is left
    spans = collector.of_job(job)
    assert {span.trace for span in spans} == {TRACE}
    submit, attempt = named(spans, "submit"), named(spans, "attempt")
    assert (submit.service, submit.parent) == ("wicore-api", PARENT)
    assert (attempt.service, attempt.parent) == ("wicore-worker", submit.id)
    assert named(spans, "queue").parent == submit.id
    stages = [named(spans, name) for name in ("prefill", "decode", "publish")]
    assert {stage.parent for stage in stages} == {attempt.id}
    assert len(spans) == 6
    assert attempt.attributes["wicore.attempt"] == 1
    assert (attempt.attributes["wicore.outcome"], attempt.failed) == ("length", False)
    assert attempt.attributes["gen_ai.usage.output_tokens"] == 5
    for before, after in itertools.pairwise(stages):
        assert before.start <= before.end <= after.end
        assert before.end - after.start < 1_000_000
    assert attempt.start <= stages[0].start
    assert stages[-1].end <= attempt.end + 1_000_000


@pytest.mark.valkey
def test_another_attempt_is_another_span_of_the_same_trace(
    redis_client: Any, valkey_url: str, collector: Collector
) -> None:
    settings = settings_for(
        valkey_url, telemetry__otlp_endpoint=collector.url, queue__drain_s=0.0, queue__lease_s=600.0
    )
    long = BODY.model_copy(update={"max_tokens": 3000})
    job = Producer(redis_client).submit(long, Priority.NORMAL, traceparent=SENT).id
    with running_worker(settings, "first"):
        events = follow(redis_client, job)
        next(event for event in events if event["type"] == "token")
    with running_worker(settings, "second"):
        next(event for event in events if event["type"] == "resumed")
        Producer(redis_client).cancel(job)
        assert list(events)[-1]["type"] == "cancelled"
    spans = collector.of_job(job)
    first, second = (span for span in spans if span.name == "attempt")
    assert {span.trace for span in spans} == {TRACE}
    assert (first.parent, second.parent) == (PARENT, PARENT)
    assert [span.attributes["wicore.worker"] for span in (first, second)] == ["first", "second"]
    outcomes = [span.attributes["wicore.outcome"] for span in (first, second)]
    assert outcomes == ["handed_back", "cancelled"]
    assert named(spans, "queue").parent == PARENT


@pytest.mark.valkey
def test_a_job_that_cannot_run_has_a_failed_attempt(
    redis_client: Any, valkey_url: str, collector: Collector
) -> None:
    settings = settings_for(valkey_url, telemetry__otlp_endpoint=collector.url)
    body = BODY.model_copy(update={"max_tokens": 10**6})
    job = Producer(redis_client).submit(body, Priority.NORMAL).id
    with running_worker(settings):
        assert list(follow(redis_client, job))[-1]["type"] == "failed"
    attempt = named(collector.of_job(job), "attempt")
    assert (attempt.failed, attempt.attributes["wicore.outcome"]) == (True, "failed")


@pytest.mark.valkey
def test_a_job_with_images_shows_how_long_they_took(
    redis_client: Any, valkey_url: str, collector: Collector
) -> None:
    settings = settings_for(valkey_url, engine__kind="null", telemetry__otlp_endpoint=collector.url)
    body = parse_job({"messages": asked(png()), "max_tokens": 2})
    job = Producer(redis_client).submit(body, Priority.NORMAL).id
    with running_worker(settings, model=seeing_model(settings), encoder=HeldEncoder(held=False)):
        assert list(follow(redis_client, job))[-1]["type"] == "done"
    spans = collector.of_job(job)
    images, prefill = named(spans, "images"), named(spans, "prefill")
    assert images.parent == named(spans, "attempt").id
    assert images.start <= images.end <= prefill.start + 1_000_000


@pytest.mark.parametrize(
    "bad",
    ["", "00", 7, None, SENT.upper(), SENT[:-1], f"ff{SENT[2:]}", f"00-{'0' * 32}-{PARENT}-01", SENT + "\n"],
)
def test_a_bad_traceparent_is_ignored(bad: object) -> None:
    assert valid_traceparent(bad) is None
    raw = encode(BODY, job_id="j", tag="t", priority=Priority.NORMAL).decode()
    with_bad = raw.replace('"lang":"py"', f'"lang":"py","traceparent":{"7" if bad == 7 else "null"}')
    assert decode(with_bad.encode()).traceparent is None


def test_a_message_carries_the_traceparent() -> None:
    raw = encode(BODY, job_id="j", tag="t", priority=Priority.NORMAL, traceparent=SENT)
    assert decode(raw).traceparent == SENT
    assert b"traceparent" not in encode(BODY, job_id="j", tag="t", priority=Priority.NORMAL)


def test_without_the_setting_nothing_is_imported_and_without_the_library_it_says_how(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert tracer_of(TelemetrySettings(), "x") is None
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    asked = load_settings(environ={"WICORE_TELEMETRY__OTLP_ENDPOINT": "http://127.0.0.1:1"})
    with pytest.raises(ConfigError, match=r"wicore\[otel\]"):
        tracer_of(asked.telemetry, "x")
