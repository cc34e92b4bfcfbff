"""Jobs with images in a worker: encoded on a thread of its own, whatever happens to the job meanwhile."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.images import asked, damaged_png, png
from tests.seeing import HeldEncoder, seeing_model
from tests.services import follow, running_worker, settings_for, worker_process
from tests.waiting import until
from wicore.admission import admit
from wicore.config import QueueSettings, Settings
from wicore.engine.factory import create_engine
from wicore.errors import EngineError
from wicore.exit_codes import ExitCode
from wicore.queue.connection import connect
from wicore.queue.producer import Producer
from wicore.queue.schema import Keys
from wicore.queue.scripts import Scripts
from wicore.request import Priority, parse_job
from workers.worker import Worker

pytestmark = pytest.mark.valkey

RED, BLUE = png(seed=1), png(seed=2)


def submit(redis_client: Any, *parts: Any, priority: Priority = Priority.NORMAL, **fields: Any) -> str:
    asked_for = {"temperature": 0.0, "max_tokens": 3, "ignore_eos": True, **fields}
    body = parse_job({"messages": asked(*parts), **asked_for})
    return Producer(redis_client).submit(body, priority).id


def events(redis_client: Any, job: str) -> list[dict[str, Any]]:
    return list(follow(redis_client, job))


def kinds(told: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in told if event["type"] != "token"]


@pytest.fixture
def settings(valkey_url: str) -> Settings:
    return settings_for(valkey_url, engine__kind="null", engine__null_step_ms=0.5)


@pytest.fixture
def encoder() -> HeldEncoder:
    return HeldEncoder()


@pytest.fixture
def worker(redis_client: Any, settings: Settings, encoder: HeldEncoder) -> Iterator[Worker]:
    with running_worker(settings, model=seeing_model(settings), encoder=encoder) as running:
        yield running
    assert encoder.closed


class Watched:
    """An engine that tells which images its steps had: first token and value of the rows of each."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.images: list[list[tuple[int, float]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def start(self, plan: Any) -> Any:
        given = [[(i.start, float(i.rows[0, 0])) for i in one.images] for one in plan.sequences if one.images]
        self.images += given
        return self._engine.start(plan)


# --- in order -------------------------------------------------------------------------------------


def test_jobs_without_images_do_not_wait_for_one_that_is_encoded(
    worker: Worker, redis_client: Any, encoder: HeldEncoder
) -> None:
    seeing = submit(redis_client, "What is this?", RED, max_tokens=2000)
    encoder.begun()
    assert kinds(events(redis_client, submit(redis_client, "Hello"))) == ["started", "done"]
    assert Producer(redis_client).record(seeing).status == "running"
    (sequence,) = worker.status()["sequences"]
    assert (sequence["job"], sequence["waits"]) == (seeing, True)
    encoder.let()
    told = follow(redis_client, seeing)
    next(event for event in told if event["type"] == "token")
    assert worker.status()["sequences"][0]["waits"] is False
    Producer(redis_client).cancel(seeing)
    assert list(told)[-1]["type"] == "cancelled"


def test_the_next_turn_of_a_chat_does_not_encode_its_images_again(
    worker: Worker, redis_client: Any, encoder: HeldEncoder
) -> None:
    encoder.let(2)
    events(redis_client, submit(redis_client, "Compare", RED, BLUE, RED))
    assert len(encoder.seen) == 2
    events(redis_client, submit(redis_client, "Once more", BLUE, RED))
    assert len(encoder.seen) == 2
    images = worker.status()["images"]
    assert (sum(images["encode_seconds"]["counts"]), images["cache_hits"]) == (2, 2)
    assert images["cache_bytes"] == 2 * 4 * 64 * 4


def test_a_kept_image_does_not_wait_for_another_that_is_encoded(
    worker: Worker, redis_client: Any, encoder: HeldEncoder
) -> None:
    encoder.let()
    events(redis_client, submit(redis_client, "This", RED))
    encoder.begun()
    slow = submit(redis_client, "That", BLUE)
    encoder.begun()
    assert kinds(events(redis_client, submit(redis_client, "This again", RED))) == ["started", "done"]
    assert Producer(redis_client).record(slow).status == "running"
    encoder.let()
    events(redis_client, slow)


def test_the_most_urgent_jobs_images_come_first(
    worker: Worker, redis_client: Any, encoder: HeldEncoder
) -> None:
    pictures = [png(seed=seed) for seed in range(10, 14)]
    batch = [submit(redis_client, *two, priority=Priority.BATCH) for two in (pictures[:2], pictures[2:])]
    encoder.begun()
    urgent = submit(redis_client, "Quick", RED, priority=Priority.INTERACTIVE)
    until(lambda: len(worker.status()["sequences"]) == 3)
    encoder.let(2)
    assert events(redis_client, urgent)[-1]["type"] == "done"
    encoder.let(3)
    for job in batch:
        assert events(redis_client, job)[-1]["type"] == "done"


def test_each_picture_is_given_to_the_engine_where_it_stands(redis_client: Any, settings: Settings) -> None:
    model, encoder = seeing_model(settings), HeldEncoder(held=False)
    engine: Any = Watched(create_engine(settings, model))
    with running_worker(settings, engine=engine, model=model, encoder=encoder):
        events(redis_client, submit(redis_client, RED, "and", BLUE, "and", RED))
    red, blue = encoder.seen
    (given,) = engine.images
    body = parse_job({"messages": asked(RED, "and", BLUE, "and", RED)})
    starts = [image.start for image in admit(body, model, settings).images]
    assert given == list(zip(starts, [red, blue, red], strict=True))


def test_a_cache_of_no_bytes_keeps_nothing_and_everything_is_served(
    redis_client: Any, valkey_url: str
) -> None:
    settings = settings_for(valkey_url, engine__kind="null", model__image_cache_bytes=0)
    encoder = HeldEncoder(held=False)
    with running_worker(settings, model=seeing_model(settings), encoder=encoder):
        for _ in range(2):
            assert events(redis_client, submit(redis_client, RED, BLUE, RED))[-1]["type"] == "done"
    assert len(encoder.seen) == 4


# --- what ends a job meanwhile --------------------------------------------------------------------


def test_a_job_cancelled_while_its_image_is_encoded_ends_at_once_and_the_rest_is_not_encoded(
    worker: Worker, redis_client: Any, encoder: HeldEncoder
) -> None:
    job = submit(redis_client, RED, BLUE)
    encoder.begun()
    Producer(redis_client).cancel(job)
    assert kinds(events(redis_client, job)) == ["started", "cancelled"]
    other = submit(redis_client, "Then", png(seed=3))
    encoder.let(2)
    assert kinds(events(redis_client, other)) == ["started", "done"]
    assert len(encoder.seen) == 2


def test_a_job_whose_deadline_passes_while_its_image_is_encoded_expires(
    worker: Worker, redis_client: Any, encoder: HeldEncoder
) -> None:
    job = submit(redis_client, RED, timeout_s=0.3)
    encoder.begun()
    assert kinds(events(redis_client, job)) == ["started", "expired"]
    encoder.let()


def test_a_job_whose_lease_is_lost_while_its_image_is_encoded_is_dropped(
    worker: Worker, redis_client: Any, encoder: HeldEncoder
) -> None:
    job = submit(redis_client, RED)
    encoder.begun()
    assert next(follow(redis_client, job))["type"] == "started"
    for tag in redis_client.zrange("wicore:leases", 0, -1):
        redis_client.zadd("wicore:leases", {tag: 1})
    Scripts(redis_client, Keys("wicore"), QueueSettings()).call("reap")
    until(lambda: Producer(redis_client).record(job).attempts == 2)  # the same worker has it again
    encoder.let()
    told = events(redis_client, job)
    assert kinds(told) == ["started", "resumed", "done"]
    assert [event["seq"] for event in told] == list(range(1, len(told) + 1))
    assert len(encoder.seen) == 1


def test_a_full_worker_counts_a_job_whose_image_is_encoded_as_one_of_its_slots(
    redis_client: Any, valkey_url: str, encoder: HeldEncoder
) -> None:
    settings = settings_for(valkey_url, engine__kind="null", scheduler__max_batch=2)
    with running_worker(settings, model=seeing_model(settings), encoder=encoder):
        job = submit(redis_client, RED, n=2)
        encoder.begun()
        waiting = submit(redis_client, "Hello")
        until(lambda: Producer(redis_client).record(job).status == "running")
        assert Producer(redis_client).record(waiting).status == "queued"
        encoder.let()
        for one in (job, waiting):
            assert events(redis_client, one)[-1]["type"] == "done"


def test_a_worker_that_stops_while_an_image_is_encoded_hands_the_job_back(
    redis_client: Any, valkey_url: str, encoder: HeldEncoder
) -> None:
    settings = settings_for(valkey_url, engine__kind="null", queue__drain_s=0.0)
    model = seeing_model(settings)
    with running_worker(settings, "first", model=model, encoder=encoder) as worker:
        job = submit(redis_client, RED)
        encoder.begun()
        worker.stop()
        until(lambda: Producer(redis_client).record(job).status == "queued")
        encoder.let()
    assert encoder.closed
    assert Producer(redis_client).record(job).attempts == 0
    with running_worker(settings, "second", model=model, encoder=HeldEncoder(held=False)):
        told = events(redis_client, job)
    assert kinds(told) == ["started", "resumed", "done"]


def test_a_worker_that_drains_waits_for_the_image(
    redis_client: Any, settings: Settings, encoder: HeldEncoder
) -> None:
    with running_worker(settings, model=seeing_model(settings), encoder=encoder) as worker:
        job = submit(redis_client, RED)
        encoder.begun()
        worker.stop()
        encoder.let()
    assert kinds(events(redis_client, job)) == ["started", "done"]


# --- what cannot be encoded -----------------------------------------------------------------------


def test_an_image_that_turns_out_to_be_none_fails_its_job_alone_naming_the_field(
    worker: Worker, redis_client: Any, encoder: HeldEncoder
) -> None:
    told = events(redis_client, submit(redis_client, "What?", damaged_png()))
    assert kinds(told) == ["started", "failed"]
    error = told[-1]["error"]
    assert (error["code"], error["param"]) == ("invalid_request", "messages.0.content.1.image_url.url")
    encoder.let()
    assert kinds(events(redis_client, submit(redis_client, RED))) == ["started", "done"]


def test_a_fault_of_ours_fails_the_job_and_the_next_image_is_encoded(
    worker: Worker, redis_client: Any, encoder: HeldEncoder, caplog: Any
) -> None:
    encoder.error = ZeroDivisionError()
    encoder.let()
    told = events(redis_client, submit(redis_client, RED))
    assert (kinds(told), told[-1]["error"]["code"]) == (["started", "failed"], "internal_error")
    assert "an image could not be encoded" in caplog.text
    encoder.error = None
    encoder.let()
    assert kinds(events(redis_client, submit(redis_client, RED))) == ["started", "done"]


@pytest.mark.parametrize("eyes", [False, True])
def test_where_no_images_can_be_seen_the_job_is_refused(
    redis_client: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch, eyes: bool
) -> None:
    """Neither by a model without a tower, nor where nothing encodes for one that has it."""
    monkeypatch.setattr("tests.services.create_vision", lambda *_: None)
    with running_worker(settings, model=seeing_model(settings) if eyes else None):
        told = events(redis_client, submit(redis_client, "What?", RED))
    assert told[-1]["error"]["param"] == "messages.0.content.1.type"
    assert "this model is served for text alone" in told[-1]["error"]["message"]


# --- encoders that fail or hang -------------------------------------------------------------------


def test_the_jobs_of_a_failed_encoder_go_on_at_once_in_another_worker(
    redis_client: Any, valkey_url: str, encoder: HeldEncoder
) -> None:
    # Leases so long that they cannot be what frees the jobs.
    settings = settings_for(valkey_url, engine__kind="null", queue__lease_s=600.0)
    model = seeing_model(settings)
    job = submit(redis_client, RED)
    encoder.error = EngineError("the device is gone")
    encoder.let()
    client = connect(settings.redis.url or "")
    with pytest.raises(EngineError, match="device is gone"):
        Worker(settings, model, create_engine(settings, model), client, "broken", encoder).run()
    client.close()
    assert Producer(redis_client).record(job).status == "queued"
    with running_worker(settings, "healthy", model=model, encoder=HeldEncoder(held=False)):
        assert kinds(events(redis_client, job)) == ["started", "resumed", "done"]
    assert Producer(redis_client).record(job).attempts == 2


def test_a_long_encode_loses_no_lease(redis_client: Any, valkey_url: str, encoder: HeldEncoder) -> None:
    settings = settings_for(valkey_url, engine__kind="null", queue__lease_s=0.3, queue__stall_s=1.0)
    with running_worker(settings, model=seeing_model(settings), encoder=encoder) as worker:
        job = submit(redis_client, RED)
        encoder.begun()
        until(lambda: worker.image_lasts_s() > 1.2)
        encoder.let()
        assert kinds(events(redis_client, job)) == ["started", "done"]
    assert Producer(redis_client).record(job).attempts == 1


def test_a_hung_encoder_loses_its_leases_to_another_worker(
    redis_client: Any, valkey_url: str, encoder: HeldEncoder
) -> None:
    settings = settings_for(valkey_url, engine__kind="null", queue__lease_s=0.3, queue__image_stall_s=1.0)
    model = seeing_model(settings)
    with running_worker(settings, "hung", model=model, encoder=encoder):
        job = submit(redis_client, RED)
        encoder.begun()
        with running_worker(settings, "healthy", model=model, encoder=HeldEncoder(held=False)):
            told = events(redis_client, job)
        encoder.let()
    assert kinds(told) == ["started", "resumed", "done"]


def test_a_worker_process_whose_encoder_hangs_ends_for_a_new_one(redis_client: Any, valkey_url: str) -> None:
    settings = settings_for(valkey_url, engine__kind="null", queue__lease_s=0.5, queue__image_stall_s=1.0)
    submit(redis_client, RED)
    process = worker_process(settings, "tests.hanging_encoder", stderr=subprocess.PIPE)
    _, told = process.communicate(timeout=60)
    assert process.returncode == ExitCode.STALLED
    assert "the encoder has been at one image for 2 s" in told.decode()


# --- other doors ----------------------------------------------------------------------------------


def test_a_plain_redis_client_sends_images_by_the_same_body(
    worker: Worker, redis_client: Any, encoder: HeldEncoder
) -> None:
    kwargs = {"messages": asked("What?", RED), "max_tokens": 2}
    message = {
        "body": base64.b64encode(json.dumps([[], kwargs, {}]).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": "wicore.generate", "id": "from-elsewhere"},
        "properties": {"delivery_tag": "t1", "priority": 3, "body_encoding": "base64"},
    }
    redis_client.lpush("wicore\x06\x163", json.dumps(message))
    encoder.begun()
    encoder.let()
    assert kinds(events(redis_client, "from-elsewhere")) == ["started", "done"]
