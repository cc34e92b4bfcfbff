"""The worker against the real queue, with a real engine on the tiny checkpoint."""

from __future__ import annotations

import json
import subprocess

import pytest

import workers.worker
from tests.failing_engine import POISON, FailingEngine
from tests.services import follow, running_worker, settings_for, worker_process
from wicore.engine.factory import create_engine
from wicore.errors import EngineError, InvalidRequest
from wicore.exit_codes import ExitCode
from wicore.grammar.compiler import GrammarConstraint
from wicore.model import load_model
from wicore.queue.connection import connect
from wicore.queue.producer import Producer
from wicore.queue.registry import alive_workers
from wicore.request import Priority, parse_job
from wicore.tiers.cache import TieredCache
from workers.worker import Worker

pytestmark = pytest.mark.valkey


ENDLESS = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}}


def submit(redis_client, **fields: object) -> str:
    body = parse_job({"kind": "completion", "prompt": "Hello there", "temperature": 0.0, **fields})
    return Producer(redis_client).submit(body, Priority.NORMAL).id


def ending(redis_client, job: str) -> dict:
    return list(follow(redis_client, job))[-1]


@pytest.fixture
def worker(redis_client, valkey_url):
    with running_worker(settings_for(valkey_url)) as running:
        yield running


def test_a_job_succeeds_and_its_record_holds_the_result(worker, redis_client) -> None:
    job = submit(redis_client, max_tokens=8, ignore_eos=True)
    events = list(follow(redis_client, job))
    record = Producer(redis_client).record(job)
    assert record.status == "succeeded"
    text = "".join(e["text"] for e in events if e["type"] == "token")
    assert record.result["choices"][0]["text"] == text
    assert record.usage == events[-1]["usage"]


def test_many_jobs_at_once_get_the_text_each_gets_alone(worker, redis_client) -> None:
    prompts = [f"Number {i} says" * (1 + i % 5) for i in range(40)]

    def run(prompt: str) -> str:
        return submit(redis_client, prompt=prompt, max_tokens=12)

    alone = []
    for prompt in prompts[:5]:
        job = run(prompt)
        ending(redis_client, job)
        alone.append(Producer(redis_client).record(job).result["choices"])
    jobs = [run(prompt) for prompt in prompts]
    for job in jobs:
        assert ending(redis_client, job)["type"] == "done"
    together = [Producer(redis_client).record(job).result["choices"] for job in jobs[:5]]
    assert together == alone


def test_a_running_job_can_be_cancelled(worker, redis_client) -> None:
    job = submit(redis_client, max_tokens=3000, ignore_eos=True)
    events = []
    for event in follow(redis_client, job):
        events.append(event)
        if event["seq"] == 5:
            Producer(redis_client).cancel(job)
    assert events[-1]["type"] == "cancelled"
    assert 0 < events[-1]["usage"]["completion_tokens"] < 3000
    assert Producer(redis_client).record(job).status == "cancelled"


def test_what_runs_is_told_with_how_far_it_has_come(worker, redis_client) -> None:
    job = submit(redis_client, max_tokens=3000, ignore_eos=True, n=2)
    events = follow(redis_client, job)
    seen = [next(events) for _ in range(20)]
    first, second = worker.status()["sequences"]
    assert (first["job"], first["index"], second["index"]) == (job, 0, 1)
    assert (first["priority"], first["attempt"], first["max_tokens"]) == ("normal", 1, 3000)
    assert first["waits"] is False
    assert first["tokens"] >= len([event for event in seen if event.get("index") == 0])
    assert worker.status()["requests"]["prompt_tokens"] == first["prompt_tokens"] > 0
    Producer(redis_client).cancel(job)
    list(events)
    assert worker.status()["sequences"] == []


def test_ended_jobs_are_counted_by_how_they_ended(worker, redis_client) -> None:
    for fields in ({"max_tokens": 2}, {"max_tokens": 3}, {"model": "gpt-4"}):
        ending(redis_client, submit(redis_client, **fields))
    finished = worker.status()["requests"]["finished"]
    assert finished == {"length": 2, "failed": 1}


def test_a_job_past_its_deadline_expires_wherever_it_is(worker, redis_client) -> None:
    job = submit(redis_client, max_tokens=3500, ignore_eos=True, timeout_s=0.3)
    event = ending(redis_client, job)
    assert (event["type"], event["error"]["code"]) == ("expired", "expired")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "gpt-4"}, "model"),
        ({"prompt": "word " * 6000}, "prompt"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"prompt": [5, 100_000]}, "prompt"),
        ({"logit_bias": {"99999": 1.0}}, "logit_bias"),
        ({"response_format": ENDLESS}, "response_format.json_schema.schema"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_job_that_cannot_run_fails_with_the_field_at_fault(worker, redis_client, fields, param) -> None:
    event = ending(redis_client, submit(redis_client, **fields))
    assert (event["type"], event["error"]["param"]) == ("failed", param)
    assert ending(redis_client, submit(redis_client, max_tokens=2))["type"] == "done"


def test_a_plain_redis_client_gets_its_answer(worker, redis_client) -> None:
    kwargs = {"kind": "completion", "prompt": "Hello", "max_tokens": 4, "temperature": 0.0}
    message = {
        "body": json.dumps([[], kwargs, {}]),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": "wicore.generate", "id": "from-elsewhere"},
        "properties": {"delivery_tag": "t1", "priority": 3},
    }
    pubsub = redis_client.pubsub()
    pubsub.subscribe("wicore:events:from-elsewhere")
    redis_client.lpush("wicore\x06\x163", json.dumps(message))
    for received in pubsub.listen():
        if received["type"] == "message" and json.loads(received["data"])["type"] == "done":
            break
    pubsub.close()
    assert Producer(redis_client).record("from-elsewhere").status == "succeeded"
    stored = json.loads(redis_client.get("celery-task-meta-from-elsewhere"))
    assert stored["status"] == "SUCCESS"


# --- structured output --------------------------------------------------------------------------


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "é": {"enum": ["ja", "nein"]}},
    "required": ["x", "é"],
    "additionalProperties": False,
}


def asking(schema: object) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def test_every_choice_of_a_job_is_held_to_its_schema_beside_jobs_that_have_none(worker, redis_client) -> None:
    held = submit(redis_client, temperature=1.0, n=3, seed=4, max_tokens=200, response_format=asking(POINT))
    free = submit(redis_client, max_tokens=30, ignore_eos=True)
    assert ending(redis_client, held)["type"] == "done"
    choices = Producer(redis_client).record(held).result["choices"]
    for choice in choices:
        assert choice["finish_reason"] == "stop"
        answer = json.loads(choice["text"])
        assert list(answer) == ["x", "é"]
        assert answer["x"] in range(100)
    assert len({choice["text"] for choice in choices}) > 1
    assert ending(redis_client, free)["usage"]["completion_tokens"] == 30


def test_an_output_cut_off_by_max_tokens_says_so(worker, redis_client) -> None:
    job = submit(redis_client, max_tokens=3, response_format=asking(POINT))
    assert ending(redis_client, job)["finish_reason"] == "length"
    assert Producer(redis_client).record(job).result["choices"][0]["text"].startswith("{")


def test_a_stop_string_ends_a_structured_output_too(worker, redis_client) -> None:
    job = submit(redis_client, max_tokens=200, response_format=asking(POINT), stop=[","])
    assert ending(redis_client, job)["finish_reason"] == "stop"
    assert Producer(redis_client).record(job).result["choices"][0]["text"].startswith('{"x":')


def test_a_job_whose_grammar_goes_astray_fails_and_others_go_on(worker, redis_client, monkeypatch) -> None:
    def fail(constraint) -> None:
        constraint.error = InvalidRequest("response_format: too complex", param="response_format")
        constraint._mask[:] = constraint._ends

    with monkeypatch.context() as patched:
        patched.setattr(GrammarConstraint, "_find_mask", fail)
        event = ending(redis_client, submit(redis_client, n=2, response_format={"type": "json_object"}))
    assert (event["type"], event["error"]["param"]) == ("failed", "response_format")
    assert ending(redis_client, submit(redis_client, max_tokens=2))["type"] == "done"


# --- an engine that fails -----------------------------------------------------------------------


def fail(settings, owner: str) -> FailingEngine:
    """Run a worker until its engine fails; returns that engine."""
    model = load_model(settings)
    engine = FailingEngine(create_engine(settings, model))
    client = connect(settings.redis.url)
    with pytest.raises(EngineError, match="device is gone"):
        Worker(settings, model, engine, client, owner).run()
    client.close()
    return engine


def test_the_jobs_of_a_failed_engine_go_on_at_once_in_another_worker(redis_client, valkey_url) -> None:
    # Leases so long that they cannot be what frees the jobs.
    settings = settings_for(valkey_url, queue__lease_s=600.0)
    jobs = [submit(redis_client, max_tokens=12, ignore_eos=True, seed=seed) for seed in (1, POISON)]
    assert fail(settings, "broken").closed
    producer = Producer(redis_client)
    assert [producer.record(job).status for job in jobs] == ["queued", "queued"]
    assert producer.suspects() == 2
    with running_worker(settings, "healthy"):
        for job in jobs:
            events = list(follow(redis_client, job))
            assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
            kinds = [event["type"] for event in events if event["type"] != "token"]
            assert kinds == ["started", "resumed", "done"]
            assert sum(event["type"] == "token" for event in events) == 12
    assert [producer.record(job).attempts for job in jobs] == [2, 2]


def test_a_job_that_fails_engines_does_so_a_bounded_number_of_times(redis_client, valkey_url) -> None:
    settings = settings_for(valkey_url, queue__lease_s=600.0)
    good = submit(redis_client, max_tokens=40, ignore_eos=True)
    bad = submit(redis_client, max_tokens=40, ignore_eos=True, seed=POISON)
    for attempt in range(settings.queue.max_attempts):
        fail(settings, f"broken{attempt}")
    with running_worker(settings, "healthy"):
        assert ending(redis_client, good)["type"] == "done"
    event = ending(redis_client, bad)
    assert (event["type"], event["error"]["code"]) == ("failed", "worker_lost")
    assert Producer(redis_client).record(bad).attempts == settings.queue.max_attempts


def test_nothing_of_a_failed_engine_is_saved(redis_client, valkey_url, monkeypatch) -> None:
    ends = []

    class Watched(TieredCache):
        def __getattribute__(self, name: str):
            ends.extend({name} & {"flush", "close", "abandon"})
            return super().__getattribute__(name)

    monkeypatch.setattr(workers.worker, "TieredCache", Watched)
    submit(redis_client, max_tokens=12, ignore_eos=True, seed=POISON)
    fail(settings_for(valkey_url), "broken")
    assert ends == ["abandon"]


def test_a_worker_process_whose_engine_fails_ends_with_a_code_of_its_own(redis_client, valkey_url) -> None:
    settings = settings_for(valkey_url, queue__lease_s=600.0)
    job = submit(redis_client, max_tokens=12, ignore_eos=True, seed=POISON)
    process = worker_process(settings, "tests.failing_engine", stderr=subprocess.PIPE)
    _, told = process.communicate(timeout=60)
    assert process.returncode == ExitCode.DEVICE
    assert "the engine failed, and this process ends: the device is gone" in told.decode()
    assert Producer(redis_client).record(job).status == "queued"
    assert not alive_workers(redis_client)


# ------------------------------------------------------------------------------------------------


def test_a_worker_without_a_model_ends_with_what_it_misses(valkey_url, tmp_path) -> None:
    settings = settings_for(valkey_url, model__path=str(tmp_path / "nothing"))
    process = worker_process(settings, stderr=subprocess.PIPE)
    _, told = process.communicate(timeout=60)
    assert process.returncode == ExitCode.CONFIG
    assert "expected a checkpoint folder" in told.decode()


def test_an_idle_worker_ends_when_told(valkey_url, redis_client) -> None:
    settings = settings_for(valkey_url)
    process = worker_process(settings)
    assert ending(redis_client, submit(redis_client, max_tokens=2))["type"] == "done"
    process.terminate()
    assert process.wait(60) == ExitCode.OK


# --- urgent jobs at a full worker ---------------------------------------------------------------


def started(redis_client, job: str) -> None:
    for event in follow(redis_client, job):
        if event["type"] == "token":
            return


def test_an_interactive_job_does_not_wait_for_batch_jobs_to_end(redis_client, valkey_url) -> None:
    """The texts of the batch jobs that gave way are those of a run in which they did not."""
    settings = settings_for(valkey_url, scheduler__max_batch=2, hmt__device_tokens=16384)
    texts = []
    for urgent in (False, True):
        redis_client.flushall()
        with running_worker(settings) as worker:
            producer = Producer(redis_client)
            fields = {"kind": "completion", "prompt": "Once upon a time", "temperature": 0.0}
            long = parse_job({**fields, "max_tokens": 600, "ignore_eos": True})
            batch = [producer.submit(long, Priority.BATCH, job_id=f"batch{i}").id for i in range(2)]
            for job in batch:
                started(redis_client, job)
            if urgent:
                short = parse_job({**fields, "max_tokens": 4})
                quick = producer.submit(short, Priority.INTERACTIVE).id
                assert ending(redis_client, quick)["type"] == "done"
                assert [producer.record(job).status for job in batch] == ["running", "running"]
                assert worker.status()["preemptions"] == 1
            for job in batch:
                assert ending(redis_client, job)["type"] == "done"
            texts.append([producer.record(job).result["choices"] for job in batch])
    assert texts[0] == texts[1]


def test_a_full_worker_leaves_jobs_of_its_own_level_to_others(redis_client, valkey_url) -> None:
    settings = settings_for(valkey_url, scheduler__max_batch=1, engine__kind="null", engine__null_step_ms=10)
    with running_worker(settings):
        long = submit(redis_client, max_tokens=3800, ignore_eos=True)
        started(redis_client, long)
        waiting = submit(redis_client, max_tokens=2)
        urgent = parse_job({"kind": "completion", "prompt": "Hello", "max_tokens": 2})
        ending(redis_client, Producer(redis_client).submit(urgent, Priority.INTERACTIVE).id)
        assert Producer(redis_client).record(waiting).status == "queued"
        Producer(redis_client).cancel(long)
        assert ending(redis_client, waiting)["type"] == "done"


def test_a_worker_takes_no_more_of_a_level_than_it_has_slots(redis_client, valkey_url) -> None:
    settings = settings_for(valkey_url, scheduler__max_batch=4, engine__kind="null", engine__null_step_ms=1)
    engine = create_engine(settings, load_model(settings))
    waiting = []

    class Watched:
        info, close, host_memory = engine.info, engine.close, engine.host_memory
        copy_in, copy_out = engine.copy_in, engine.copy_out

        def start(self, plan):
            waiting.append(worker.status()["waiting"])
            return engine.start(plan)

    jobs = [submit(redis_client, max_tokens=1 + i % 3, ignore_eos=True) for i in range(300)]
    with running_worker(settings, engine=Watched()) as worker:
        for job in jobs:
            assert ending(redis_client, job)["type"] == "done"
    assert set(waiting) == {0}
