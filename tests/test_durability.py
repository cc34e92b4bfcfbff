"""An accepted job ends in exactly one terminal event, and its tokens survive the worker."""

from __future__ import annotations

import json

import pytest

from tests.killed import undisturbed_and_killed
from tests.services import follow, running_worker, settings_for, worker_process
from wicore.queue.connection import connect
from wicore.queue.embedded import EmbeddedValkey
from wicore.queue.producer import Producer
from wicore.request import Event, Priority, parse_job
from wicore.stream.publisher import Publisher

pytestmark = pytest.mark.valkey
DIGITS = {"type": "array", "items": {"enum": [1, 2, 3, "vier", "fünf"]}, "minItems": 120, "maxItems": 140}
LONG_CALL = {
    "type": "object",
    "properties": {
        "path": {"type": "array", "items": {"enum": ["left", "right"]}, "minItems": 30, "maxItems": 40}
    },
    "required": ["path"],
    "additionalProperties": False,
}
JOBS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 11, "repetition_penalty": 1.2},
    "two choices": {"temperature": 0.8, "n": 2},
    "a call": {
        "kind": "chat",
        "prompt": None,
        "messages": [{"role": "user", "content": "Go"}],
        "tools": [
            {"type": "function", "function": {"name": "walk", "parameters": LONG_CALL, "strict": True}}
        ],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "ignore_eos": False,
        "max_tokens": 800,
    },
    "json": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "digits", "schema": DIGITS}},
        "seed": 5,
        "max_tokens": 2000,
        "ignore_eos": False,
    },
}


def submit(redis_client, job_id: str, **fields: object) -> str:
    body = {
        "kind": "completion",
        "prompt": "Once upon a time",
        "max_tokens": 400,
        "ignore_eos": True,
        **fields,
    }
    return Producer(redis_client).submit(parse_job(body), Priority.NORMAL, job_id=job_id).id


def texts(events: list[Event]) -> dict[int, str]:
    parts: dict[int, str] = {}
    for event in events:
        if event["type"] == "token":
            parts[event["index"]] = parts.get(event["index"], "") + event["text"]
    return parts


@pytest.mark.parametrize("fields", JOBS.values(), ids=JOBS.keys())
def test_a_killed_worker_costs_no_token_and_changes_none(redis_client, valkey_url, fields) -> None:
    settings = settings_for(valkey_url, queue__lease_s=1.0)
    undisturbed, killed = undisturbed_and_killed(
        redis_client, settings, lambda: submit(redis_client, "job", **fields)
    )
    assert texts(killed.events) == texts(undisturbed.events)
    assert killed.result["choices"] == undisturbed.result["choices"]
    assert killed.attempts == 2
    if "response_format" in fields:
        assert len(json.loads(texts(killed.events)[0])) in range(120, 141)
    assert not redis_client.hlen("wicore:unacked")
    assert not redis_client.zcard("wicore:leases")


def test_a_stopped_worker_hands_its_job_back_and_no_attempt_is_counted(redis_client, valkey_url) -> None:
    settings = settings_for(valkey_url, queue__drain_s=0.0)
    job = submit(redis_client, "job", temperature=0.0)
    events = []
    with running_worker(settings, "first") as worker:
        for event in follow(redis_client, job):
            events.append(event)
            if event["seq"] == 10:
                worker.stop()
                break
    with running_worker(settings, "second"):
        events += follow(redis_client, job, after=10)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["type"] == "done"
    assert events[-1]["usage"]["completion_tokens"] == 400
    assert Producer(redis_client).record(job).attempts == 1


def test_the_streams_of_a_killed_worker_go_on_side_by_side(redis_client, valkey_url) -> None:
    settings = settings_for(valkey_url, queue__lease_s=1.0)
    jobs = [submit(redis_client, f"job{i}", temperature=0.0, max_tokens=3000) for i in range(4)]
    first = worker_process(settings)
    for job in jobs:
        next(event for event in follow(redis_client, job) if event["type"] == "token")
    first.kill()
    first.wait()
    with running_worker(settings, "second"):
        for job in jobs:
            next(event for event in follow(redis_client, job) if event["type"] == "resumed")
        statuses = [Producer(redis_client).record(job).status for job in jobs]
        for job in jobs:
            Producer(redis_client).cancel(job)
    assert statuses == ["running"] * 4


def test_a_worker_stopped_while_redis_is_away_ends_well_and_its_job_goes_on(
    short_folder, monkeypatch
) -> None:
    monkeypatch.setattr(Publisher.stop, "__defaults__", (0.2,))
    with EmbeddedValkey(short_folder) as server:
        settings = settings_for(server.url, queue__drain_s=0.0, queue__lease_s=0.5)
        client = connect(server.url)
        job = submit(client, "job", temperature=0.0)
        with running_worker(settings, "first") as worker:
            assert next(event for event in follow(client, job) if event["seq"] == 5)
            server.kill()
            worker.stop()
        server.start()
        with running_worker(settings, "second"):
            events = list(follow(client, job))
        client.close()
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["type"] == "done"
