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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import openai
import psutil
import pydantic
import pytest

from tests.fixtures.service import LONG, Socket, record, service_settings, submit, wait_for_status
from tests.services import api_process, start_api, stop
from tests.waiting import free_port, until
from wicore.config import Settings
from wicore.exit_codes import ExitCode
from wicore.queue.embedded import EmbeddedValkey

pytestmark = pytest.mark.valkey


@pytest.fixture
def ai(port: int) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=20
    ) as client:
        yield client


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


class Point(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    x: Annotated[int, pydantic.Field(ge=0, le=99)]
    kind: Literal["círculo", "square"]
    tags: Annotated[list[Literal["a", "b"]], pydantic.Field(min_length=1, max_length=3)]


def test_the_official_client_gets_an_answer_of_the_type_it_asked_for(ai: openai.OpenAI) -> None:
    asked = {**CHAT, "temperature": 1, "seed": 3, "max_tokens": 300}
    answer = ai.chat.completions.parse(**asked, response_format=Point)
    assert isinstance(answer.choices[0].message.parsed, Point)
    assert answer.choices[0].finish_reason == "stop"


def test_the_official_client_is_told_which_schema_cannot_be_honoured(ai: openai.OpenAI) -> None:
    schema = {"type": "array", "uniqueItems": True}
    asked = {"type": "json_schema", "json_schema": {"name": "set", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as refused:
        ai.chat.completions.create(**CHAT, response_format=asked)  # type: ignore[call-overload]
    assert refused.value.param == "response_format.json_schema.schema"


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
        lines = answer.iter_lines()  # kept: a reader that is dropped closes the connection
        assert '"text":' in next(line for line in lines if line.startswith("data: "))
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
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
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
        client.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n" % how)
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
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nBad Header: \x01\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
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


# --- events over HTTP -----------------------------------------------------------------------------


def test_events_resume_after_the_last_event_id(http: httpx.Client) -> None:
    job = submit(http, max_tokens=6)
    whole = http.get(f"/v1/jobs/{job}/events").text
    assert [int(x[4:]) for x in whole.splitlines() if x.startswith("id: ")] == list(range(1, 9))
    rest = http.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": "5"}).text
    assert [int(x[4:]) for x in rest.splitlines() if x.startswith("id: ")] == [6, 7, 8]


def test_an_address_that_others_reach_is_not_served_without_a_key(whole_service: Settings) -> None:
    api = whole_service.api.model_copy(update={"port": free_port(), "host": "0.0.0.0"})
    process = api_process(whole_service.model_copy(update={"api": api}), stderr=subprocess.PIPE)
    _, told = process.communicate(timeout=30)
    assert process.returncode == ExitCode.CONFIG
    assert b"wicore keys create" in told


# --- stopping, dying, coming back -----------------------------------------------------------------


@pytest.fixture
def second(whole_service: Settings) -> Settings:
    """For another API process on the same queue."""
    api = whole_service.api.model_copy(update={"port": free_port()})
    return whole_service.model_copy(update={"api": api})


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
