"""Publisher and relay: every event once and in order, whoever comes late, falls behind or is cut off."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.queue_site import RESULT, Site
from wicore.errors import EngineError, Unavailable, UnknownJob
from wicore.queue.connection import connect
from wicore.queue.consumer import Delivery
from wicore.queue.embedded import EmbeddedValkey
from wicore.request import Event, Priority, started_event, terminal_event, token_event, usage_of
from wicore.stream.publisher import Publisher
from wicore.stream.relay import Relay, read_log

pytestmark = pytest.mark.valkey


class Writer:
    """A publisher with its callbacks recorded."""

    def __init__(self, site: Site, **options: Any) -> None:
        self.lost: queue.Queue[Delivery] = queue.Queue()
        self.cancelled: queue.Queue[Delivery] = queue.Queue()
        self.finished: queue.Queue[Delivery] = queue.Queue()
        self.publisher = Publisher(
            site.redis,
            settings=site.settings,
            on_lost=self.lost.put,
            on_cancel=self.cancelled.put,
            on_finished=self.finished.put,
            **options,
        )
        self.publisher.start()


@pytest.fixture
def writer(site: Site) -> Iterator[Writer]:
    writer = Writer(site)
    yield writer
    assert writer.publisher.stop(5)


@pytest.fixture
def relay(redis_client: redis.Redis) -> Iterator[Relay]:
    relay = Relay(redis_client)
    yield relay
    relay.close()


@pytest.fixture
def delivery(site: Site) -> Delivery:
    site.submit()
    (delivery,) = site.worker().pop(1)
    return delivery


def story(job: str, tokens: int) -> list[Event]:
    """All events of a job, the first to the last."""
    middle = [token_event(job, seq, 0, f"t{seq}", [seq]) for seq in range(2, tokens + 2)]
    end = terminal_event(job, tokens + 2, "done", finish_reason="stop", usage=usage_of(1, tokens))
    return [started_event(job, 1, 1), *middle, end]


def tell(writer: Writer, delivery: Delivery, events: list[Event]) -> None:
    """Publish events one by one, the terminal one with a result."""
    for event in events:
        if event["type"] == "done":
            writer.publisher.finish(delivery, event, RESULT)
        else:
            writer.publisher.publish(delivery, [event])


def flat(batches: Iterator[list[Event]]) -> list[Event]:
    return [event for batch in batches for event in batch]


def take(batches: Iterator[list[Event]], count: int) -> list[Event]:
    """At least `count` events."""
    events: list[Event] = []
    while len(events) < count:
        events += next(batches)
    return events


# --- publisher ----------------------------------------------------------------------------------


def test_what_is_published_is_in_the_log_and_the_record(
    site: Site, writer: Writer, delivery: Delivery
) -> None:
    events = story(delivery.job_id, 20)
    tell(writer, delivery, events)
    assert writer.finished.get(timeout=5) == delivery
    assert site.log(delivery.job_id) == events
    assert site.producer.record(delivery.job_id).result == RESULT


def test_a_lost_job_is_reported_and_writes_nothing(site: Site, writer: Writer, delivery: Delivery) -> None:
    site.lose_workers()
    writer.publisher.publish(delivery, [started_event(delivery.job_id, 1, 1)])
    assert writer.lost.get(timeout=5) == delivery
    writer.publisher.finish(delivery, terminal_event(delivery.job_id, 1, "done"), RESULT)
    assert writer.lost.get(timeout=5) == delivery
    assert site.log(delivery.job_id) == []


def test_a_job_called_off_is_reported_with_the_next_append(
    site: Site, writer: Writer, delivery: Delivery
) -> None:
    site.producer.cancel(delivery.job_id)
    writer.publisher.publish(delivery, [started_event(delivery.job_id, 1, 1)])
    assert writer.cancelled.get(timeout=5) == delivery


def test_one_job_s_failure_does_not_hold_up_the_others(
    site: Site, writer: Writer, delivery: Delivery
) -> None:
    site.submit()
    (other,) = site.worker().pop(1)
    writer.publisher.publish(delivery, [token_event(delivery.job_id, 9, 0, "gap", [1])])
    tell(writer, other, story(other.job_id, 3))
    assert writer.finished.get(timeout=5) == other
    assert writer.lost.get(timeout=5) == delivery


def test_an_error_in_a_callback_does_not_end_the_publisher(site: Site, delivery: Delivery) -> None:
    writer = Writer(site)
    writer.publisher._on_finished = lambda d: 1 / 0
    tell(writer, delivery, story(delivery.job_id, 1))
    assert writer.publisher.flush(5)
    writer.publisher.publish(delivery, [token_event(delivery.job_id, 9, 0, "late", [1])])
    assert writer.lost.get(timeout=5) == delivery
    assert writer.publisher.stop(5)


def test_events_handed_over_while_redis_answers_go_out_together(
    site: Site, delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(site)
    call, entered, go = writer.publisher._scripts.call_replicated, threading.Event(), threading.Event()
    sizes: list[int] = []

    def slow(calls: Any, *replicas: Any) -> Any:
        sizes.append(len(calls))
        entered.set()
        assert go.wait(5)
        return call(calls, *replicas)

    monkeypatch.setattr(writer.publisher._scripts, "call_replicated", slow)
    events = story(delivery.job_id, 30)
    tell(writer, delivery, events[:1])
    assert entered.wait(5)
    tell(writer, delivery, events[1:])
    go.set()
    assert writer.publisher.stop(5)
    assert sizes == [1, 2], "one append, then one append and one finish"
    assert site.log(delivery.job_id) == events


@pytest.mark.parametrize("executed", [False, True])
def test_an_outage_neither_loses_nor_repeats_events(
    site: Site, delivery: Delivery, monkeypatch: pytest.MonkeyPatch, executed: bool
) -> None:
    writer = Writer(site)
    call, failures = writer.publisher._scripts.call_replicated, iter(range(3))

    def broken(*args: Any) -> Any:
        if next(failures, None) is None:
            return call(*args)
        if executed:  # the scripts ran, only the answer was lost
            call(*args)
        raise redis.ConnectionError("gone")

    monkeypatch.setattr(writer.publisher._scripts, "call_replicated", broken)
    events = story(delivery.job_id, 10)
    tell(writer, delivery, events)
    assert writer.finished.get(timeout=5) == delivery
    assert writer.publisher.stop(5)
    assert writer.lost.empty()
    assert site.log(delivery.job_id) == events


def test_a_full_buffer_says_so_and_says_when_there_is_room(
    site: Site, delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, up = threading.Event(), threading.Event()
    writer = Writer(site, buffer_events=4, on_room=room.set)
    call = writer.publisher._scripts.call_replicated

    def down(*args: Any) -> Any:
        if not up.is_set():
            raise redis.ConnectionError("gone")
        return call(*args)

    monkeypatch.setattr(writer.publisher._scripts, "call_replicated", down)
    events = story(delivery.job_id, 10)
    writer.publisher.publish(delivery, events[:3])
    assert not writer.publisher.full
    writer.publisher.publish(delivery, events[3:6])
    assert writer.publisher.full
    assert not room.is_set()
    up.set()
    assert room.wait(5)
    assert not writer.publisher.full
    assert writer.publisher.stop(5)
    assert site.log(delivery.job_id) == events[:6]


def test_a_lost_lease_frees_the_buffer_while_redis_is_away(
    site: Site, delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, tried = threading.Event(), threading.Event()
    writer = Writer(site, buffer_events=4, on_room=room.set)

    def down(*args: Any) -> Any:
        tried.set()
        raise redis.ConnectionError("gone")

    monkeypatch.setattr(writer.publisher._scripts, "call_replicated", down)
    events = story(delivery.job_id, 10)
    writer.publisher.publish(delivery, events[:3])
    assert tried.wait(5)
    writer.publisher.publish(delivery, events[3:8])
    writer.publisher.forget(delivery)
    assert room.is_set()
    assert writer.publisher.stop(5), "nothing is left to write"


def test_a_result_that_is_no_json_is_refused_at_once(writer: Writer, delivery: Delivery) -> None:
    with pytest.raises(ValueError, match="event"):
        writer.publisher.finish(delivery, token_event(delivery.job_id, 1, 0, "x", [1]))


def test_a_failed_job_carries_its_error(site: Site, writer: Writer, delivery: Delivery) -> None:
    error = EngineError("the device is gone").body()
    writer.publisher.finish(delivery, terminal_event(delivery.job_id, 1, "failed", error=error))
    assert writer.finished.get(timeout=5)
    assert site.producer.record(delivery.job_id).error == error
    meta = json.loads(site.redis.get(site.keys.celery_result(delivery.job_id)))
    assert meta["result"]["exc_type"] == "EngineError"


# --- relay --------------------------------------------------------------------------------------


def test_listeners_that_join_at_any_time_see_the_whole_story(
    writer: Writer, relay: Relay, delivery: Delivery
) -> None:
    events = story(delivery.job_id, 60)
    with ThreadPoolExecutor(8) as threads:
        listeners = []
        for start in range(0, len(events), 8):
            listeners.append(threads.submit(flat, relay.follow(delivery.job_id)))
            tell(writer, delivery, events[start : start + 8])
        assert writer.finished.get(timeout=5)
        for listener in listeners:
            assert listener.result(5) == events
    assert flat(relay.follow(delivery.job_id)) == events


def test_a_listener_resumes_after_any_event(writer: Writer, relay: Relay, delivery: Delivery) -> None:
    events = story(delivery.job_id, 5)
    tell(writer, delivery, events[:4])
    assert writer.publisher.flush(5)
    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(flat, relay.follow(delivery.job_id, seq)) for seq in range(8)]
        tell(writer, delivery, events[4:])
        for seq, listener in enumerate(running):
            assert listener.result(5) == events[seq:]
    for seq in range(9):
        assert flat(relay.follow(delivery.job_id, seq)) == events[seq:]


def test_an_unknown_job_is_refused_at_the_call(relay: Relay) -> None:
    for job in ("nobody", "no spaces"):
        with pytest.raises(UnknownJob):
            relay.follow(job)


def test_an_idle_listener_is_asked_now_and_then(relay: Relay, delivery: Delivery) -> None:
    batches = relay.follow(delivery.job_id, 0, 0.01)
    assert [next(batches), next(batches)] == [[], []]
    batches.close()


def test_a_gap_in_the_channel_is_filled_from_the_log(
    site: Site, writer: Writer, relay: Relay, delivery: Delivery
) -> None:
    events = story(delivery.job_id, 10)
    batches = relay.follow(delivery.job_id)
    tell(writer, delivery, events[:1])
    seen = take(batches, 1)
    channel = relay._subscriber._listeners[site.keys.events(delivery.job_id).encode()]
    (listener,) = channel
    put, dropped = listener.put, iter(range(4))
    listener.put = lambda payload: put(payload) if next(dropped, None) is None else None  # type: ignore[method-assign]
    tell(writer, delivery, events[1:])
    assert seen + flat(batches) == events


def test_a_listener_that_falls_behind_reads_the_log(
    site: Site, writer: Writer, redis_client: redis.Redis, delivery: Delivery
) -> None:
    relay = Relay(redis_client, buffer=4)
    events = story(delivery.job_id, 200)
    batches = relay.follow(delivery.job_id)
    tell(writer, delivery, events[:1])
    seen = take(batches, 1)
    tell(writer, delivery, events[1:])
    assert writer.finished.get(timeout=5)
    (listener,) = relay._subscriber._listeners[site.keys.events(delivery.job_id).encode()]
    with listener._changed:
        assert listener._changed.wait_for(lambda: listener._stale, 5)
        assert listener._payloads == []
    assert seen + flat(batches) == events
    relay.close()


def test_a_listener_that_leaves_is_unsubscribed(
    site: Site, writer: Writer, relay: Relay, delivery: Delivery
) -> None:
    channel = site.keys.events(delivery.job_id)
    tell(writer, delivery, story(delivery.job_id, 1)[:1])
    batches = [relay.follow(delivery.job_id) for _ in range(2)]
    for listener in batches:
        take(listener, 1)
    assert site.redis.pubsub_numsub(channel) == [(channel.encode(), 1)], "one subscription a process"
    batches[0].close()
    assert site.redis.pubsub_numsub(channel) == [(channel.encode(), 1)]
    batches[1].close()
    wait_until(lambda: site.redis.pubsub_numsub(channel) == [(channel.encode(), 0)])


def test_closing_the_relay_ends_its_listeners(writer: Writer, relay: Relay, delivery: Delivery) -> None:
    tell(writer, delivery, story(delivery.job_id, 1)[:1])
    batches = relay.follow(delivery.job_id)
    take(batches, 1)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(next, batches)
        relay.close()
        with pytest.raises(Unavailable):
            waiting.result(5)
    with pytest.raises(Unavailable):
        next(relay.follow(delivery.job_id))


def test_a_cut_connection_is_made_anew_without_a_gap(
    site: Site, writer: Writer, relay: Relay, delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wicore.stream.relay._BACKOFF_S", 0.02)
    events = story(delivery.job_id, 60)
    batches = relay.follow(delivery.job_id)
    seen: list[Event] = []
    for start in range(0, 60, 10):
        site.redis.client_kill_filter(_type="pubsub")
        tell(writer, delivery, events[start : start + 10])
        seen += take(batches, 10)
    tell(writer, delivery, events[60:])
    assert seen + flat(batches) == events


def test_many_listeners_share_a_pool_smaller_than_they_are(
    writer: Writer, valkey_url: str, delivery: Delivery
) -> None:
    client = connect(valkey_url, max_connections=20)
    relay = Relay(client)
    events = story(delivery.job_id, 30)
    with ThreadPoolExecutor(100) as threads:
        iterators = [relay.follow(delivery.job_id) for _ in range(100)]
        listeners = [threads.submit(flat, iterator) for iterator in iterators]
        tell(writer, delivery, events)
        for listener in listeners:
            assert listener.result(20) == events
    relay.close()
    client.close()


def test_a_log_longer_than_one_read_is_read_whole(site: Site, writer: Writer, delivery: Delivery) -> None:
    events = story(delivery.job_id, 2500)
    writer.publisher.publish(delivery, events[:-1])
    assert writer.publisher.flush(5)
    assert site.log(delivery.job_id) == events[:-1]
    assert read_log(site.redis, delivery.job_id, after=2400) == events[2400:-1]


def test_a_crash_of_redis_in_mid_story_loses_nothing_that_was_told(
    tmp_path_factory: pytest.TempPathFactory, short_folder: Path
) -> None:
    server = EmbeddedValkey(short_folder, extra=("--appendfsync", "always")).start()
    client = connect(server.url)
    site = Site(client)
    site.submit(Priority.INTERACTIVE)
    (delivery,) = site.worker().pop(1)
    writer, relay = Writer(site), Relay(client)
    events = story(delivery.job_id, 40)
    batches = relay.follow(delivery.job_id)
    tell(writer, delivery, events[:20])
    seen = take(batches, 20)
    server.kill()
    tell(writer, delivery, events[20:])
    server.start()
    seen += flat(batches)
    assert seen == events
    assert writer.finished.get(timeout=5) == delivery
    assert site.producer.record(delivery.job_id).status == "succeeded"
    site.check()
    writer.publisher.stop()
    relay.close()
    site.close()
    client.close()
    server.stop()


def wait_until(condition: Callable[[], bool], timeout: float = 5) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen"


def test_the_relay_serves_greenlets_under_gevent(
    site: Site, writer: Writer, delivery: Delivery, valkey_url: str
) -> None:
    """As in gunicorn's gevent workers: patched sockets and locks, a greenlet a listener."""
    events = story(delivery.job_id, 50)
    child = subprocess.Popen(
        [sys.executable, "-c", GEVENT_LISTENERS, valkey_url, delivery.job_id, "300"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"listening\n"
    for event in events[:-1]:
        tell(writer, delivery, [event])
    tell(writer, delivery, events[-1:])
    out, _ = child.communicate(timeout=30)
    assert out.split() == [b"300", str(len(events)).encode(), b"1"]


GEVENT_LISTENERS = """
from gevent import monkey; monkey.patch_all()
import sys, gevent
from wicore.queue.connection import connect
from wicore.stream.relay import Relay
url, job, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
client = connect(url)
relay = Relay(client)
def listen():
    return [event["seq"] for batch in relay.follow(job, 0, 1.0) for event in batch]
listeners = [gevent.spawn(listen) for _ in range(count)]
gevent.sleep(0.05)
print("listening", flush=True)
gevent.joinall(listeners, timeout=20)
stories = [listener.value for listener in listeners]
assert all(story == list(range(1, len(story) + 1)) for story in stories), stories[:3]
print(len(stories), len(stories[0]), len(set(map(tuple, stories))))
relay.close()
"""
