"""The HTTP doors, with the queue in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis.exceptions
from fake_backend import FakeBackend, FakeJob
from flask.testing import FlaskClient

from api import create_app
from api.services import ServedModel, Services
from api.slots import Slots
from wicore.config import ApiSettings, Settings
from wicore.errors import QueueFull, TooLarge, Unavailable, WorkerLost
from wicore.request import JobBody, Message, Priority

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
MAX_BODY = 4096


def speak(backend: FakeBackend, job: FakeJob) -> None:
    backend.emit(job, ["Once", " upon", " a time"])
    backend.finish(job)


def count_prompt(body: JobBody) -> int:
    if body.max_tokens is not None and body.max_tokens > 1000:
        raise TooLarge(f"max_tokens: {body.max_tokens} does not fit", param="max_tokens")
    return 3


def tokenize(text: str | list[Message]) -> list[int]:
    return list((text if isinstance(text, str) else text[0].text()).encode())


def make_services(backend: FakeBackend, workers: Callable[[], list[str]] = lambda: ["w1"]) -> Services:
    settings = Settings(api=ApiSettings(max_body_bytes=MAX_BODY, max_sockets=2))
    model = ServedModel("tiny", 1_700_000_000, 1000)
    return Services(settings, model, backend, backend, count_prompt, tokenize, workers, Slots(2))


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(speak)


@pytest.fixture
def client(backend: FakeBackend) -> FlaskClient:
    services = make_services(backend)
    return create_app(services.settings, services).test_client()


def events_of(text: str) -> Iterator[Any]:
    for block in text.split("\n\n"):
        for line in block.splitlines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                yield data if data == "[DONE]" else json.loads(data)


# --- OpenAI ---------------------------------------------------------------------------------------


def test_a_chat_call_answers_with_the_jobs_result(client: FlaskClient, backend: FakeBackend) -> None:
    answer = client.post("/v1/chat/completions", json=HELLO)
    job = answer.headers["X-Job-Id"]
    assert answer.status_code == 200
    assert answer.json["id"] == f"chatcmpl-{job}"
    assert answer.json["choices"][0]["message"]["content"] == "Once upon a time"
    assert answer.json["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert backend.jobs[job].priority is Priority.NORMAL


def test_a_chat_stream_names_the_role_then_sends_text_then_the_end(
    client: FlaskClient, backend: FakeBackend
) -> None:
    asked = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    answer = client.post("/v1/chat/completions", json=asked)
    *chunks, end = events_of(answer.text)
    assert answer.mimetype == "text/event-stream"
    assert end == "[DONE]"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "Once upon a time"
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 6
    assert {c["id"] for c in chunks} == {f"chatcmpl-{answer.headers['X-Job-Id']}"}
    assert backend.jobs[answer.headers["X-Job-Id"]].priority is Priority.INTERACTIVE


def test_a_completion_stream_sends_its_text(client: FlaskClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "Tell", "stream": True})
    *chunks, end = events_of(answer.text)
    assert "".join(c["choices"][0]["text"] for c in chunks) == "Once upon a time"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all("usage" not in c for c in chunks)
    assert end == "[DONE]"


def test_a_priority_in_the_body_wins_over_the_doors_default(
    client: FlaskClient, backend: FakeBackend
) -> None:
    answer = client.post("/v1/chat/completions", json={**HELLO, "priority": "background"})
    assert backend.jobs[answer.headers["X-Job-Id"]].priority is Priority.BACKGROUND


@pytest.mark.parametrize(
    ("end", "error", "status", "code"),
    [
        ("failed", WorkerLost("three workers died"), 500, "worker_lost"),
        ("failed", TooLarge("does not fit"), 413, "too_large"),
        ("cancelled", None, 409, "cancelled"),
        ("expired", None, 504, "expired"),
    ],
)
def test_a_job_that_does_not_succeed_gives_its_error_and_status(
    end: str, error: Any, status: int, code: str
) -> None:
    backend = FakeBackend(lambda b, job: b.finish(job, end, error))
    services = make_services(backend)
    client = create_app(services.settings, services).test_client()
    answer = client.post("/v1/chat/completions", json=HELLO)
    assert (answer.status_code, answer.json["error"]["code"]) == (status, code)
    streamed = client.post("/v1/chat/completions", json={**HELLO, "stream": True})
    *_, last = events_of(streamed.text)
    assert last["error"]["code"] == code


def test_a_call_past_its_own_deadline_gives_up_and_cancels_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.openai.EXPIRY_GRACE_S", 0.0)
    monkeypatch.setattr("api.streams.TICK_S", 0.01)
    backend = FakeBackend()
    services = make_services(backend)
    client = create_app(services.settings, services).test_client()
    answer = client.post("/v1/chat/completions", json={**HELLO, "timeout_s": 0.02})
    assert (answer.status_code, answer.json["error"]["code"]) == (504, "expired")
    assert backend.cancelled == [*backend.jobs]


def test_the_served_model_is_listed_and_described(client: FlaskClient) -> None:
    listed = client.get("/v1/models").json["data"]
    assert [m["id"] for m in listed] == ["tiny"]
    assert client.get("/v1/models/tiny").json == listed[0]
    assert client.get("/v1/models/org/other").status_code == 404


def test_an_idle_stream_is_kept_alive_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.streams.TICK_S", 0.01)
    monkeypatch.setattr("api.streams.KEEP_ALIVE_S", 0.02)
    backend = FakeBackend()
    services = make_services(backend)
    client = create_app(services.settings, services).test_client()
    answer = client.post("/v1/completions", json={"prompt": "a", "stream": True}, buffered=False)
    pieces = iter(answer.response)
    assert next(pieces).startswith(b": job ")
    assert next(pieces) == b": keep-alive\n\n"
    speak(backend, next(iter(backend.jobs.values())))
    assert b"".join(pieces).endswith(b"data: [DONE]\n\n")


def test_a_stream_gives_its_slot_back_even_if_it_was_never_read(client: FlaskClient) -> None:
    for _ in range(5):
        client.post("/v1/completions", json={"prompt": "a", "stream": True}, buffered=False).close()
    assert client.post("/v1/completions", json={"prompt": "a", "stream": True}).status_code == 200


def test_more_streams_than_allowed_are_refused_until_one_ends(
    client: FlaskClient, backend: FakeBackend
) -> None:
    asked = {"prompt": "a", "stream": True}
    held = [client.post("/v1/completions", json=asked, buffered=False) for _ in range(2)]
    refused = client.post("/v1/completions", json=asked)
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "unavailable")
    assert int(refused.headers["Retry-After"]) >= 1
    assert len(backend.jobs) == 2, "a refused stream must not leave a job behind"
    held[0].close()
    assert client.post("/v1/completions", json=asked).status_code == 200
    held[1].close()


# --- jobs -----------------------------------------------------------------------------------------


def test_a_job_is_accepted_looked_up_and_followed(client: FlaskClient) -> None:
    answer = client.post("/v1/jobs", json={"kind": "completion", "prompt": "Tell"})
    assert answer.status_code == 202
    job = answer.json["id"]
    assert answer.headers["Location"] == f"/v1/jobs/{job}"
    events = list(events_of(client.get(answer.json["links"]["events"]).text))
    assert [e["seq"] for e in events] == [1, 2, 3, 4, 5]
    assert events[-1]["type"] == "done"
    assert client.get(f"/v1/jobs/{job}").json["result"]["choices"][0]["text"] == "Once upon a time"


def test_events_carry_their_sequence_number_as_id(client: FlaskClient) -> None:
    job = client.post("/v1/jobs", json={"kind": "completion", "prompt": "a"}).json["id"]
    text = client.get(f"/v1/jobs/{job}/events").text
    assert [line for line in text.splitlines() if line.startswith("id: ")] == [
        f"id: {seq}" for seq in range(1, 6)
    ]


@pytest.mark.parametrize(
    ("query", "headers"), [("?from=4", {}), ("", {"Last-Event-ID": "3"}), ("?from=1", {"Last-Event-ID": "3"})]
)
def test_events_resume_where_the_client_left_off(
    client: FlaskClient, query: str, headers: dict[str, str]
) -> None:
    job = client.post("/v1/jobs", json={"kind": "completion", "prompt": "a"}).json["id"]
    assert client.get(f"/v1/jobs/{job}/events").text  # until its end
    resumed = client.get(f"/v1/jobs/{job}/events{query}", headers=headers)
    assert [e["seq"] for e in events_of(resumed.text)] == [4, 5]


def test_a_browser_that_reconnects_after_the_end_is_told_to_stop(client: FlaskClient) -> None:
    job = client.post("/v1/jobs", json={"kind": "completion", "prompt": "a"}).json["id"]
    assert client.get(f"/v1/jobs/{job}/events").text  # until its end
    assert client.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": "5"}).status_code == 204


def test_an_idempotency_key_gives_the_first_job_again(client: FlaskClient, backend: FakeBackend) -> None:
    headers = {"Idempotency-Key": "order-1"}
    body = {"kind": "completion", "prompt": "a"}
    first = client.post("/v1/jobs", json=body, headers=headers)
    again = client.post("/v1/jobs", json=body, headers=headers)
    other = client.post("/v1/jobs", json={**body, "prompt": "b"}, headers=headers)
    assert again.json["id"] == first.json["id"]
    assert (other.status_code, other.json["error"]["code"]) == (409, "conflict")
    assert len(backend.jobs) == 1


def test_cancelling_is_idempotent() -> None:
    backend = FakeBackend()
    services = make_services(backend)
    client = create_app(services.settings, services).test_client()
    job = client.post("/v1/jobs", json={"kind": "completion", "prompt": "a"}).json["id"]
    for _ in range(2):
        answer = client.delete(f"/v1/jobs/{job}")
        assert (answer.status_code, answer.json["status"]) == (200, "cancelled")


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/events")])
def test_an_unknown_job_is_not_found(client: FlaskClient, method: str, path: str) -> None:
    answer = client.open(f"/v1/jobs/nobody{path}", method=method)
    assert (answer.status_code, answer.json["error"]["code"]) == (404, "unknown_job")


# --- the service itself ---------------------------------------------------------------------------


def test_tokenize_counts_a_prompt_or_a_chat(client: FlaskClient) -> None:
    assert client.post("/v1/tokenize", json={"prompt": "ab"}).json == {"tokens": [97, 98], "count": 2}
    assert client.post("/v1/tokenize", json=HELLO).json["count"] == 5
    assert client.post("/v1/tokenize", json={}).status_code == 400


def test_ready_says_what_is_missing(backend: FakeBackend) -> None:
    def away() -> list[str]:
        raise redis.exceptions.ConnectionError("refused")

    for workers, status, word in (
        (lambda: ["w"], 200, ""),
        (lambda: [], 503, "worker"),
        (away, 503, "Redis"),
    ):
        services = make_services(backend, workers)
        answer = create_app(services.settings, services).test_client().get("/ready")
        assert answer.status_code == status
        assert word in "".join(answer.json["missing"])


def test_health_needs_nothing_but_the_process() -> None:
    assert create_app(Settings()).test_client().get("/health").status_code == 200


def test_a_request_id_goes_through_and_a_bad_one_is_replaced(client: FlaskClient) -> None:
    assert client.get("/health", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"] == "abc-1"
    for bad in ("x" * 200, "a b", "<script>"):
        given = client.get("/health", headers={"X-Request-Id": bad}).headers["X-Request-Id"]
        assert given
        assert given != bad


@pytest.mark.parametrize(
    ("fault", "status", "retry"),
    [
        (redis.exceptions.ConnectionError("refused"), 503, True),
        (redis.exceptions.TimeoutError("slow"), 503, True),
        (QueueFull("full", retry_after=2.5), 429, True),
        (Unavailable("no workers"), 503, True),
        (ZeroDivisionError("secret detail"), 500, False),
    ],
)
def test_a_fault_behind_the_door_has_its_status_and_no_traceback(
    client: FlaskClient, backend: FakeBackend, fault: Exception, status: int, retry: bool
) -> None:
    backend.fault = fault
    answer = client.post("/v1/chat/completions", json=HELLO)
    assert answer.status_code == status
    assert ("Retry-After" in answer.headers) == retry
    assert "secret detail" not in answer.text
    assert "Traceback" not in answer.text
    if status == 500:
        assert answer.headers["X-Request-Id"] in answer.json["error"]["message"]


def test_redis_lost_in_mid_stream_is_an_error_event(client: FlaskClient) -> None:
    def lose_redis(backend: FakeBackend, job: FakeJob) -> None:
        backend.emit(job, ["Once", " upon"])
        backend.fault = redis.exceptions.ConnectionError("refused")
        with backend.changed:
            backend.changed.notify_all()

    backend = FakeBackend(lose_redis)
    services = make_services(backend)
    client = create_app(services.settings, services).test_client()
    *_, last = events_of(client.post("/v1/completions", json={"prompt": "a", "stream": True}).text)
    assert last["error"]["code"] == "unavailable"


# --- bad input ------------------------------------------------------------------------------------

CHAT = "/v1/chat/completions"
DEEP = b'{"messages":' + b"[" * 2000 + b"]" * 2000 + b"}"


def chat_with(text: bytes) -> bytes:
    return b'{"messages":[{"role":"user","content":"a"}],' + text + b"}"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "line 1 column 1"),
        (b'{"messages": [}', 400, "line 1 column 15"),
        (b'{"a":1}{', 400, "Extra data"),
        (b'\xff{"a":1}', 400, "UTF-8 at byte 0"),
        ("{}".encode("utf-16"), 400, "UTF-8"),
        (b"null", 400, "must be a JSON object, not null"),
        (b"[]", 400, "must be a JSON object, not array"),
        (DEEP, 400, "nested too deeply"),
        (chat_with(b'"temperature":NaN'), 400, "NaN"),
        (chat_with(b'"temperature":-Infinity'), 400, "Infinity"),
        (chat_with(b'"temperature":1e999'), 400, "temperature: must be a finite number"),
        (chat_with(b'"seed":' + b"9" * 5000), 413, "max_body_bytes"),
        (chat_with(b'"seed":' + b"9" * 50), 400, "seed: "),
        (chat_with(b'"max_tokens":0'), 400, "max_tokens: "),
        (chat_with(b'"max_tokens":1000000000'), 413, "max_tokens: "),
        (chat_with(b'"max_tokens":"5"'), 400, "max_tokens: "),
        (chat_with(b'"max_tokens":1.5'), 400, "max_tokens: "),
        (chat_with(b'"model":"gpt-4"'), 404, "'gpt-4' is not served here"),
        (chat_with(b'"colour":"red"'), 400, "colour: unknown or unsupported field"),
        (chat_with(b'"tools":[{"type":"function"}]'), 400, "tools: unsupported"),
        (b'{"messages":[]}', 400, "messages: required and not empty"),
        (b'{"messages":[{"role":"user","content":"\\ud800"}]}', 400, "lone surrogates"),
        (b"{" + b" " * MAX_BODY + b"}", 413, "max_body_bytes"),
    ],
)
def test_bad_input_gets_a_clear_error(
    client: FlaskClient, backend: FakeBackend, body: bytes, status: int, words: str
) -> None:
    answer = client.post(CHAT, data=body, content_type="application/json")
    assert answer.status_code == status
    assert words in answer.json["error"]["message"]
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert not backend.jobs
    assert client.post(CHAT, json=HELLO).status_code == 200


def test_duplicate_keys_mean_the_last_one(client: FlaskClient) -> None:
    body = chat_with(b'"max_tokens":0,"max_tokens":5')
    assert client.post(CHAT, data=body, content_type="application/json").status_code == 200


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "garbage"])
def test_a_body_that_does_not_say_it_is_json_is_refused(
    client: FlaskClient, content_type: str | None
) -> None:
    answer = client.post(CHAT, data=json.dumps(HELLO), content_type=content_type)
    assert (answer.status_code, answer.json["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/problem+json"])
def test_json_may_have_parameters_or_a_suffix(client: FlaskClient, content_type: str) -> None:
    assert client.post(CHAT, data=json.dumps(HELLO), content_type=content_type).status_code == 200


def test_a_chunked_body_is_bounded_too(client: FlaskClient) -> None:
    import io

    answer = client.post(
        CHAT,
        input_stream=io.BytesIO(b" " * (MAX_BODY + 1)),
        content_type="application/json",
        environ_overrides={"wsgi.input_terminated": True},
    )
    assert (answer.status_code, answer.json["error"]["code"]) == (413, "too_large")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/jobs", 405, "method_not_allowed"),
        ("GET", "/v1/jobs?status=odd", 400, "invalid_request"),
        ("GET", "/v1/jobs?limit=0", 400, "invalid_request"),
        ("GET", "/v1/jobs?limit=x", 400, "invalid_request"),
        ("GET", "/v1/jobs/a/events?from=x", 400, "invalid_request"),
        ("GET", "/v1/jobs/a/events?from=-1", 400, "invalid_request"),
        ("GET", "/v1/jobs/a/events?from=99999999999999999999", 400, "invalid_request"),
    ],
)
def test_a_bad_path_or_query_has_openais_error_body(
    client: FlaskClient, method: str, path: str, status: int, code: str
) -> None:
    answer = client.open(path, method=method)
    assert (answer.status_code, answer.json["error"]["code"]) == (status, code)
    assert answer.headers["X-Request-Id"]
    assert ("Allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize("key", ["", "x" * 300, "a b", "é"])
def test_a_bad_idempotency_key_is_refused(client: FlaskClient, key: str) -> None:
    answer = client.post("/v1/jobs", json={"kind": "chat", **HELLO}, headers={"Idempotency-Key": key})
    assert (answer.status_code, answer.json["error"]["param"]) == (400, "Idempotency-Key")
