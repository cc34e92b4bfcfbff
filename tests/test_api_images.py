"""Images by every HTTP door, in this process, on a real queue with a real worker."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from flask.testing import FlaskClient

from api.app import create_app
from api.services import Services, build
from tests.images import asked, damaged_png, data_url, png
from tests.seeing import VISION, HeldEncoder, seeing_model
from tests.services import running_worker, settings_for
from wicore.batches.runner import Runner
from wicore.config import Settings

pytestmark = pytest.mark.valkey

CHAT = "/v1/chat/completions"
RED = png(seed=1)
URL = "messages.0.content.1.image_url.url"


@pytest.fixture
def settings(valkey_url: str) -> Settings:
    return settings_for(
        valkey_url,
        engine__kind="null",
        engine__null_step_ms=0.5,
        model__max_images=2,
        model__max_image_bytes=5000,
        model__max_image_pixels=100_000,
    )


@pytest.fixture
def blind(redis_client: Any, settings: Settings) -> Iterator[Services]:
    """Of a model that takes no images."""
    services = build(settings)
    yield services
    services.relay.close()
    services.redis.close()


@pytest.fixture
def services(blind: Services) -> Services:
    return replace(blind, model=seeing_model(blind.settings))


@pytest.fixture
def client(services: Services) -> FlaskClient:
    return create_app(services.settings, services).test_client()


@pytest.fixture
def encoder() -> HeldEncoder:
    return HeldEncoder(held=False)


@pytest.fixture
def worker(services: Services, encoder: HeldEncoder) -> Iterator[Any]:
    with running_worker(services.settings, model=services.model, encoder=encoder) as running:
        yield running


def error(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json["error"]["param"]


def test_a_chat_with_an_image_is_answered_whole_and_streamed(
    client: FlaskClient, worker: Any, encoder: HeldEncoder
) -> None:
    body = {"messages": asked("What is this?", RED), "max_tokens": 3, "temperature": 0}
    whole = client.post(CHAT, json=body)
    assert whole.status_code == 200
    assert whole.json["usage"]["completion_tokens"] == 3
    streamed = client.post(CHAT, json=body | {"stream": True}).text
    deltas = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    text = "".join(delta["choices"][0]["delta"].get("content") or "" for delta in deltas)
    assert text == whole.json["choices"][0]["message"]["content"]
    assert len(encoder.seen) == 1


def test_an_image_that_cannot_be_decoded_is_the_callers_fault(client: FlaskClient, worker: Any) -> None:
    body = {"messages": asked("What?", damaged_png()), "max_tokens": 3}
    answer = client.post(CHAT, json=body)
    assert error(answer) == (400, URL)


@pytest.mark.parametrize(
    ("parts", "status", "param"),
    [
        ([RED] * 3, 413, "messages"),
        (["What?", bytes(RED) + bytes(5000)], 413, URL),
        (["What?", png(400, 251)], 413, URL),
        (["What?", b"no image"], 400, URL),
        (["What?", {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}], 400, URL),
    ],
    ids=["too many", "too many bytes", "too many pixels", "no image", "elsewhere"],
)
def test_what_no_door_takes_is_refused_before_there_is_a_job(
    client: FlaskClient, redis_client: Any, parts: list[Any], status: int, param: str
) -> None:
    for door in (CHAT, "/v1/jobs", "/v1/tokenize"):
        assert error(client.post(door, json={"messages": asked(*parts)})) == (status, param), door
    assert client.get("/v1/jobs").json["data"] == []


def test_a_model_served_for_text_alone_says_so(blind: Services) -> None:
    client = create_app(blind.settings, blind).test_client()
    for door in (CHAT, "/v1/jobs", "/v1/tokenize"):
        answer = client.post(door, json={"messages": asked("What?", RED)})
        assert error(answer) == (400, "messages.0.content.1.type")
        assert "served for text alone" in answer.json["error"]["message"]
    (model,) = client.get("/v1/models").json["data"]
    assert (model["input_modalities"], model["image_limits"]) == (["text"], None)


def test_where_no_images_are_allowed_the_model_is_one_for_text(services: Services) -> None:
    settings = services.settings.model_copy(
        update={"model": services.settings.model.model_copy(update={"max_images": 0})}
    )
    client = create_app(settings, replace(services, settings=settings)).test_client()
    answer = client.post(CHAT, json={"messages": asked("What?", RED)})
    assert error(answer) == (400, "messages.0.content.1.type")
    (model,) = client.get("/v1/models").json["data"]
    assert (model["input_modalities"], model["image_limits"]) == (["text"], None)


def test_the_model_says_that_it_takes_images_and_which(client: FlaskClient) -> None:
    (model,) = client.get("/v1/models").json["data"]
    assert model["input_modalities"] == ["text", "image"]
    assert model["image_limits"] == {"images": 2, "bytes": 5000, "pixels": 100_000}


def test_tokenize_counts_images_and_shows_what_stands_for_them_in_the_vocabulary(
    client: FlaskClient,
) -> None:
    told = client.post("/v1/tokenize", json={"messages": asked("What?", RED)}).json
    soft = VISION.soft_token_id
    assert told["tokens"].count(soft) == VISION.tokens
    at = told["tokens"].index(soft)
    assert told["tokens"][at - 1] == VISION.start_token_id
    assert told["count"] == len(told["tokens"])
    assert min(told["tokens"]) >= 0


# --- the Responses API ----------------------------------------------------------------------------


def image_item(data: bytes = RED) -> dict[str, Any]:
    content = [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": data_url(data)}]
    return {"role": "user", "content": content}


def test_a_response_sees_the_images_of_its_input_and_of_what_it_follows(
    client: FlaskClient, worker: Any, encoder: HeldEncoder
) -> None:
    first = client.post("/v1/responses", json={"input": [image_item()], "max_output_tokens": 3}).json
    alone = client.post("/v1/responses", json={"input": "What?", "max_output_tokens": 3}).json
    assert first["usage"]["input_tokens"] > alone["usage"]["input_tokens"] + VISION.tokens
    followed = {"input": "And?", "previous_response_id": first["id"], "max_output_tokens": 3}
    second = client.post("/v1/responses", json=followed).json
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    assert len(encoder.seen) == 1
    items = client.get(f"/v1/responses/{first['id']}/input_items").json["data"]
    assert items[0]["content"][1] == {"type": "input_image", "image_url": data_url(RED)}


def test_a_response_names_its_own_fields(client: FlaskClient) -> None:
    answer = client.post("/v1/responses", json={"input": [image_item(b"no image")]})
    assert error(answer) == (400, "input")
    assert "messages.0.content.1.image_url.url" in answer.json["error"]["message"]


def test_what_does_not_fit_is_left_out_with_truncation_auto(client: FlaskClient, worker: Any) -> None:
    turns = [image_item(), {"role": "assistant", "content": "A cat."}] * 2 + [image_item()]
    assert error(client.post("/v1/responses", json={"input": turns})) == (413, "input")
    fits = client.post("/v1/responses", json={"input": turns, "truncation": "auto", "max_output_tokens": 2})
    assert fits.status_code == 200


# --- batches --------------------------------------------------------------------------------------


def test_the_lines_of_a_batch_may_have_images(
    client: FlaskClient, services: Services, worker: Any, encoder: HeldEncoder
) -> None:
    chats = {"sees": [RED], "sees not": [b"no image"]}
    lines = [
        {"custom_id": name, "method": "POST", "url": CHAT, "body": {"messages": asked("What?", *parts)}}
        for name, parts in chats.items()
    ]
    for line in lines:
        line["body"]["max_tokens"] = 2
    text = "\n".join(map(json.dumps, lines)).encode()
    runner = Runner(services.redis, services.settings, lambda: services.model)
    sent = {"purpose": "batch", "file": (io.BytesIO(text), "in.jsonl")}
    file = client.post("/v1/files", data=sent).json["id"]
    asked_for = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    made = client.post("/v1/batches", json=asked_for).json["id"]
    while made in services.batches.open():
        runner.advance(made)
    done = client.get(f"/v1/batches/{made}").json
    assert (done["status"], done["request_counts"]["completed"], done["request_counts"]["failed"]) == (
        "completed",
        1,
        1,
    )
    faults = json.loads(client.get(f"/v1/files/{done['error_file_id']}/content").text)
    assert faults["response"]["body"]["error"]["param"] == URL
    assert len(encoder.seen) == 1
