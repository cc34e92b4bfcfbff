"""The HTTP doors in this process, on a real queue; a real worker where a job is to be served."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from flask.testing import FlaskClient

from api.app import create_app
from api.services import Services, build
from tests.queue_site import Site
from tests.services import running_worker, settings_for
from wicore.config import Settings
from wicore.errors import ConfigError, QueueFull, TooLarge, Unavailable, WorkerLost

pytestmark = pytest.mark.valkey

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
TELL = {"kind": "completion", "prompt": "Tell", "max_tokens": 3}
MAX_BODY = 2**18


@pytest.fixture
def settings(valkey_url: str) -> Settings:
    return settings_for(
        valkey_url,
        engine__kind="null",
        engine__null_step_ms=1.0,
        api__max_body_bytes=MAX_BODY,
        api__max_sockets=2,
    )


@pytest.fixture
def services(redis_client: Any, settings: Settings) -> Iterator[Services]:
    services = build(settings)
    yield services
    services.relay.close()
    services.redis.close()


@pytest.fixture
def client(services: Services) -> FlaskClient:
    return create_app(services.settings, services).test_client()


@pytest.fixture
def worker(client: FlaskClient, settings: Settings) -> Iterator[Any]:
    with running_worker(settings) as running:
        yield running


@pytest.fixture
def by_hand(redis_client: Any) -> Iterator[Callable[..., None]]:
    """`by_hand(act)` runs `act(site, delivery)` on a thread for the next job that is submitted."""
    site = Site(redis_client)
    consumer = site.worker()
    threads = []

    def start(act: Callable[[Site, Any], object]) -> None:
        def play() -> None:
            while not (deliveries := consumer.pop(1)):
                consumer.wait(10)
            act(site, deliveries[0])

        threads.append(threading.Thread(target=play))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(10)
    site.close()


def submit(client: FlaskClient, **fields: Any) -> str:
    answer = client.post("/v1/jobs", json=TELL | fields)
    assert answer.status_code == 202
    return str(answer.json["id"])


def record(client: FlaskClient, job: str) -> Any:
    return client.get(f"/v1/jobs/{job}").json


def events_of(text: str) -> Iterator[Any]:
    for block in text.split("\n\n"):
        for line in block.splitlines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                yield data if data == "[DONE]" else json.loads(data)


# --- OpenAI ---------------------------------------------------------------------------------------


def test_a_chat_call_answers_with_the_jobs_result(client: FlaskClient, worker: Any) -> None:
    answer = client.post(CHAT, json=HELLO)
    job = record(client, answer.headers["X-Job-Id"])
    assert answer.status_code == 200
    assert answer.json == job["result"]
    assert answer.json["id"] == f"chatcmpl-{job['id']}"
    assert answer.json["choices"][0]["message"]["content"]
    assert answer.json["usage"]["completion_tokens"] == 3
    assert job["priority"] == "normal"


def test_a_chat_stream_names_the_role_then_sends_text_then_the_end(client: FlaskClient, worker: Any) -> None:
    asked = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    answer = client.post(CHAT, json=asked)
    *chunks, end = events_of(answer.text)
    job = record(client, answer.headers["X-Job-Id"])
    assert answer.mimetype == "text/event-stream"
    assert end == "[DONE]"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert text == job["result"]["choices"][0]["message"]["content"]
    reasons = [c["choices"][0]["finish_reason"] for c in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == job["usage"]
    assert {c["id"] for c in chunks} == {f"chatcmpl-{job['id']}"}
    assert job["priority"] == "interactive"


def test_a_completion_stream_sends_its_text(client: FlaskClient, worker: Any) -> None:
    answer = client.post("/v1/completions", json={"prompt": "Tell", "stream": True})
    *chunks, end = events_of(answer.text)
    (choice,) = record(client, answer.headers["X-Job-Id"])["result"]["choices"]
    assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert all("usage" not in c for c in chunks)
    assert end == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_are_jobs_of_their_own_with_one_answer(
    client: FlaskClient, worker: Any, stream: bool
) -> None:
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    asked = {"prompt": ["Tell", [7, 8]], "n": 2, "max_tokens": 2, "echo": True, "stream": stream, **usage}
    answer = client.post("/v1/completions", json=asked)
    assert answer.text  # until its end
    jobs = [record(client, job) for job in answer.headers["X-Job-Id"].split(", ")]
    expected = [choice["text"] for job in jobs for choice in job["result"]["choices"]]
    total = sum(job["usage"]["total_tokens"] for job in jobs)
    assert len(jobs) == 2
    if stream:
        *chunks, end = events_of(answer.text)
        texts = [""] * 4
        for chunk in chunks[:-1]:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert (texts, end) == (expected, "[DONE]")
        assert chunks[-1]["usage"]["total_tokens"] == total
        assert {chunk["id"] for chunk in chunks} == {f"cmpl-{jobs[0]['id']}"}
    else:
        assert [(c["index"], c["text"]) for c in answer.json["choices"]] == list(enumerate(expected))
        assert answer.json["usage"]["total_tokens"] == total


def test_several_prompts_are_accepted_together_or_not_at_all(client: FlaskClient) -> None:
    refused = client.post("/v1/completions", json={"prompt": ["Tell", [10**6]]})
    assert refused.status_code == 400
    assert [job["status"] for job in client.get("/v1/jobs").json["data"]] == ["cancelled"]


def test_when_one_of_several_prompts_fails_the_others_are_cancelled(
    client: FlaskClient, by_hand: Any
) -> None:
    by_hand(lambda site, job: site.finish(job, "failed", error=TooLarge("does not fit").body()))
    answer = client.post("/v1/completions", json={"prompt": ["Tell", "Tell"]})
    assert answer.status_code == 413
    jobs = client.get("/v1/jobs").json["data"]
    assert sorted(job["status"] for job in jobs) == ["cancelled", "failed"]


def test_an_idempotency_key_gives_the_jobs_of_all_prompts_again(client: FlaskClient, worker: Any) -> None:
    asked = {"prompt": ["a", "b"], "max_tokens": 1}
    first, again = (
        client.post("/v1/completions", json=asked, headers={"Idempotency-Key": "order-1"}) for _ in range(2)
    )
    assert again.headers["X-Job-Id"] == first.headers["X-Job-Id"]
    assert again.json == first.json


def test_the_best_of_several_choices_is_answered(client: FlaskClient, worker: Any) -> None:
    answer = client.post("/v1/completions", json={"prompt": "Tell", "best_of": 3, "max_tokens": 2}).json
    assert len(answer["choices"]) == 1
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 6


def test_a_schema_that_cannot_be_enforced_is_refused_with_the_function_that_has_it(
    client: FlaskClient,
) -> None:
    odd = {"type": "object", "properties": {"x": {"type": "string", "format": "odd"}}}
    tools = [
        {"type": "function", "function": {"name": "loose", "parameters": odd}},
        {"type": "function", "function": {"name": "strict", "parameters": odd, "strict": True}},
    ]
    answer = client.post(CHAT, json={**HELLO, "tools": tools})
    assert (answer.status_code, answer.json["error"]["param"]) == (400, "tools.1.function.parameters")
    assert "odd" in answer.json["error"]["message"]


def test_the_usage_tells_how_much_of_the_prompt_was_cached(client: FlaskClient, worker: Any) -> None:
    asked = {"prompt": [7] * 200, "max_tokens": 2, "n": 2}
    cached = [
        client.post("/v1/completions", json=asked).json["usage"]["prompt_tokens_details"]["cached_tokens"]
        for _ in range(2)
    ]
    assert cached[0] == 0
    assert 100 < cached[1] < 200


def test_an_error_says_whether_the_same_call_may_succeed_later(client: FlaskClient, by_hand: Any) -> None:
    by_hand(lambda site, job: site.finish(job, "cancelled"))
    cancelled = client.post(CHAT, json=HELLO)
    assert (cancelled.status_code, cancelled.headers["x-should-retry"]) == (409, "false")
    by_hand(lambda site, job: site.finish(job, "expired"))
    assert client.post(CHAT, json=HELLO).headers["x-should-retry"] == "true"


def test_a_priority_in_the_body_wins_over_the_doors_default(client: FlaskClient, worker: Any) -> None:
    answer = client.post(CHAT, json={**HELLO, "priority": "background"})
    assert record(client, answer.headers["X-Job-Id"])["priority"] == "background"


@pytest.mark.parametrize("stream", [False, True])
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
    client: FlaskClient, by_hand: Any, end: str, error: Any, status: int, code: str, stream: bool
) -> None:
    by_hand(lambda site, job: site.finish(job, end, error=error and error.body()))
    answer = client.post(CHAT, json={**HELLO, "stream": stream})
    if stream:
        *_, last = events_of(answer.text)
        assert (answer.status_code, last["error"]["code"]) == (200, code)
    else:
        assert (answer.status_code, answer.json["error"]["code"]) == (status, code)


def test_a_call_past_its_own_deadline_gives_up_and_cancels_the_job(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.calls.EXPIRY_GRACE_S", 0.0)
    monkeypatch.setattr("api.streams.TICK_S", 0.01)
    answer = client.post(CHAT, json={**HELLO, "timeout_s": 0.02})
    assert (answer.status_code, answer.json["error"]["code"]) == (504, "expired")
    (job,) = client.get("/v1/jobs").json["data"]
    assert job["status"] in ("cancelled", "expired")


@pytest.mark.parametrize(("setting", "status"), [(True, "cancelled"), (False, "queued")])
def test_a_call_whose_client_left_is_cancelled_unless_it_is_set_otherwise(
    services: Services, monkeypatch: pytest.MonkeyPatch, setting: bool, status: str
) -> None:
    monkeypatch.setattr("api.streams.TICK_S", 0.01)
    monkeypatch.setattr("api.http.client_gone", lambda environ: True)
    api = services.settings.api.model_copy(update={"cancel_on_disconnect": setting})
    settings = services.settings.model_copy(update={"api": api})
    client = create_app(settings, replace(services, settings=settings)).test_client()
    client.post(CHAT, json=HELLO)
    assert [job["status"] for job in client.get("/v1/jobs").json["data"]] == [status]


def test_the_served_model_is_listed_and_described(client: FlaskClient) -> None:
    listed = client.get("/v1/models").json["data"]
    assert [m["id"] for m in listed] == ["tiny"]
    assert client.get("/v1/models/tiny").json == listed[0]
    assert client.get("/v1/models/org/other").status_code == 404


def test_an_idle_stream_is_kept_alive_by_comments(
    client: FlaskClient, by_hand: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.streams.TICK_S", 0.01)
    monkeypatch.setattr("api.streams.KEEP_ALIVE_S", 0.02)
    answer = client.post("/v1/completions", json={"prompt": "a", "stream": True}, buffered=False)
    pieces = iter(answer.response)
    assert next(pieces).startswith(b": job ")
    assert next(pieces) == b": keep-alive\n\n"
    by_hand(lambda site, job: (site.start(job), site.finish(job)))
    assert b"".join(pieces).endswith(b"data: [DONE]\n\n")


def test_a_stream_gives_its_slot_back_even_if_it_was_never_read(client: FlaskClient, worker: Any) -> None:
    for _ in range(5):
        client.post("/v1/completions", json={"prompt": "a", "stream": True}, buffered=False).close()
    assert client.post("/v1/completions", json={"prompt": "a", "stream": True}).status_code == 200


def test_more_streams_than_allowed_are_refused_until_one_ends(client: FlaskClient) -> None:
    asked = {"prompt": "a", "stream": True}
    held = [client.post("/v1/completions", json=asked, buffered=False) for _ in range(2)]
    refused = client.post("/v1/completions", json=asked)
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "unavailable")
    assert int(refused.headers["Retry-After"]) >= 1
    assert len(client.get("/v1/jobs").json["data"]) == 2, "a refused stream must not leave a job behind"
    held[0].close()
    again = client.post("/v1/completions", json=asked, buffered=False)
    assert again.status_code == 200
    again.close()
    held[1].close()


# --- jobs -----------------------------------------------------------------------------------------


def test_a_job_is_accepted_looked_up_and_followed(client: FlaskClient, worker: Any) -> None:
    answer = client.post("/v1/jobs", json=TELL)
    assert answer.status_code == 202
    job = answer.json["id"]
    assert answer.headers["Location"] == f"/v1/jobs/{job}"
    events = list(events_of(client.get(answer.json["links"]["events"]).text))
    assert [e["type"] for e in events] == ["started", "token", "token", "token", "done"]
    found = record(client, job)
    assert (found["status"], found["usage"]) == ("succeeded", events[-1]["usage"])
    assert found["result"]["choices"][0]["text"] == "".join(e["text"] for e in events[1:-1])


def test_jobs_are_listed_newest_first_page_by_page(client: FlaskClient) -> None:
    jobs = [submit(client) for _ in range(5)]
    client.delete(f"/v1/jobs/{jobs[2]}")
    first = client.get("/v1/jobs?limit=3").json
    rest = client.get(f"/v1/jobs?limit=3&after={first['data'][-1]['id']}").json
    assert sorted(j["id"] for j in first["data"] + rest["data"]) == sorted(jobs)
    assert (first["has_more"], rest["has_more"]) == (True, False)
    times = [j["created_ms"] for j in first["data"] + rest["data"]]
    assert times == sorted(times, reverse=True)
    assert [j["id"] for j in client.get("/v1/jobs?status=cancelled").json["data"]] == [jobs[2]]


def test_events_carry_their_sequence_number_as_id(client: FlaskClient, worker: Any) -> None:
    text = client.get(f"/v1/jobs/{submit(client)}/events").text
    assert [line for line in text.splitlines() if line.startswith("id: ")] == [
        f"id: {seq}" for seq in range(1, 6)
    ]


@pytest.mark.parametrize(
    ("query", "headers"), [("?from=4", {}), ("", {"Last-Event-ID": "3"}), ("?from=1", {"Last-Event-ID": "3"})]
)
def test_events_resume_where_the_client_left_off(
    client: FlaskClient, worker: Any, query: str, headers: dict[str, str]
) -> None:
    job = submit(client)
    assert client.get(f"/v1/jobs/{job}/events").text  # until its end
    resumed = client.get(f"/v1/jobs/{job}/events{query}", headers=headers)
    assert [e["seq"] for e in events_of(resumed.text)] == [4, 5]


def test_zero_asks_for_all_events_and_a_bad_number_is_refused_beside_a_good_one(
    client: FlaskClient, worker: Any
) -> None:
    job = submit(client)
    assert [e["seq"] for e in events_of(client.get(f"/v1/jobs/{job}/events?from=0").text)] == [1, 2, 3, 4, 5]
    answer = client.get(f"/v1/jobs/{job}/events?from=x", headers={"Last-Event-ID": "3"})
    assert (answer.status_code, answer.json["error"]["param"]) == (400, "from")


def test_a_whole_number_may_be_written_with_a_point(client: FlaskClient) -> None:
    body = b'{"kind": "completion", "prompt": [5.0, 7], "max_tokens": 3e0, "seed": -0.0}'
    assert client.post("/v1/jobs", data=body).status_code == 202


def test_a_browser_that_reconnects_after_the_end_is_told_to_stop(client: FlaskClient, worker: Any) -> None:
    job = submit(client)
    assert client.get(f"/v1/jobs/{job}/events").text  # until its end
    assert client.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": "5"}).status_code == 204


def test_an_idempotency_key_gives_the_first_job_again(client: FlaskClient) -> None:
    headers = {"Idempotency-Key": "order-1"}
    first = client.post("/v1/jobs", json=TELL, headers=headers)
    again = client.post("/v1/jobs", json=TELL, headers=headers)
    other = client.post("/v1/jobs", json={**TELL, "prompt": "b"}, headers=headers)
    assert again.json["id"] == first.json["id"]
    assert (other.status_code, other.json["error"]["code"]) == (409, "conflict")
    assert len(client.get("/v1/jobs").json["data"]) == 1


def test_cancelling_is_idempotent(client: FlaskClient) -> None:
    job = submit(client)
    for _ in range(2):
        answer = client.delete(f"/v1/jobs/{job}")
        assert (answer.status_code, answer.json["status"]) == (200, "cancelled")


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/events")])
@pytest.mark.parametrize("job", ["nobody", "x" * 300, "a%20b"])
def test_an_unknown_job_is_not_found(client: FlaskClient, method: str, path: str, job: str) -> None:
    answer = client.open(f"/v1/jobs/{job}{path}", method=method)
    assert (answer.status_code, answer.json["error"]["code"]) == (404, "unknown_job")


# --- the service itself ---------------------------------------------------------------------------


def test_tokenize_counts_a_prompt_or_a_chat(client: FlaskClient, services: Services) -> None:
    expected = services.model.tokenizer.encode("Once upon", bos=True)
    answer = client.post("/v1/tokenize", json={"prompt": "Once upon"})
    assert answer.json == {"tokens": expected, "count": len(expected)}
    chat = client.post("/v1/tokenize", json={"messages": HELLO["messages"]}).json
    assert chat["tokens"][:2] == [services.model.tokenizer.bos, services.model.tokenizer.start_of_turn]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "a", "messages": HELLO["messages"]}, 400, "prompt"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages.0.role"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "model"),
        ({"prompt": "a " * 10**5}, 413, "prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_tokenize_refuses_what_it_cannot_count(
    client: FlaskClient, body: Any, status: int, param: str
) -> None:
    answer = client.post("/v1/tokenize", json=body)
    assert (answer.status_code, answer.json["error"]["param"]) == (status, param)


def test_ready_once_a_worker_serves_the_model(client: FlaskClient, settings: Settings) -> None:
    answer = client.get("/ready")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert "wicore worker" in answer.json["missing"][0]
    other = settings.model_copy(update={"model": settings.model.model_copy(update={"name": "other"})})
    with running_worker(other, "w2") as elsewhere:
        elsewhere._heartbeat._beat()
        assert client.get("/ready").status_code == 503, "a worker of another model must not count"
    with running_worker(settings) as running:
        running._heartbeat._beat()
        assert client.get("/ready").json == {"ready": True, "workers": 1, "missing": []}


def test_ready_says_that_redis_is_away(settings: Settings) -> None:
    away = settings_for("unix:///nowhere/at/all.sock")
    answer = create_app(away).test_client().get("/ready")
    assert answer.status_code == 503
    assert "Redis at unix:///nowhere/at/all.sock cannot be reached" in answer.json["missing"][0]


def test_a_service_without_redis_says_which_setting_is_missing(settings: Settings) -> None:
    unset = settings.model_copy(update={"redis": settings.redis.model_copy(update={"url": None})})
    with pytest.raises(ConfigError, match=r"redis\.url: not set; set WICORE_REDIS__URL"):
        build(unset)


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
        (QueueFull("full", retry_after=2.5), 429, True),
        (Unavailable("Redis cannot be reached"), 503, True),
        (ZeroDivisionError("secret detail"), 500, False),
    ],
)
def test_a_fault_behind_the_door_has_its_status_and_no_traceback(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, fault: Exception, status: int, retry: bool
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr("wicore.queue.producer.Producer.submit", fail)
    answer = client.post(CHAT, json=HELLO)
    assert answer.status_code == status
    assert ("Retry-After" in answer.headers) == retry
    assert "secret detail" not in answer.text
    assert "Traceback" not in answer.text
    if status == 500:
        assert answer.headers["X-Request-Id"] in answer.json["error"]["message"]


# --- bad input ------------------------------------------------------------------------------------

DEEP = b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def chat_with(text: bytes) -> bytes:
    return b'{"messages":[{"role":"user","content":"a"}],' + text + b"}"


BAD_BODIES = [
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
    (chat_with(b'"temperature":1e999'), 400, "temperature: Input should be a finite number"),
    (chat_with(b'"seed":' + b"9" * 5000), 400, "not valid JSON"),
    (chat_with(b'"seed":' + b"9" * 50), 400, "seed: "),
    (chat_with(b'"max_tokens":0'), 400, "max_tokens: "),
    (chat_with(b'"max_tokens":-1'), 400, "max_tokens: "),
    (chat_with(b'"max_tokens":1000000000'), 413, "over the context of 4096; ask for at most"),
    (chat_with(b'"max_tokens":"5"'), 400, "max_tokens: "),
    (chat_with(b'"max_tokens":1.5'), 400, "max_tokens: "),
    (chat_with(b'"repetition_penalty":1e-30'), 400, "repetition_penalty: "),
    (chat_with(b'"n":17'), 400, "n: "),
    (chat_with(b'"model":"gpt-4"'), 404, "'gpt-4' is not served here"),
    (chat_with(b'"colour":"red"'), 400, "colour: unknown or unsupported field"),
    (chat_with(b'"web_search_options":{}'), 400, "web_search_options: unsupported"),
    (chat_with(b'"tools":[{"type":"function"}]'), 400, "tools.0.function: Field required"),
    (chat_with(b'"logit_bias":{"99999999":1}'), 400, "outside of the vocabulary"),
    (b'{"messages":[]}', 400, "messages: required and not empty"),
    (b'{"messages":[{"role":"assistant","content":"a"}]}', 400, "messages.0.role: must be 'user' here"),
    (b'{"messages":[{"role":"user","content":"\\ud800"}]}', 400, "lone surrogates"),
    (b'{"messages":[{"role":"user","content":"%s"}]}' % (b"word " * 6000), 413, "messages: "),
    (b"{" + b" " * MAX_BODY + b"}", 413, "max_body_bytes"),
]


@pytest.mark.parametrize(("body", "status", "words"), BAD_BODIES, ids=lambda value: str(value)[:50])
def test_bad_input_gets_a_clear_error_and_no_job(
    client: FlaskClient, body: bytes, status: int, words: str
) -> None:
    answer = client.post(CHAT, data=body, content_type="application/json")
    assert answer.status_code == status
    assert words in answer.json["error"]["message"]
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/jobs").json["data"] == []


def test_duplicate_keys_mean_the_last_one(client: FlaskClient, worker: Any) -> None:
    body = chat_with(b'"max_tokens":0,"max_tokens":5')
    assert client.post(CHAT, data=body, content_type="application/json").status_code == 200


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "application/json; charset=utf-8",
        "application/problem+json",
        "application/x-www-form-urlencoded",
        "text/plain",
        "garbage",
    ],
)
def test_json_is_taken_whatever_the_client_calls_it(client: FlaskClient, content_type: str | None) -> None:
    answer = client.post("/v1/tokenize", data='{"prompt":"a=b&c"}', content_type=content_type)
    assert answer.status_code == 200


def test_a_multipart_form_is_refused(client: FlaskClient) -> None:
    answer = client.post(CHAT, data={"messages": "a"}, content_type="multipart/form-data")
    assert (answer.status_code, answer.json["error"]["code"]) == (415, "unsupported_media_type")
    assert "application/json" in answer.json["error"]["message"]


def test_a_chunked_body_is_bounded_too(client: FlaskClient) -> None:
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


@pytest.mark.parametrize(("path", "body"), [("/v1/jobs", TELL), (CHAT, HELLO)])
def test_a_webhook_is_refused_while_nothing_could_sign_it(
    client: FlaskClient, path: str, body: dict[str, Any]
) -> None:
    answer = client.post(path, json={**body, "webhook_url": "https://there.example"})
    assert (answer.status_code, answer.json["error"]["param"]) == (400, "webhook_url")
    assert "webhooks.secret" in answer.json["error"]["message"]
