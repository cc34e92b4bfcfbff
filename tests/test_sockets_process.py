"""Both websockets of a running service, through real sockets."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.fixtures.service import HANDSHAKE, LONG, MAX_SOCKETS, Socket, record, submit, wait_for_status
from tests.waiting import until

pytestmark = pytest.mark.valkey


# --- websocket of one job -------------------------------------------------------------------------


def test_a_socket_that_joins_late_gets_every_event(http: httpx.Client, port: int) -> None:
    job = submit(http)
    wait_for_status(http, job, "succeeded")
    with Socket(port, f"/v1/jobs/{job}/stream") as ws:
        frames = ws.until_end()
        assert [f["seq"] for f in frames] == [1, 2, 3, 4, 5]
        assert frames[-1]["type"] == "done"
        assert ws.close_code() == 1000


def test_a_socket_that_drops_at_any_event_resumes_without_gap_or_repeat(
    http: httpx.Client, port: int
) -> None:
    job = submit(http, max_tokens=12)
    seen: list[Any] = []
    while not seen or seen[-1]["type"] != "done":
        with Socket(port, f"/v1/jobs/{job}/stream?from={len(seen) + 1}") as ws:
            seen.append(ws.receive())  # and drop
    assert [f["seq"] for f in seen] == list(range(1, 15))
    assert "".join(f.get("text", "") for f in seen) == record(http, job)["result"]["choices"][0]["text"]


def test_a_running_job_is_resumed_and_its_cancel_is_seen(http: httpx.Client, port: int) -> None:
    job = submit(http, **LONG)
    with Socket(port, f"/v1/jobs/{job}/stream") as ws:
        seen = [ws.receive()["seq"] for _ in range(3)]
    with Socket(port, f"/v1/jobs/{job}/stream?from=4") as ws:
        http.delete(f"/v1/jobs/{job}")
        frames = ws.until_end()
    seen += [f["seq"] for f in frames]
    assert seen == list(range(1, len(seen) + 1))
    assert frames[-1]["type"] == "cancelled"


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/jobs/nobody/stream", 404), ("/v1/jobs/nobody/stream?from=x", 400)]
)
def test_a_handshake_that_cannot_be_served_is_an_http_error(
    http: httpx.Client, path: str, status: int
) -> None:
    answer = http.get(path, headers=HANDSHAKE)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_plain_request_to_a_socket_is_refused(http: httpx.Client) -> None:
    assert 400 <= http.get("/v1/stream").status_code < 500


def test_a_socket_that_only_sends_refuses_commands(http: httpx.Client, port: int) -> None:
    job = submit(http, **LONG)
    with Socket(port, f"/v1/jobs/{job}/stream") as ws:
        ws.send("hello")
        while ws.receive()["type"] != "error":
            pass
        http.delete(f"/v1/jobs/{job}")
        assert ws.until_end()[-1]["type"] == "cancelled"


# --- websocket of many jobs -----------------------------------------------------------------------


TELL = {"kind": "completion", "prompt": "Tell", "max_tokens": 2, "ignore_eos": True}


def test_many_jobs_share_a_socket(http: httpx.Client, port: int) -> None:
    with Socket(port, "/v1/stream") as ws:
        for ref in ("one", "two"):
            ws.send({**TELL, "type": "submit", "ref": ref})
        frames: list[Any] = []
        while sum(f["type"] == "done" for f in frames) < 2:
            frames.append(ws.receive())
    jobs = {f["ref"]: f["job"] for f in frames if f["type"] == "accepted"}
    assert set(jobs) == {"one", "two"}
    for job in jobs.values():
        own = [f for f in frames if f["job"] == job and f["type"] != "accepted"]
        assert [f["seq"] for f in own] == [1, 2, 3, 4]
        text = "".join(f.get("text", "") for f in own)
        assert text == record(http, job)["result"]["choices"][0]["text"]


def test_a_job_is_resumed_and_cancelled_on_another_socket(port: int) -> None:
    with Socket(port, "/v1/stream") as ws:
        ws.send({**TELL, **LONG, "type": "submit", "ref": 1})
        job = ws.receive()["job"]
        assert [ws.receive()["seq"], ws.receive()["seq"]] == [1, 2]
    with Socket(port, "/v1/stream") as ws:
        ws.send({"type": "resume", "job": job, "from": 2})
        assert ws.receive()["seq"] == 2
        ws.send({"type": "cancel", "ref": "c", "job": job})
        frames = ws.until_end()
    own = [f["seq"] for f in frames if "seq" in f]
    assert own == list(range(3, 3 + len(own)))
    assert [f["ref"] for f in frames if f["type"] == "cancelling"] == ["c"]
    assert frames[-1]["type"] == "cancelled"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        (b"\x00\x01", "not binary"),
        ("{}", "type: must be one of submit, resume, cancel"),
        ('{"type":[1]}', "type: must be one of"),
        ('{"type":"dance"}', "type: must be one of"),
        ('{"type":"submit","ref":{}}', "ref: "),
        ('{"type":"submit","prompt":"a","kind":"completion","colour":1}', "colour: unknown"),
        ('{"type":"submit","prompt":"a","kind":"completion","temperature":NaN}', "NaN"),
        ('{"type":"submit","prompt":"a","kind":"completion","model":"x"}', "not served here"),
        ('{"type":"resume"}', "job: must be"),
        ('{"type":"resume","job":"nobody"}', "No job"),
        ('{"type":"resume","job":"nobody","from":-1}', "from: "),
        ('{"type":"cancel","job":"nobody"}', "No job"),
        ('{"type":"cancel","job":"nobody","from":1}', "from: unknown"),
        ("[" * 200_000, "nested too deeply"),
    ],
)
def test_a_bad_frame_is_answered_and_the_socket_lives(port: int, message: Any, words: str) -> None:
    with Socket(port, "/v1/stream") as ws:
        ws.send(message)
        answer = ws.receive()
        assert answer["type"] == "error"
        assert words in answer["error"]["message"]
        ws.send({**TELL, "type": "submit", "ref": "r"})
        assert ws.until_end()[-1]["type"] == "done"


def test_a_job_followed_twice_on_one_socket_is_a_conflict(port: int) -> None:
    with Socket(port, "/v1/stream") as ws:
        ws.send({**TELL, **LONG, "type": "submit"})
        job = ws.receive()["job"]
        ws.send({"type": "resume", "ref": 2, "job": job})
        while (answer := ws.receive())["type"] != "error":
            pass
        assert (answer["ref"], answer["error"]["code"]) == (2, "conflict")
        ws.send({"type": "cancel", "job": job})


def test_a_frame_over_the_limit_closes_the_socket(http: httpx.Client, port: int) -> None:
    with Socket(port, "/v1/stream") as ws:
        ws.send("x" * (2**20 + 1))
        assert ws.close_code() == 1009
    assert http.get("/health").status_code == 200


def test_a_slow_reader_gets_whole_frames(http: httpx.Client, port: int) -> None:
    # Far more than the socket buffers hold, sent while nobody reads: a part sent is not a frame sent.
    job = submit(http, n=16, max_tokens=64, logprobs=20)
    wait_for_status(http, job, "succeeded")
    with Socket(port, "/v1/stream") as ws:
        ws.ws.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        ws.send({"type": "resume", "job": job})
        time.sleep(0.5)  # not reading, so that the server fills every buffer on the way
        assert [f["seq"] for f in ws.until_end()] == list(range(1, 16 * 64 + 3))


def test_sockets_over_the_limit_are_refused_and_room_returns(http: httpx.Client, port: int) -> None:
    with ExitStack() as held:
        for _ in range(MAX_SOCKETS):
            held.enter_context(Socket(port, "/v1/stream"))
        refused = http.get("/v1/stream", headers=HANDSHAKE)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert http.get("/health").status_code == 200
    # An event stream takes a slot of the same kind.
    until(lambda: http.post("/v1/completions", json={"prompt": "a", "stream": True}).status_code == 200)
