"""Redis behind Sentinel: its URL, and failovers in the midst of work."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest
import redis

from tests.servers import Group
from tests.services import follow, running_worker, settings_for, start_api, stop, worker_process
from tests.waiting import free_port, until
from wicore.commands import doctor
from wicore.config import load_settings, mask_passwords
from wicore.errors import ConfigError, Unavailable
from wicore.queue.connection import address, connect, dedicated_connection
from wicore.queue.consumer import LeaseConsumer
from wicore.queue.producer import Producer
from wicore.queue.sentinel import SentinelUrl, parse
from wicore.request import Event, Priority, parse_job
from wicore.stream.relay import Relay

# --- the URL --------------------------------------------------------------------------------------


def test_a_url_names_sentinels_master_and_logins() -> None:
    url = parse(
        "sentinel://me:s%40crt@one:1,two,[::1]:3/my-master"
        "?db=2&ssl=true&sentinel_username=you&sentinel_password=p%26w"
    )
    assert url == SentinelUrl(
        sentinels=(("one", 1), ("two", 26379), ("::1", 3)),
        master="my-master",
        db=2,
        ssl=True,
        username="me",
        password="s@crt",
        sentinel_username="you",
        sentinel_password="p&w",
    )


def test_a_plain_url_leaves_the_rest_at_its_defaults() -> None:
    assert parse("sentinel://one/m") == SentinelUrl((("one", 26379),), "m")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sentinel://one:1", "names no master"),
        ("sentinel://one:1/", "names no master"),
        ("sentinel://one:1/a/b", "names no master"),
        ("sentinel:///m", "'' is not host:port"),
        ("sentinel://one:1,/m", "'' is not host:port"),
        ("sentinel://one:x/m", "'one:x' is not host:port"),
        ("sentinel://one:1/m?db=x", "db must be a number"),
        ("sentinel://one:1/m?ssl=yes", "ssl must be true or false"),
        ("sentinel://one:1/m?timeout=3", "unknown option 'timeout'"),
    ],
)
def test_a_bad_url_says_what_is_wrong_and_what_is_right(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"^redis\.url: ") as refused:
        connect(url)
    assert words in refused.value.message
    assert "sentinel://[user:password@]host:26379" in refused.value.message


def test_no_password_is_ever_shown() -> None:
    url = "sentinel://me:secret1@one:1,two:2/m?sentinel_password=secret2&ssl=true"
    client = connect(url)
    assert address(client) == "sentinel://one:1,two:2/m"
    client.close()
    assert mask_passwords(f"url: {url}") == (
        "url: sentinel://me:***@one:1,two:2/m?sentinel_password=***&ssl=true"
    )
    assert load_settings(environ={"WICORE_REDIS__URL": url}).redis.url == url


def test_without_any_sentinel_redis_is_unavailable() -> None:
    client = connect(f"sentinel://me:secret@127.0.0.1:{free_port()}/m")
    with pytest.raises(Unavailable, match="No master found for 'm'") as refused:
        Producer(client).depths()
    assert "secret" not in refused.value.message
    client.close()


TOKENS = 1500
NULL = {"engine__kind": "null", "engine__null_step_ms": 2.0}


# --- failovers ------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[Group]:
    with Group() as group:
        yield group


@pytest.fixture
def client(group: Group) -> Iterator[redis.Redis]:
    client = connect(group.url)
    yield client
    client.close()


@pytest.fixture
def other_client(group: Group) -> Iterator[redis.Redis]:
    """Its connections have written nothing yet."""
    client = connect(group.url)
    yield client
    client.close()


def submit(client: redis.Redis, tokens: int, **fields: Any) -> str:
    body = {"kind": "completion", "prompt": "Once", "max_tokens": tokens, "ignore_eos": True, **fields}
    return Producer(client).submit(parse_job({"temperature": 0.9, "seed": 5, **body}), Priority.NORMAL).id


def undisturbed(group: Group, client: redis.Redis) -> list[Event]:
    """What a job of TOKENS gives when nothing happens."""
    with running_worker(settings_for(group.url, engine__kind="null", engine__null_step_ms=0.0), "before"):
        return list(follow(client, submit(client, TOKENS)))


def text(events: list[Event]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "token")


@pytest.mark.valkey
def test_a_failover_in_mid_stream_changes_no_text_and_all_recover_by_themselves(
    group: Group, client: redis.Redis
) -> None:
    expected = undisturbed(group, client)
    settings = settings_for(group.url, **NULL, api__port=free_port())
    worker, api = worker_process(settings), start_api(settings)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{settings.api.port}", timeout=30) as http:
            job = submit(client, TOKENS)
            seen: list[Event] = []
            for event in follow(client, job):
                seen.append(event)
                if event["seq"] == 100:
                    group.master.kill()
            assert group.promoted()
            until(lambda: http.get("/ready").status_code == 200, "the API ready again")
            answer = http.post("/v1/completions", json={"prompt": "Once", "max_tokens": 3}).json()
            assert answer["usage"]["completion_tokens"] == 3
            record = http.get(f"/v1/jobs/{job}").json()
    finally:
        stop(api)
        stop(worker)
    assert [event["seq"] for event in seen] == list(range(1, TOKENS + 3))
    assert text(seen) == text(expected)
    assert (record["status"], record["attempts"]) == ("succeeded", 1)


@pytest.mark.valkey
def test_events_that_the_new_master_never_got_are_written_again(
    group: Group, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    expected = undisturbed(group, client)
    with running_worker(settings_for(group.url, **NULL)):
        job = submit(client, TOKENS)
        seen: list[Event] = []
        for event in follow(client, job):
            seen.append(event)
            if event["seq"] == 100:  # from here on nothing reaches the replica
                group.replica.client.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
            if event["seq"] == 150:
                got = int(group.replica.client.hget(f"wicore:job:{job}", "seq"))
                assert got < 150
                group.master.kill()
    assert group.promoted()
    assert "Redis lost its log from event" in caplog.text
    assert [event["seq"] for event in seen] == list(range(1, TOKENS + 3))
    assert text(seen) == text(expected)
    log = client.xrange(f"wicore:log:{job}")
    assert [entry.decode() for entry, _ in log] == [f"0-{seq}" for seq in range(1, TOKENS + 3)]
    assert Producer(client).record(job).attempts == 1


@pytest.mark.valkey
def test_a_frozen_master_is_left_for_the_new_one(
    group: Group, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wicore.stream.relay._PING_S", 1.0)
    expected = undisturbed(group, client)
    with running_worker(settings_for(group.url, **NULL)):
        job = submit(client, TOKENS)
        seen: list[Event] = []
        for event in follow(client, job):
            seen.append(event)
            if event["seq"] == 100:
                group.master.process.send_signal(signal.SIGSTOP)
    assert group.promoted()
    assert [event["seq"] for event in seen] == list(range(1, TOKENS + 3))
    assert text(seen) == text(expected)


@pytest.mark.valkey
def test_who_waits_for_a_message_goes_on_waiting_at_the_new_master(group: Group, client: redis.Redis) -> None:
    with closing(LeaseConsumer(client, "w")) as consumer:
        assert not consumer.wait(0.1)
        group.master.kill()
        with pytest.raises(Unavailable):
            consumer.wait(10)
        until(lambda: submit(client, 1), "the new master known")
        assert group.promoted()
        assert consumer.wait(10)
        assert len(consumer.pop(1)) == 1


@pytest.mark.valkey
def test_a_demoted_master_is_left_for_the_new_one(group: Group, client: redis.Redis) -> None:
    blocked = dedicated_connection(client)
    blocked.send_command("BLMOVE", "none", "none", "RIGHT", "RIGHT", 0)
    group.sentinels[0].client.execute_command("SENTINEL", "FAILOVER", "wicore-test")
    until(group.promoted, "the failover")
    group.master.client.execute_command("REPLICAOF", "127.0.0.1", group.replica.port)
    with pytest.raises((redis.ConnectionError, redis.ResponseError)):
        blocked.read_response()
    blocked.disconnect()
    until(lambda: client.set("written", 1), "a write at the new master")
    assert group.replica.client.get("written") == b"1"


# --- what `wicore doctor` says ---------------------------------------------------------------------


def checks(group: Group, **settings: Any) -> dict[str, tuple[str, str]]:
    found = doctor.check_redis(settings_for(group.url, **settings))
    return {check.name: (check.status, check.detail + check.fix) for check in found}


@pytest.mark.valkey
def test_the_doctor_sees_sentinels_and_replicas(group: Group) -> None:
    found = checks(group, redis__wait_replicas=1)
    assert found["redis"][0] == found["redis replicas"][0] == found["redis rights"][0] == "ok"
    assert found["redis sentinels"] == ("ok", f"all 3 answer; the master is 127.0.0.1:{group.master.port}")
    status, words = checks(group)["redis replicas"]
    assert (status, "set redis.wait_replicas to 1" in words) == ("warn", True)
    status, words = checks(group, redis__wait_replicas=2)["redis replicas"]
    assert (status, "1 connected, redis.wait_replicas is 2" in words) == ("fail", True)

    group.sentinels[0].kill()
    status, words = checks(group)["redis sentinels"]
    assert (status, f"1 of 3 do not answer: 127.0.0.1:{group.sentinels[0].port}" in words) == ("warn", True)
    group.sentinels[1].kill()
    until(lambda: checks(group)["redis sentinels"][0] == "fail", "the last sentinel missed the others")
    assert "NOQUORUM" in checks(group)["redis sentinels"][1]


# --- replicas -------------------------------------------------------------------------------------


@pytest.mark.valkey
def test_a_submit_waits_for_replicas_and_can_be_repeated_until_they_have_it(
    group: Group, client: redis.Redis, other_client: redis.Redis
) -> None:
    producer, elsewhere = (Producer(of, wait_replicas=1) for of in (client, other_client))
    body = parse_job({"kind": "completion", "prompt": "Once"})
    assert producer.submit(body, Priority.NORMAL).created
    assert Producer(group.replica.client).depths()[Priority.NORMAL] == 1

    group.replica.process.send_signal(signal.SIGSTOP)
    try:
        for door in (producer, elsewhere):  # the second finds the job, and must not take that for a copy
            with pytest.raises(Unavailable, match=r"0 of 1 replicas \(redis.wait_replicas\)") as refused:
                door.submit(body, Priority.NORMAL, idempotency_key="k")
            assert refused.value.retry_after
    finally:
        group.replica.process.send_signal(signal.SIGCONT)
    until(lambda: producer.submit(body, Priority.NORMAL, idempotency_key="k").id, "the replica caught up")
    assert Producer(group.replica.client).depths()[Priority.NORMAL] == 2


@pytest.mark.valkey
def test_tokens_flow_on_when_replicas_are_missing(
    group: Group, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_for(group.url, engine__kind="null", redis__wait_replicas=1)
    with running_worker(settings):
        list(follow(client, submit(client, 20)))
        assert not [record for record in caplog.records if "wait_replicas" in record.message]
        group.replica.kill()
        with closing(Relay(client)) as relay:
            batches = list(relay.follow(submit(client, 400)))
    assert batches[-1][-1]["type"] == "done"
    assert len(batches) > 4, "2 s of tokens came in lumps of a second"
    assert [r.message for r in caplog.records if "wait_replicas" in r.message] == [
        "events are held by 0 replicas of 1 (redis.wait_replicas)"
    ]
