"""The real processes: gunicorn with gevent, a worker on the tiny checkpoint, real sockets and clients."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import simple_websocket

from tests.services import settings_for, start_api, stop, worker_process
from tests.waiting import free_port, until
from wicore.config import Settings
from wicore.queue.embedded import EmbeddedValkey

pytestmark = pytest.mark.valkey

START_S = 30
MAX_SOCKETS = 20
LONG = {"prompt": "a", "max_tokens": 3500, "ignore_eos": True}
"""Runs for seconds: until it is cancelled."""
HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def service_settings(url: str, prefix: str) -> Settings:
    return settings_for(
        url,
        redis__prefix=prefix,
        api__port=free_port(),
        api__max_sockets=MAX_SOCKETS,
        api__max_body_bytes=2**20,
        hmt__device_tokens=65_536,
    )


@pytest.fixture(scope="module")
def settings(valkey_url: str) -> Settings:
    return service_settings(valkey_url, "process")


@pytest.fixture(scope="module")
def port(settings: Settings) -> Iterator[int]:
    """Of a whole service: API and worker, each a process."""
    worker = worker_process(settings)
    try:
        api = start_api(settings)
        try:
            ready = httpx.Client(base_url=f"http://127.0.0.1:{settings.api.port}", timeout=20)
            with ready:
                until(lambda: ready.get("/ready").status_code == 200)
            yield settings.api.port
        finally:
            stop(api)
    finally:
        stop(worker)


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
        try:
            while True:
                assert self.ws.receive(timeout=20) is not None, "not closed"
        except simple_websocket.ConnectionClosed as closed:
            return int(closed.reason)

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        if self.ws.connected:
            self.ws.close()
        self.ws.thread.join(20)


def submit(http: httpx.Client, **fields: Any) -> str:
    body = {"kind": "completion", "prompt": "Once", "max_tokens": 3, "ignore_eos": True, **fields}
    answer = http.post("/v1/jobs", json=body)
    assert answer.status_code == 202
    return str(answer.json()["id"])


def record(http: httpx.Client, job: str) -> Any:
    return http.get(f"/v1/jobs/{job}").json()


def wait_for_status(http: httpx.Client, job: str, status: str) -> None:
    until(lambda: record(http, job)["status"] == status)


# --- the official client --------------------------------------------------------------------------


CHAT: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}


def test_the_official_client_gets_the_same_chat_whole_and_streamed(ai: openai.OpenAI) -> None:
    whole = ai.chat.completions.create(**CHAT, max_tokens=8)
    chunks = list(
        ai.chat.completions.create(**CHAT, max_tokens=8, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8


def test_the_official_client_gets_the_same_choices_whole_and_streamed(ai: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "Once", "max_tokens": 5, "n": 2, "seed": 5, "logprobs": 2}
    whole = ai.completions.create(**asked)
    streamed: dict[int, str] = {0: "", 1: ""}
    tokens: dict[int, list[str]] = {0: [], 1: []}
    for chunk in ai.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert [streamed[c.index] for c in whole.choices] == [c.text for c in whole.choices]
    assert [tokens[c.index] for c in whole.choices] == [c.logprobs.tokens for c in whole.choices]
    assert streamed[0] != streamed[1]


def test_the_official_client_can_stop_at_a_string(ai: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "Once", "max_tokens": 30, "temperature": 0}
    whole = ai.completions.create(**asked, extra_body={"ignore_eos": True}).choices[0].text
    stop = whole[len(whole) // 2 :][:2]
    cut = ai.completions.create(**asked, stop=stop, extra_body={"ignore_eos": True}).choices[0]
    assert (cut.text, cut.finish_reason) == (whole.partition(stop)[0], "stop")


def test_the_official_client_raises_its_own_errors(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        ai.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ai.completions.create(model="tiny", prompt="a", temperature=3)
    assert [m.id for m in ai.models.list()] == ["tiny"]


# --- streams and clients that leave ---------------------------------------------------------------


def test_a_token_is_sent_before_the_next_one_exists(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
        assert '"text":' in next(line for line in answer.iter_lines() if line.startswith("data: "))
        job = answer.headers["X-Job-Id"]
        assert record(http, job)["status"] == "running"
    wait_for_status(http, job, "cancelled")


@pytest.mark.parametrize("stream", [True, False])
def test_a_waiting_call_whose_client_leaves_is_cancelled(http: httpx.Client, port: int, stream: bool) -> None:
    leaver = {"leaver": str(stream)}

    def jobs() -> list[Any]:
        return [j for j in http.get("/v1/jobs?limit=100").json()["data"] if j["metadata"] == leaver]

    body = json.dumps({**LONG, "stream": stream, "metadata": leaver}).encode()
    with socket.create_connection(("127.0.0.1", port), 20) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        until(lambda: [job["status"] for job in jobs()] == ["running"])
    until(lambda: [job["status"] for job in jobs()] == ["cancelled"])


def test_a_job_goes_on_when_a_follower_leaves(http: httpx.Client) -> None:
    job = submit(http, **LONG)
    with http.stream("GET", f"/v1/jobs/{job}/events") as answer:
        next(line for line in answer.iter_lines() if '"token"' in line)
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


@pytest.mark.parametrize("how", [b"Content-Length: 50000000000", b"Transfer-Encoding: chunked"])
def test_a_body_without_end_is_cut_off_and_holds_nobody_up(http: httpx.Client, port: int, how: bytes) -> None:
    piece = b" " * 2**16
    if b"chunked" in how:
        piece = b"%x\r\n%s\r\n" % (len(piece), piece)
    ended = threading.Event()

    def send_on(client: socket.socket) -> None:
        with suppress(OSError):
            while not ended.is_set():
                client.sendall(piece)
        ended.set()

    with socket.create_connection(("127.0.0.1", port), 20) as client:
        client.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n" % how)
        sender = threading.Thread(target=send_on, args=(client,))
        sender.start()
        try:
            assert client.recv(1000).startswith(b"HTTP/1.1 413")
            assert http.get("/health", timeout=1.0).status_code == 200
            assert ended.wait(10), "the server reads on"
        finally:
            ended.set()
            sender.join(20)


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


# --- events over HTTP -----------------------------------------------------------------------------


def test_events_resume_after_the_last_event_id(http: httpx.Client) -> None:
    job = submit(http, max_tokens=6)
    whole = http.get(f"/v1/jobs/{job}/events").text
    assert [int(x[4:]) for x in whole.splitlines() if x.startswith("id: ")] == list(range(1, 9))
    rest = http.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": "5"}).text
    assert [int(x[4:]) for x in rest.splitlines() if x.startswith("id: ")] == [6, 7, 8]


# --- stopping, dying, coming back -----------------------------------------------------------------


@pytest.fixture
def second(settings: Settings) -> Settings:
    """For another API process on the same queue."""
    return settings.model_copy(update={"api": settings.api.model_copy(update={"port": free_port()})})


def test_a_stopping_server_ends_streams_to_be_resumed_and_cancels_nothing(
    http: httpx.Client, second: Settings
) -> None:
    api = start_api(second)
    try:
        job = submit(http, **LONG)
        with Socket(second.api.port, "/v1/stream") as many:
            with Socket(second.api.port, f"/v1/jobs/{job}/stream") as one:
                assert one.receive()["seq"] == 1
                api.send_signal(signal.SIGTERM)
                assert one.close_code() == 1012
            assert many.close_code() == 1012
        assert api.wait(30) == 0
        assert record(http, job)["status"] == "running"
    finally:
        stop(api)
    http.delete(f"/v1/jobs/{job}")


def kill(api: subprocess.Popen[bytes]) -> None:
    """Master first, which would replace its workers."""
    workers = psutil.Process(api.pid).children()
    for process in (api, *workers):
        process.kill()
        process.wait(20)


def test_a_killed_api_costs_no_event(http: httpx.Client, second: Settings) -> None:
    base = f"http://127.0.0.1:{second.api.port}"
    seen: list[int] = []

    def read(job: str, until: int) -> None:
        headers = {"Last-Event-ID": str(len(seen))}
        with httpx.stream("GET", f"{base}/v1/jobs/{job}/events", headers=headers) as answer:
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    seen.append(int(line[4:]))
                    if len(seen) == until:
                        return

    api = start_api(second)
    try:
        body = {"kind": "completion", **LONG, "max_tokens": 1500}
        job = httpx.post(f"{base}/v1/jobs", json=body).json()["id"]
        read(job, 10)
    finally:
        kill(api)
    api = start_api(second)
    try:
        read(job, 1502)
    finally:
        stop(api)
    assert seen == list(range(1, 1503))
    assert (record(http, job)["status"], record(http, job)["attempts"]) == ("succeeded", 1)


def test_without_redis_calls_are_503_and_all_recovers_when_it_is_back() -> None:
    folder = Path(tempfile.mkdtemp(prefix="wicore-"))
    server = EmbeddedValkey(folder)
    server.start()
    settings = service_settings(server.url, "outage")
    api = start_api(settings)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{settings.api.port}", timeout=20) as http:
            job = submit(http)
            with http.stream("GET", f"/v1/jobs/{job}/events") as events:
                lines = events.iter_lines()
                assert next(lines) == f": job {job}"
                assert server.pid is not None
                os.kill(server.pid, signal.SIGKILL)
                for method, path in (("POST", "/v1/completions"), ("GET", f"/v1/jobs/{job}")):
                    answer = http.request(method, path, json=LONG if method == "POST" else None)
                    assert answer.status_code == 503
                    assert "cannot be reached" in answer.json()["error"]["message"]
                    assert int(answer.headers["Retry-After"]) >= 1
                assert "cannot be reached" in http.get("/ready").json()["missing"][0]
                server.stop()
                server = EmbeddedValkey(folder)
                server.start()
                until(lambda: http.get(f"/v1/jobs/{job}").status_code == 200)
                http.delete(f"/v1/jobs/{job}")
                last = [line for line in lines if line.startswith("data: ")][-1]
                assert json.loads(last.removeprefix("data: "))["type"] == "cancelled"
    finally:
        stop(api)
        server.stop()
        shutil.rmtree(folder)
