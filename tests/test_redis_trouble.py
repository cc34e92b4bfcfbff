"""Redis in trouble: full, slow, read-only, loading, gone, or back without its last writes."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis

from tests.queue_site import RESULT, Site
from tests.servers import Server
from tests.services import follow, running_worker, settings_for, start_api, stop, worker_process
from tests.test_stream import Writer, story, tell
from tests.waiting import free_port, until
from wicore.config import Settings
from wicore.errors import Unavailable
from wicore.queue.connection import connect, dedicated_connection
from wicore.queue.consumer import Delivery
from wicore.queue.producer import Producer
from wicore.request import Event, Priority, parse_job

pytestmark = pytest.mark.valkey


def submit(client: redis.Redis, tokens: int, **more: Any) -> str:
    body = {"kind": "completion", "prompt": "Once", "max_tokens": tokens, "ignore_eos": True}
    return Producer(client).submit(parse_job(body), Priority.NORMAL, **more).id


def text(events: list[Event]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "token")


# --- writes that were lost ------------------------------------------------------------------------


@pytest.fixture
def delivery(site: Site) -> Delivery:
    site.submit()
    (delivery,) = site.worker().pop(1)
    return delivery


@pytest.fixture
def writer(site: Site) -> Iterator[Writer]:
    writer = Writer(site)
    yield writer
    assert writer.publisher.stop(5)


def undo(site: Site, job: str, seq: int) -> None:
    """As if Redis had come back without the events after `seq`."""
    events, key = site.log(job), site.keys.log(job)
    site.redis.delete(key)
    for event in events[:seq]:
        text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        site.redis.xadd(key, {"event": text}, id=f"0-{event['seq']}")
    site.redis.hset(site.keys.job(job), "seq", seq)


@pytest.mark.parametrize("left", [0, 1, 15, 29])
@pytest.mark.parametrize("more", [1, 20])
def test_events_that_the_log_lost_are_written_again(
    site: Site, writer: Writer, delivery: Delivery, left: int, more: int
) -> None:
    events = story(delivery.job_id, 60)
    tell(writer, delivery, events[:30])
    assert writer.publisher.flush(5)
    undo(site, delivery.job_id, left)
    tell(writer, delivery, events[30 : 30 + more])
    assert writer.publisher.flush(5)
    assert site.log(delivery.job_id) == events[: 30 + more]
    tell(writer, delivery, events[30 + more :])
    assert writer.finished.get(timeout=5) == delivery
    assert site.log(delivery.job_id) == events
    assert writer.lost.empty()


def test_a_log_that_was_cut_before_the_end_is_mended_by_the_end(
    site: Site, writer: Writer, delivery: Delivery
) -> None:
    events = story(delivery.job_id, 10)
    tell(writer, delivery, events[:-1])
    assert writer.publisher.flush(5)
    undo(site, delivery.job_id, 3)
    tell(writer, delivery, events[-1:])
    assert writer.finished.get(timeout=5) == delivery
    assert site.log(delivery.job_id) == events
    assert site.producer.record(delivery.job_id).result == RESULT


def test_a_job_whose_lost_events_are_too_many_goes_to_another_attempt(
    site: Site, delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wicore.stream.publisher._KEPT_EVENTS", 10)
    writer = Writer(site)
    events = story(delivery.job_id, 40)
    tell(writer, delivery, events[:30])
    assert writer.publisher.flush(5)
    undo(site, delivery.job_id, 19)
    tell(writer, delivery, events[30:31])
    assert writer.lost.get(timeout=5) == delivery
    assert site.log(delivery.job_id) == events[:19], "nothing may be written after a gap"
    assert writer.publisher.stop(5)


def test_a_lost_pop_leaves_the_job_to_the_queue(site: Site, writer: Writer, delivery: Delivery) -> None:
    events = story(delivery.job_id, 10)
    tell(writer, delivery, events[:5])
    assert writer.publisher.flush(5)
    site.lose_workers()
    undo(site, delivery.job_id, 0)
    tell(writer, delivery, events[5:6])
    assert writer.lost.get(timeout=5) == delivery
    assert site.log(delivery.job_id) == []


def test_what_is_kept_for_writing_again_goes_with_the_job(site: Site, writer: Writer) -> None:
    for _ in range(3):
        site.submit()
    done, lost, dropped = site.worker().pop(3)
    tell(writer, done, story(done.job_id, 5))
    for delivery in (lost, dropped):
        tell(writer, delivery, story(delivery.job_id, 5)[:3])
    assert writer.publisher.flush(5)
    assert len(writer.publisher._kept) == 2
    site.redis.hset(site.keys.job(lost.job_id), "fence", "other:2")
    tell(writer, lost, story(lost.job_id, 5)[3:5])
    assert writer.lost.get(timeout=5) == lost
    writer.publisher.forget(dropped)
    assert not writer.publisher._kept
    site.redis.hset(site.keys.job(lost.job_id), "fence", lost.fence)


# --- a worker goes on -----------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of the test's own, on a TCP port."""
    folder = Path(tempfile.mkdtemp(prefix="wicore-"))
    server = Server(folder / "data", "--appendonly", "no", "--save", "")
    try:
        yield server
    finally:
        server.close()
        shutil.rmtree(folder)


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    client = connect(f"redis://127.0.0.1:{server.port}/0")
    yield client
    client.close()


def null_settings(server: Server, step_ms: float, **more: Any) -> Settings:
    url = f"redis://127.0.0.1:{server.port}/0"
    return settings_for(url, engine__kind="null", engine__null_step_ms=step_ms, **more)


def undisturbed(server: Server, client: redis.Redis, tokens: int) -> str:
    with running_worker(null_settings(server, 0.0), "before"):
        return text(list(follow(client, submit(client, tokens))))


def test_full_memory_refuses_jobs_holds_tokens_back_and_loses_nothing(
    server: Server, client: redis.Redis
) -> None:
    expected = undisturbed(server, client, 1500)
    settings = null_settings(server, 2.0, queue__lease_s=0.6, scheduler__max_batch=1)
    with running_worker(settings) as worker:
        job = submit(client, 1500, job_id="runs")
        waiting, doomed = (submit(client, 3, job_id=name) for name in ("waits", "is-called-off"))
        until(lambda: Producer(client).record(job).seq > 100, "tokens")
        client.config_set("maxmemory", "1mb")
        held = Producer(client).record(job).seq
        with pytest.raises(Unavailable, match=r"takes no writes: its memory is full \(maxmemory\)"):
            submit(client, 3)
        assert Producer(client).cancel(doomed) == "cancelled"
        steps = worker.status()["steps"]
        until(lambda: worker.status()["steps"] > steps + 500, "steps while memory is full, over a lease")
        assert Producer(client).record(job).seq == held
        client.config_set("maxmemory", "0")
        events = list(follow(client, job))
        assert list(follow(client, waiting))[-1]["type"] == "done"
    assert [event["seq"] for event in events] == list(range(1, 1503))
    assert text(events) == expected
    assert Producer(client).record(job).attempts == 1


def test_in_full_memory_jobs_end_and_leases_are_renewed_and_given_back(
    server: Server, client: redis.Redis
) -> None:
    site = Site(client)
    for _ in range(4):
        site.submit()
    ends, dies, returns, is_kept = site.worker("w1").pop(4)
    site.start(ends)
    client.zadd(site.keys.leases, {dies.tag: 1})
    client.config_set("maxmemory", "1mb")
    with pytest.raises(Unavailable, match="maxmemory"):
        site.worker("w2").pop(1)
    (refused,) = site.write(is_kept, story(is_kept.job_id, 1)[0])
    assert isinstance(refused, redis.ResponseError)
    assert site.finish(ends) == 1
    site.worker("w1").hand_back([returns])
    assert site.reap() == [1, 0]
    assert site.scripts.call("renew", is_kept.job_id, is_kept.tag, is_kept.fence) == [[], []]
    client.config_set("maxmemory", "0")
    site.check()
    site.close()


def test_a_frozen_redis_costs_a_running_job_nothing(server: Server, client: redis.Redis) -> None:
    expected = undisturbed(server, client, 1500)
    with running_worker(null_settings(server, 2.0, queue__lease_s=1.0)) as worker:
        job = submit(client, 1500)
        seen: list[Event] = []
        for event in follow(client, job):
            seen.append(event)
            if event["seq"] == 100:
                server.process.send_signal(signal.SIGSTOP)
                until(lambda: worker.status()["steps"] > 900, "steps, for longer than a lease")
                server.process.send_signal(signal.SIGCONT)
    assert [event["seq"] for event in seen] == list(range(1, 1503))
    assert text(seen) == expected
    assert Producer(client).record(job).attempts == 1


def test_a_worker_with_a_full_buffer_pauses_and_goes_on(server: Server, client: redis.Redis) -> None:
    expected = undisturbed(server, client, 600)
    with running_worker(null_settings(server, 1.0)) as worker:
        worker._publisher._limit = 50
        job = submit(client, 600)
        until(lambda: Producer(client).record(job).seq > 20, "tokens")
        client.config_set("maxmemory", "1mb")
        until(lambda: worker._publisher.full, "a full buffer")
        steps = worker.status()["steps"]
        for _ in range(20):
            done = threading.Event()
            worker._inbox.put(done.set)
            assert done.wait(5)
        assert worker.status()["steps"] <= steps + 1
        client.config_set("maxmemory", "0")
        events = list(follow(client, job))
    assert text(events) == expected


@pytest.mark.parametrize("drain_s", [0.0, 1.0])
def test_a_worker_with_a_full_buffer_stops_when_told(
    server: Server, client: redis.Redis, drain_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.worker._FLUSH_S", 0.5)
    with running_worker(null_settings(server, 1.0, queue__drain_s=drain_s)) as worker:
        worker._publisher._limit = 50
        job = submit(client, 3000)
        until(lambda: Producer(client).record(job).seq > 20, "tokens")
        client.config_set("maxmemory", "1mb")
        until(lambda: worker._publisher.full, "a full buffer")
        told = time.monotonic()
    assert time.monotonic() - told < drain_s + 3
    client.config_set("maxmemory", "0")
    record = Producer(client).record(job)
    assert (record.status, record.attempts) == ("queued", 0), "handed back"


TAKE_ALL_LEASES = """#!lua flags=allow-oom
for _, tag in ipairs(redis.call('ZRANGE', 'wicore:leases', 0, -1)) do
  local head = redis.call('HGET', 'wicore:unacked', tag)
  local id = cjson.decode(string.sub(head, 1, string.find(head, '\\n') - 1))[3]
  redis.call('HSET', 'wicore:job:' .. id, 'fence', 'gone:1')
  redis.call('ZADD', 'wicore:leases', 'XX', 1, tag)
end
"""


def test_a_lease_lost_behind_a_full_buffer_frees_the_worker(server: Server, client: redis.Redis) -> None:
    with running_worker(null_settings(server, 1.0, queue__lease_s=0.6)) as worker:
        worker._publisher._limit = 50
        job = submit(client, 3000)
        until(lambda: Producer(client).record(job).seq > 20, "tokens")
        client.config_set("maxmemory", "1mb")
        until(lambda: worker._publisher.full, "a full buffer")
        first = Producer(client).record(job).seq
        client.eval(TAKE_ALL_LEASES, 0)
        until(lambda: not worker._publisher.full, "room")
        client.config_set("maxmemory", "0")
        until(lambda: Producer(client).record(job).seq > first + 100, "tokens of the next attempt")
        Producer(client).cancel(job)
        events = list(follow(client, job))
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["type"] for event in events if event["type"] != "token"] == [
        "started",
        "resumed",
        "cancelled",
    ]


def test_connecting_to_a_frozen_redis_ends(server: Server) -> None:
    client = connect(f"redis://127.0.0.1:{server.port}/0", timeout=0.2)
    with frozen(server):
        start = time.monotonic()
        with pytest.raises(redis.TimeoutError):
            dedicated_connection(client)
        assert time.monotonic() - start < 2
    dedicated_connection(client).disconnect()
    client.close()


# --- nothing spins --------------------------------------------------------------------------------


@contextmanager
def refused(server: Server) -> Iterator[None]:
    server.client.save()
    server.kill()
    yield
    server.start()


@contextmanager
def loading(server: Server) -> Iterator[None]:
    server.client.save()
    server.kill()
    server.launch("--key-load-delay", "25000", "--loading-process-events-interval-bytes", "1024")
    yield
    until(server.client.ping, "the data loaded")


@contextmanager
def read_only(server: Server) -> Iterator[None]:
    server.client.execute_command("REPLICAOF", "127.0.0.1", free_port())
    yield
    server.client.execute_command("REPLICAOF", "NO", "ONE")


@contextmanager
def full(server: Server) -> Iterator[None]:
    server.client.config_set("maxmemory", "1mb")
    yield
    server.client.config_set("maxmemory", "0")


@contextmanager
def frozen(server: Server) -> Iterator[None]:
    server.process.send_signal(signal.SIGSTOP)
    yield
    server.process.send_signal(signal.SIGCONT)


TROUBLES = {
    refused: "cannot be reached",
    loading: "cannot be reached: Valkey is loading the dataset in memory",
    read_only: "takes no writes: You can't write against a read only replica",
    full: "takes no writes: its memory is full",
    frozen: "cannot be reached: Timeout reading from socket",
}


@pytest.fixture(scope="module")
def service(valkey_server: Any) -> Iterator[tuple[Server, httpx.Client, list[psutil.Process]]]:
    """Server, API and worker as processes, and a job that runs all the time and is followed.

    `valkey_server` is not used but skips where there is none.
    """
    folder = Path(tempfile.mkdtemp(prefix="wicore-"))
    server = Server(folder / "data", "--appendonly", "no", "--save", "")
    for i in range(150):
        server.client.set(f"ballast:{i}", "x" * 2000)
    settings = null_settings(server, 100.0, api__port=free_port())
    api, worker = start_api(settings), worker_process(settings)
    with httpx.Client(base_url=f"http://127.0.0.1:{settings.api.port}", timeout=30) as http:
        until(lambda: http.get("/ready").status_code == 200, "a service")
        body = {"kind": "completion", "prompt": "Once", "max_tokens": 3000, "ignore_eos": True}
        job = http.post("/v1/jobs", json=body).json()["id"]
        listener = threading.Thread(target=listen, args=(settings.api.port, job))
        listener.start()
        root = psutil.Process(api.pid)
        yield server, http, [psutil.Process(worker.pid), root, *root.children(recursive=True)]
        http.delete(f"/v1/jobs/{job}")
        listener.join(20)
    stop(api)
    stop(worker)
    server.close()
    shutil.rmtree(folder)
    assert not listener.is_alive()


def listen(port: int, job: str) -> None:
    with httpx.stream("GET", f"http://127.0.0.1:{port}/v1/jobs/{job}/events", timeout=60) as events:
        seqs = [int(line[4:]) for line in events.iter_lines() if line.startswith("id: ")]
    assert seqs == list(range(1, len(seqs) + 1))


def cpu_s(processes: list[psutil.Process]) -> list[float]:
    return [sum(process.cpu_times()[:2]) for process in processes]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.__name__)
def test_trouble_is_a_503_with_its_reason_costs_no_cpu_and_passes(
    service: tuple[Server, httpx.Client, list[psutil.Process]], trouble: Any
) -> None:
    server, http, processes = service
    ask = {"prompt": "Once", "max_tokens": 3}
    with trouble(server):
        before, start = cpu_s(processes), time.monotonic()
        answer = http.post("/v1/completions", json=ask)
        assert time.monotonic() - start < 8
        assert answer.status_code == 503
        assert TROUBLES[trouble] in answer.json()["error"]["message"]
        assert int(answer.headers["Retry-After"]) >= 1
        time.sleep(max(0.0, start + 3 - time.monotonic()))
        spent = [after - earlier for earlier, after in zip(before, cpu_s(processes), strict=True)]
        shares = [share / (time.monotonic() - start) for share in spent]
    assert max(shares) < 0.2, shares
    until(lambda: http.post("/v1/completions", json=ask).status_code == 200, "an answer")
