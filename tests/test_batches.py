"""OpenAI's batches, by OpenAI's own client, with a real runner; killed and restarted, too."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import redis
from flask import request

from api.callers import Caller
from tests.official import official, serving
from tests.queue_site import Site
from tests.services import running_worker, settings_for, tasks_process
from tests.waiting import until
from wicore.access.keys import Limits
from wicore.batches import runner as runner_module
from wicore.batches.runner import Runner
from wicore.config import Settings
from wicore.model import Model, load_model

pytestmark = pytest.mark.valkey

CHAT = "/v1/chat/completions"


@pytest.fixture
def settings(valkey_url: str) -> Settings:
    return settings_for(valkey_url, engine__kind="null", engine__null_step_ms=0.5, model__max_context=256)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(settings_for("redis://nowhere"))


@pytest.fixture
def ai(redis_client: redis.Redis, settings: Settings) -> Iterator[openai.OpenAI]:
    with serving(settings) as url, official(url) as client:
        yield client


@pytest.fixture
def runner(redis_client: redis.Redis, settings: Settings, model: Model) -> Runner:
    return Runner(redis_client, settings, lambda: model)


@pytest.fixture
def site(redis_client: redis.Redis) -> Iterator[Site]:
    made = Site(redis_client)
    yield made
    made.check()
    made.close()


@pytest.fixture
def worker(redis_client: redis.Redis, settings: Settings) -> Iterator[Any]:
    with running_worker(settings) as running:
        yield running


BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "Once", "max_tokens": 2},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 2},
}


def line(custom_id: str, url: str = CHAT, **more: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**BODIES[url], **more}}


def send(ai: openai.OpenAI, *lines: Any, endpoint: Any = CHAT, **more: Any) -> Any:
    content = "\n".join(text if isinstance(text, str) else json.dumps(text) for text in lines)
    file = ai.files.create(file=("in.jsonl", content.encode()), purpose="batch")
    return ai.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def advance(runner: Runner, batch: Any, until: Callable[[Any], bool] = lambda record: False) -> Any:
    """Run until the batch has ended, or is as wished."""
    end = time.monotonic() + 20
    while batch.id in runner.batches.open() and not until(runner.batches.get(batch.id)):
        assert time.monotonic() < end, runner.batches.get(batch.id)
        if not runner.advance(batch.id):
            time.sleep(0.005)
    return runner.batches.get(batch.id)


def answers(ai: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """By custom_id; every line is there once."""
    assert file_id is not None
    lines = [json.loads(text) for text in ai.files.content(file_id).text.splitlines()]
    by_id = {answer["custom_id"]: answer for answer in lines}
    assert len(by_id) == len(lines)
    return by_id


# --- whole batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", list(BODIES))
def test_a_batch_answers_every_line_as_its_endpoint_does(
    ai: openai.OpenAI, runner: Runner, worker: Any, endpoint: str
) -> None:
    lines = [line(f"line {i}", endpoint, seed=i) for i in range(5)]
    batch = send(ai, *lines, endpoint=endpoint, metadata={"a": "b"})
    assert (batch.status, batch.metadata, batch.output_file_id) == ("validating", {"a": "b"}, None)
    assert batch.expires_at == batch.created_at + 86_400
    advance(runner, batch)
    done = ai.batches.retrieve(batch.id)
    assert (done.status, done.error_file_id, done.errors) == ("completed", None, None)
    assert done.request_counts.to_dict() == {"total": 5, "completed": 5, "failed": 0}
    assert done.in_progress_at <= done.finalizing_at <= done.completed_at
    found = answers(ai, done.output_file_id)
    assert found.keys() == {f"line {i}" for i in range(5)}
    for answer in found.values():
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["request_id"].startswith(batch.id)
        assert answer["id"].startswith("batch_req_")
    kinds = {answer["response"]["body"]["object"] for answer in found.values()}
    assert kinds == {
        {CHAT: "chat.completion", "/v1/completions": "text_completion"}.get(endpoint, "response")
    }
    assert done.usage.output_tokens == 10
    file = ai.files.retrieve(done.output_file_id)
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")


def test_lines_that_cannot_be_served_are_answered_in_the_error_file(
    ai: openai.OpenAI, runner: Runner, worker: Any
) -> None:
    batch = send(
        ai,
        line("hot", temperature=9),
        line("good"),
        line("long", max_tokens=1000),
        line("other", model="other"),
        line("late", timeout_s=0.001, queue_timeout_s=0.001),
    )
    advance(runner, batch)
    done = ai.batches.retrieve(batch.id)
    assert done.status == "completed"
    assert done.request_counts.to_dict() == {"total": 5, "completed": 1, "failed": 4}
    assert answers(ai, done.output_file_id).keys() == {"good"}
    found = answers(ai, done.error_file_id)
    statuses = {name: found[name]["response"]["status_code"] for name in ("hot", "long", "other")}
    assert statuses == {"hot": 400, "long": 413, "other": 404}
    assert found["hot"]["response"]["body"]["error"]["param"] == "temperature"
    assert (found["late"]["response"], found["late"]["error"]["code"]) == (None, "request_timeout")


def test_a_job_that_fails_is_answered_with_its_error(ai: openai.OpenAI, runner: Runner, site: Site) -> None:
    batch = send(ai, line("a"), line("b"))
    advance(runner, batch, lambda record: record.next == 2)
    first, second = site.worker().pop(2)
    site.finish(first, "failed", error={"code": "worker_lost", "message": "m", "type": "t", "param": None})
    site.finish(second, "cancelled")
    advance(runner, batch)
    done = ai.batches.retrieve(batch.id)
    found = answers(ai, done.error_file_id)
    assert found["a"]["response"]["status_code"] == 500
    assert found["a"]["response"]["body"]["error"]["message"] == "m"
    assert found["b"]["error"]["code"] == "request_cancelled"
    assert done.output_file_id is None


def test_a_file_with_faults_fails_the_batch_and_says_where(ai: openai.OpenAI, runner: Runner) -> None:
    batch = send(ai, line("a"), "{", line("a"))
    advance(runner, batch)
    failed = ai.batches.retrieve(batch.id)
    assert (failed.status, failed.output_file_id, failed.error_file_id) == ("failed", None, None)
    assert [(error.line, error.code) for error in failed.errors.data] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
    ]
    assert failed.failed_at is not None


def test_a_batch_whose_file_was_deleted_fails(ai: openai.OpenAI, runner: Runner) -> None:
    batch = send(ai, line("a"))
    ai.files.delete(batch.input_file_id)
    advance(runner, batch)
    (error,) = ai.batches.retrieve(batch.id).errors.data
    assert (error.code, error.param) == ("file_not_found", "input_file_id")


def test_a_file_is_not_needed_once_it_was_checked(ai: openai.OpenAI, runner: Runner, worker: Any) -> None:
    batch = send(ai, line("a"))
    advance(runner, batch, lambda record: record.status == "in_progress")
    ai.files.delete(batch.input_file_id)
    assert advance(runner, batch).status == "completed"


def test_output_files_expire_as_asked(ai: openai.OpenAI, runner: Runner, worker: Any) -> None:
    batch = send(ai, line("a"), output_expires_after={"anchor": "created_at", "seconds": 7200})
    output = advance(runner, batch).output.file
    file = ai.files.retrieve(output)
    assert file.expires_at == file.created_at + 7200


def test_answers_fill_pieces_and_come_back_whole(
    ai: openai.OpenAI, runner: Runner, site: Site, redis_client: redis.Redis
) -> None:
    batch = send(ai, *(line(str(i)) for i in range(4)))
    advance(runner, batch, lambda record: record.next == 4)
    for job in site.worker().pop(4):
        site.finish(job)
        redis_client.hset(site.keys.job(job.job_id), "result", json.dumps({"text": "x" * 600_000}))
    output = advance(runner, batch).output
    assert output.pieces == 2
    assert len(answers(ai, output.file)) == 4


# --- in bounded portions --------------------------------------------------------------------------


def test_only_so_many_lines_are_jobs_at_once(
    ai: openai.OpenAI, runner: Runner, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "IN_FLIGHT", 3)
    batch = send(ai, *(line(str(i)) for i in range(8)))
    consumer = site.worker()
    for taken in (3, 6, 8):
        advance(runner, batch, lambda record, taken=taken: record.next == taken)  # type: ignore[misc]
        runner.advance(batch.id)
        assert runner.batches.get(batch.id).next == taken
        for job in consumer.pop(8):
            assert job.level == 6
            site.finish(job)
    assert advance(runner, batch).completed == 8


def test_a_full_queue_is_waited_for(ai: openai.OpenAI, site: Site, settings: Settings, model: Model) -> None:
    queue = settings.queue.model_copy(update={"max_jobs": 2})
    runner = Runner(site.redis, settings.model_copy(update={"queue": queue}), lambda: model)
    batch = send(ai, *(line(str(i)) for i in range(5)))
    consumer = site.worker()
    served = 0
    while served < 5:
        advance(runner, batch, lambda record, served=served: record.next == min(served + 2, 5))  # type: ignore[misc]
        assert runner.advance(batch.id) is False
        for job in consumer.pop(8):
            site.finish(job)
            served += 1
    assert advance(runner, batch).completed == 5


def limit(batch: Any, site: Site, **limits: Any) -> None:
    """As if the batch had been sent with a key of these limits."""
    site.redis.hset(site.keys.batch(batch.id), "limits", Limits(**limits).model_dump_json())


def test_half_of_a_clients_parallel_jobs_are_left_to_its_other_calls(
    ai: openai.OpenAI, runner: Runner, site: Site
) -> None:
    batch = send(ai, *(line(str(i)) for i in range(5)))
    limit(batch, site, parallel=4)
    advance(runner, batch, lambda record: record.next == 2)
    runner.advance(batch.id)
    assert runner.batches.get(batch.id).next == 2
    consumer = site.worker()
    while batch.id in runner.batches.open():
        for job in consumer.pop(4):
            site.finish(job)
        runner.advance(batch.id)
    assert runner.batches.get(batch.id).completed == 5


def test_half_of_a_clients_rate_is_left_to_its_other_calls(
    ai: openai.OpenAI, runner: Runner, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = send(ai, *(line(str(i)) for i in range(20)))
    limit(batch, site, requests_per_minute=8)
    advance(runner, batch, lambda record: record.next > 0)
    now = time.monotonic()
    for later, taken in ((0, 5), (1, 5), (9, 6), (10, 6)):  # the buckets themselves have not filled meanwhile
        monkeypatch.setattr(runner_module.time, "monotonic", lambda later=later: now + later)
        runner.advance(batch.id)
        assert runner.batches.get(batch.id).next == taken
    ai.batches.cancel(batch.id)
    advance(runner, batch)


def test_batches_take_turns(ai: openai.OpenAI, runner: Runner, site: Site) -> None:
    batches = [send(ai, *(line(str(i)) for i in range(3))) for _ in range(2)]
    for _ in range(2):
        for batch in batches:
            runner.advance(batch.id)
    assert [runner.batches.get(batch.id).next for batch in batches] == [3, 3]
    for job in site.worker().pop(6):
        site.finish(job)
    assert {advance(runner, batch).status for batch in batches} == {"completed"}


# --- called off, out of time ----------------------------------------------------------------------


def test_a_cancelled_batch_keeps_what_was_answered(ai: openai.OpenAI, runner: Runner, site: Site) -> None:
    batch = send(ai, *(line(str(i)) for i in range(3)))
    advance(runner, batch, lambda record: record.next == 3)
    site.finish(site.worker().pop(1)[0])
    assert ai.batches.cancel(batch.id).status == "cancelling"
    assert ai.batches.cancel(batch.id).status == "cancelling"
    advance(runner, batch)
    done = ai.batches.cancel(batch.id)
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("cancelled", 1, 2)
    assert done.cancelling_at <= done.cancelled_at
    assert len(answers(ai, done.output_file_id)) == 1
    codes = [answer["error"]["code"] for answer in answers(ai, done.error_file_id).values()]
    assert codes == ["batch_cancelled"] * 2


def test_a_batch_can_be_cancelled_before_it_begins(ai: openai.OpenAI, runner: Runner) -> None:
    batch = send(ai, line("a"))
    ai.batches.cancel(batch.id)
    assert advance(runner, batch).status == "cancelled"


def test_lines_that_are_no_jobs_yet_are_answered_when_it_is_cancelled(
    ai: openai.OpenAI, runner: Runner, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "IN_FLIGHT", 1)
    batch = send(ai, *(line(str(i)) for i in range(200)))
    advance(runner, batch, lambda record: record.next == 1)
    ai.batches.cancel(batch.id)
    done = advance(runner, batch)
    assert (done.status, done.failed, done.total) == ("cancelled", 200, 200)
    assert len(answers(ai, done.error.file)) == 200


def test_an_ended_batch_cannot_be_cancelled(ai: openai.OpenAI, runner: Runner, worker: Any) -> None:
    batch = send(ai, line("a"))
    advance(runner, batch)
    with pytest.raises(openai.ConflictError, match="completed"):
        ai.batches.cancel(batch.id)


def close_window(site: Site, batch: Any) -> None:
    """As if the batch's time were over."""
    site.redis.hset(site.keys.batch(batch.id), "deadline_ms", 1)
    for job in site.jobs():
        site.redis.hset(site.keys.job(job), "deadline_ms", 1)
        if site.redis.zscore(site.keys.deadlines, job) is not None:
            site.redis.zadd(site.keys.deadlines, {job: 1})
    site.reap()


def test_what_is_not_done_in_the_window_expires(
    ai: openai.OpenAI, runner: Runner, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "IN_FLIGHT", 2)
    batch = send(ai, *(line(str(i)) for i in range(4)))
    advance(runner, batch, lambda record: record.next == 2)
    site.finish(site.worker().pop(1)[0])
    close_window(site, batch)
    advance(runner, batch)
    done = ai.batches.retrieve(batch.id)
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("expired", 1, 3)
    assert done.expired_at is not None
    codes = [answer["error"]["code"] for answer in answers(ai, done.error_file_id).values()]
    assert codes == ["batch_expired"] * 3


def test_a_job_has_no_more_time_than_its_batch(ai: openai.OpenAI, runner: Runner, site: Site) -> None:
    batch = send(ai, line("a"), line("b", timeout_s=60))
    record = advance(runner, batch, lambda record: record.next == 2)
    deadlines = [site.producer.record(f"{batch.id}-{i}").deadline_ms for i in range(2)]
    assert abs(deadlines[0] - record.deadline_ms) < 2000  # type: ignore[operator]
    assert deadlines[1] - record.created_ms < 80_000  # type: ignore[operator]


# --- nothing is lost or done twice ----------------------------------------------------------------


class DiedError(Exception):
    """The process was killed at this call."""


@pytest.mark.parametrize("step", range(36))
def test_a_runner_that_dies_at_any_call_leaves_every_line_answered_once(
    ai: openai.OpenAI, runner: Runner, site: Site, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runner dies after `step` commands; with the last of these steps it is done by then."""
    batch = send(ai, line("a"), line("b", temperature=9), line("c"))
    consumer = site.worker()
    calls = 0

    def dying(send: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > step:
                raise DiedError
            return send(*args, **kwargs)

        return act

    def serve() -> None:
        for job in consumer.pop(8):
            site.finish(job)

    with monkeypatch.context() as patch:
        patch.setattr(runner._scripts, "call", dying(runner._scripts.call))
        patch.setattr(runner._producer, "submit", dying(runner._producer.submit))
        for name in ("hgetall", "lrange", "transaction", "rpush", "lrem", "exists"):
            patch.setattr(runner._client, name, dying(getattr(runner._client, name)))
        try:
            for _ in range(12):
                runner.advance(batch.id)
                serve()
        except DiedError:
            pass
    site.redis.delete(site.keys.batch_part(batch.id, "claim"))
    while batch.id in runner.batches.open():
        runner.advance(batch.id)
        serve()
    done = runner.batches.get(batch.id)
    assert (done.status, done.completed, done.failed, done.total) == ("completed", 2, 1, 3)
    assert answers(ai, done.output.file).keys() == {"a", "c"}
    assert answers(ai, done.error.file).keys() == {"b"}
    assert len(site.jobs()) == 2


def test_a_result_is_kept_until_it_is_collected_however_short_the_retention(
    ai: openai.OpenAI, settings: Settings, model: Model, redis_client: redis.Redis
) -> None:
    site = Site(redis_client, retention_s=1)
    runner = Runner(redis_client, settings, lambda: model)
    batch = send(ai, line("a"))
    advance(runner, batch, lambda record: record.next == 1)
    (job,) = site.worker().pop(1)
    site.finish(job)
    assert redis_client.ttl(site.keys.job(job.job_id)) == -1
    advance(runner, batch)
    assert redis_client.ttl(site.keys.job(job.job_id)) > 0
    site.close()


def test_a_line_whose_job_is_gone_is_answered_with_that(
    ai: openai.OpenAI, runner: Runner, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_LOOK_S", 0.0)
    batch = send(ai, line("a"))
    advance(runner, batch, lambda record: record.next == 1)
    redis_client.delete(f"wicore:job:{batch.id}-0")
    done = advance(runner, batch)
    assert answers(ai, done.error.file)["a"]["error"]["code"] == "request_lost"


def test_a_response_of_a_batch_cannot_be_deleted_from_under_it(
    ai: openai.OpenAI, runner: Runner, site: Site
) -> None:
    batch = send(ai, line("a", "/v1/responses"), endpoint="/v1/responses")
    advance(runner, batch, lambda record: record.next == 1)
    (job,) = site.worker().pop(1)
    site.finish(job)
    ai.responses.delete(f"resp_{job.job_id}")
    assert advance(runner, batch).completed == 1


def test_nothing_of_a_batch_stays_but_its_record_and_files(
    ai: openai.OpenAI, runner: Runner, worker: Any, redis_client: redis.Redis
) -> None:
    batch = send(ai, line("a"))
    done = advance(runner, batch)
    assert redis_client.keys(f"wicore:batch:{batch.id}*") == [f"wicore:batch:{batch.id}".encode()]
    assert redis_client.ttl(f"wicore:batch:{batch.id}") > 0
    assert all(redis_client.ttl(key) > 0 for key in redis_client.keys(f"*{done.output.file}*"))
    assert not redis_client.exists("wicore:batches:open")


def test_a_tasks_process_that_is_killed_and_restarted_answers_each_line_once(
    ai: openai.OpenAI, settings: Settings, worker: Any
) -> None:
    lines = [line(str(i), max_tokens=20, ignore_eos=True) for i in range(300)]
    batch = send(ai, *lines)
    process = tasks_process(settings)
    try:
        until(lambda: ai.batches.retrieve(batch.id).request_counts.completed > 0)
    finally:
        process.kill()
        process.wait()
    assert ai.batches.retrieve(batch.id).status == "in_progress"
    process = tasks_process(settings)
    try:
        until(lambda: ai.batches.retrieve(batch.id).status == "completed", patience_s=120)
    finally:
        process.terminate()
        assert process.wait(20) == 0
    done = ai.batches.retrieve(batch.id)
    assert done.request_counts.to_dict() == {"total": 300, "completed": 300, "failed": 0}
    assert answers(ai, done.output_file_id).keys() == {str(i) for i in range(300)}


# --- doors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-unknown"}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
        ({"color": "red"}, "color"),
    ],
)
def test_a_bad_batch_is_refused_by_name(ai: openai.OpenAI, body: dict[str, Any], param: str) -> None:
    file = ai.files.create(file=("in.jsonl", b"x"), purpose="batch")
    good = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    with pytest.raises(openai.BadRequestError) as caught:
        ai.post("/batches", body={**good, **body}, cast_to=object)
    assert caught.value.body["param"] == param  # type: ignore[index]
    assert list(ai.batches.list()) == []


def test_an_output_file_is_no_input(ai: openai.OpenAI, runner: Runner, worker: Any) -> None:
    done = advance(runner, send(ai, line("a")))
    with pytest.raises(openai.BadRequestError, match="purpose"):
        ai.batches.create(input_file_id=done.output.file, endpoint=CHAT, completion_window="24h")


def test_batches_are_listed_in_pages_newest_first(ai: openai.OpenAI) -> None:
    made = [send(ai, line("a")).id for _ in range(5)]
    page = ai.batches.list(limit=2)
    assert [batch.id for batch in page.data] == made[:2:-1]
    assert page.has_more
    assert [batch.id for batch in ai.batches.list(limit=2)] == made[::-1]
    with pytest.raises(openai.BadRequestError):
        ai.batches.list(limit=101)


def test_a_batch_is_there_for_its_owner_alone(
    redis_client: redis.Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def restricted() -> Caller:
        return Caller(request.headers["Authorization"].rpartition("-")[2], restricted=True)

    for module in ("api.files", "api.batches"):
        monkeypatch.setattr(f"{module}.caller", restricted)
    with serving(settings) as url, official(url, "key-one") as one, official(url, "key-two") as two:
        batch = send(one, line("a"))
        assert [found.id for found in one.batches.list()] == [batch.id]
        assert list(two.batches.list()) == []
        for act in (two.batches.retrieve, two.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                act(batch.id)
        with pytest.raises(openai.NotFoundError):
            two.batches.list(after=batch.id)
        with pytest.raises(openai.BadRequestError, match="No file"):
            two.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
        assert one.batches.retrieve(batch.id).status == "validating"
