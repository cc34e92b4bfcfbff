"""The real server process: gunicorn with gevent, real sockets, real clients; the queue in memory."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest
import simple_websocket

from tests.services import ROOT, TINY

START_S = 30
MAX_SOCKETS = 20
HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(port: int, **environ: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "--config",
        "python:api.gunicorn_conf",
        "tests.gunicorn_app:app",
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={
            **os.environ,
            "WICORE_MODEL__PATH": str(TINY),
            "WICORE_API__PORT": str(port),
            "WICORE_API__MAX_SOCKETS": str(MAX_SOCKETS),
            "WICORE_API__MAX_BODY_BYTES": str(2**20),
            **environ,
        },
    )


def wait_until_up(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).raise_for_status()
            return
        except httpx.TransportError:
            assert process.poll() is None, "gunicorn exited"
            assert time.monotonic() < deadline, "gunicorn did not start"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    port = free_port()
    process = start(port)
    try:
        wait_until_up(port, process)
        yield port
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def http(port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        yield client


@pytest.fixture
def ai(port: int) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=20
    ) as client:
        yield client


class Socket:
    """A websocket that speaks JSON, with a deadline on every receive."""

    def __init__(self, port: int, path: str) -> None:
        self.ws = simple_websocket.Client(f"ws://127.0.0.1:{port}{path}")

    def send(self, message: Any) -> None:
        self.ws.send(message if isinstance(message, str | bytes) else json.dumps(message))

    def receive(self) -> Any:
        frame = self.ws.receive(timeout=20)
        assert frame is not None, "no frame arrived"
        return json.loads(frame)

    def until_end(self) -> list[Any]:
        frames = [self.receive()]
        while frames[-1]["type"] not in ("done", "failed", "cancelled", "expired"):
            frames.append(self.receive())
        return frames

    def close_code(self) -> int:
        with pytest.raises(simple_websocket.ConnectionClosed) as closed:
            while True:
                assert self.ws.receive(timeout=20) is not None, "not closed"
        return int(closed.value.reason)

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        if self.ws.connected:
            self.ws.close()
        self.ws.thread.join(20)


def submit(http: httpx.Client, prompt: str) -> str:
    answer = http.post("/v1/jobs", json={"kind": "completion", "prompt": prompt})
    assert answer.status_code == 202
    return str(answer.json()["id"])


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


# --- the official client --------------------------------------------------------------------------


def test_the_official_client_gets_a_chat_completion(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a b"}])
    assert answer.choices[0].message.content == "a b "
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


def test_the_official_client_streams_a_chat_and_its_usage(ai: openai.OpenAI) -> None:
    stream = ai.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "a b"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "a b "
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 5


def test_the_official_client_streams_a_completion(ai: openai.OpenAI) -> None:
    stream = ai.completions.create(model="tiny", prompt="a b", stream=True)
    assert "".join(c.choices[0].text for c in stream) == "a b "


def test_the_official_client_raises_its_own_errors(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        ai.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ai.completions.create(model="tiny", prompt="a", temperature=3)
    assert [m.id for m in ai.models.list()] == ["tiny"]


# --- streams and clients that leave ---------------------------------------------------------------


def test_a_token_is_sent_before_the_next_one_exists(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/completions", json={"prompt": "a wait", "stream": True}) as answer:
        lines = answer.iter_lines()
        assert '"text":"a "' in next(line for line in lines if line.startswith("data: "))
        job = answer.headers["X-Job-Id"]
        assert http.get(f"/v1/jobs/{job}").json()["status"] == "running"


@pytest.mark.parametrize("stream", [True, False])
def test_a_waiting_call_whose_client_leaves_is_cancelled(http: httpx.Client, port: int, stream: bool) -> None:
    user = f"leaver-{stream}"
    body = json.dumps({"prompt": "a wait", "stream": stream, "user": user}).encode()
    with socket.create_connection(("127.0.0.1", port), 20) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_for(lambda: http.get(f"/test/job-of/{user}").json()["id"])
    job = http.get(f"/test/job-of/{user}").json()["id"]
    wait_for(lambda: http.get(f"/v1/jobs/{job}").json()["status"] == "cancelled")


def test_a_job_goes_on_when_a_follower_leaves(http: httpx.Client) -> None:
    job = submit(http, "a wait")
    with http.stream("GET", f"/v1/jobs/{job}/events") as answer:
        assert next(answer.iter_lines())
    assert http.get(f"/v1/jobs/{job}").json()["status"] == "running"
    http.delete(f"/v1/jobs/{job}")


def test_a_body_over_the_limit_is_refused_and_the_server_lives(http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 2**16

    headers = {"Content-Type": "application/json"}
    for content in (b" " * 2**22, endless()):
        answer = http.post("/v1/chat/completions", content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff\x16\x03\x01\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nBad Header: \x01\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    ],
    ids=["no-http", "control-character", "long-header", "long-path", "bad-chunk", "bad-length"],
)
def test_garbage_on_the_wire_is_refused_and_the_server_lives(
    http: httpx.Client, port: int, garbage: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", port), 20) as client:
        client.sendall(garbage)
        assert client.recv(1000).startswith(b"HTTP/1.1 4")
    assert http.get("/health").status_code == 200


# --- websocket of one job -------------------------------------------------------------------------


def test_a_socket_that_joins_late_gets_every_event(http: httpx.Client, port: int) -> None:
    job = submit(http, "a b c")
    wait_for(lambda: http.get(f"/v1/jobs/{job}").json()["status"] == "succeeded")
    with Socket(port, f"/v1/jobs/{job}/stream") as ws:
        frames = ws.until_end()
        assert [f["seq"] for f in frames] == [1, 2, 3, 4, 5]
        assert frames[-1]["type"] == "done"
        assert ws.close_code() == 1000


def test_a_socket_that_drops_resumes_without_gap_or_repeat(http: httpx.Client, port: int) -> None:
    job = submit(http, "a b wait")
    with Socket(port, f"/v1/jobs/{job}/stream") as ws:
        seen = [ws.receive()["seq"], ws.receive()["seq"]]
    with Socket(port, f"/v1/jobs/{job}/stream?from={seen[-1] + 1}") as ws:
        http.delete(f"/v1/jobs/{job}")
        frames = ws.until_end()
    assert seen + [f["seq"] for f in frames] == [1, 2, 3, 4]
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
    job = submit(http, "a wait")
    with Socket(port, f"/v1/jobs/{job}/stream") as ws:
        ws.send("hello")
        kinds = [ws.receive()["type"] for _ in range(3)]
        http.delete(f"/v1/jobs/{job}")
        assert ws.until_end()[-1]["type"] == "cancelled"
    assert kinds == ["started", "token", "error"]


# --- websocket of many jobs -----------------------------------------------------------------------


def test_many_jobs_share_a_socket(port: int) -> None:
    with Socket(port, "/v1/stream") as ws:
        for ref in ("one", "two"):
            ws.send({"type": "submit", "ref": ref, "kind": "completion", "prompt": f"{ref} more"})
        frames: list[Any] = []
        while sum(f["type"] == "done" for f in frames) < 2:
            frames.append(ws.receive())
    jobs = {f["ref"]: f["job"] for f in frames if f["type"] == "accepted"}
    for ref, job in jobs.items():
        own = [f for f in frames if f["job"] == job and f["type"] != "accepted"]
        assert [f["seq"] for f in own] == [1, 2, 3, 4]
        assert "".join(f.get("text", "") for f in own) == f"{ref} more "


def test_a_job_is_resumed_and_cancelled_on_another_socket(port: int) -> None:
    with Socket(port, "/v1/stream") as ws:
        ws.send({"type": "submit", "ref": 1, "kind": "completion", "prompt": "a wait"})
        job = ws.receive()["job"]
        assert [ws.receive()["seq"], ws.receive()["seq"]] == [1, 2]
    with Socket(port, "/v1/stream") as ws:
        ws.send({"type": "resume", "job": job, "from": 2})
        assert ws.receive()["seq"] == 2
        ws.send({"type": "cancel", "ref": "c", "job": job})
        frames = [ws.receive(), ws.receive()]
    assert sorted(f["type"] for f in frames) == ["cancelled", "cancelling"]


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
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_a_bad_frame_is_answered_and_the_socket_lives(port: int, message: Any, words: str) -> None:
    with Socket(port, "/v1/stream") as ws:
        ws.send(message)
        answer = ws.receive()
        assert answer["type"] == "error"
        assert words in answer["error"]["message"]
        ws.send({"type": "submit", "ref": "r", "kind": "completion", "prompt": "a"})
        assert ws.until_end()[-1]["type"] == "done"


def test_a_job_followed_twice_on_one_socket_is_a_conflict(port: int) -> None:
    with Socket(port, "/v1/stream") as ws:
        ws.send({"type": "submit", "kind": "completion", "prompt": "wait"})
        job = ws.receive()["job"]
        ws.send({"type": "resume", "ref": 2, "job": job})
        answer = ws.receive()
        assert (answer["ref"], answer["error"]["code"]) == (2, "conflict")
        ws.send({"type": "cancel", "job": job})


def test_a_frame_over_the_limit_closes_the_socket(http: httpx.Client, port: int) -> None:
    with Socket(port, "/v1/stream") as ws:
        ws.send("x" * (2**20 + 1))
        assert ws.close_code() == 1009
    assert http.get("/health").status_code == 200


def test_a_slow_reader_gets_whole_frames(http: httpx.Client, port: int) -> None:
    # Far more than the socket buffers hold, sent while nobody reads: a part sent is not a frame sent.
    job = submit(http, "flood8000")
    wait_for(lambda: http.get(f"/v1/jobs/{job}").json()["status"] == "succeeded")
    ready = threading.Event()
    with Socket(port, "/v1/stream") as ws:
        ws.ws.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ws.send({"type": "resume", "job": job})
        ready.wait(0.5)
        assert [f["seq"] for f in ws.until_end()] == list(range(1, 8003))


def test_sockets_over_the_limit_are_refused_and_room_returns(http: httpx.Client, port: int) -> None:
    with ExitStack() as held:
        for _ in range(MAX_SOCKETS):
            held.enter_context(Socket(port, "/v1/stream"))
        refused = http.get("/v1/stream", headers=HANDSHAKE)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert http.get("/health").status_code == 200
    # An event stream takes a slot of the same kind.
    wait_for(lambda: http.post("/v1/completions", json={"prompt": "a", "stream": True}).status_code == 200)


# --- stopping -------------------------------------------------------------------------------------


def test_a_stopping_server_ends_streams_to_be_resumed_and_cancels_nothing() -> None:
    port = free_port()
    process = start(port)
    try:
        wait_until_up(port, process)
        with (
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http,
            Socket(port, "/v1/stream") as many,
        ):
            job = submit(http, "a wait")
            with Socket(port, f"/v1/jobs/{job}/stream") as one:
                assert one.receive()["type"] == "started"
                process.send_signal(signal.SIGTERM)
                assert one.close_code() == 1012
            assert many.close_code() == 1012
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
