"""OpenAI's files, by OpenAI's own client; and what is left of them in Redis."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import redis
from flask import request

from api.app import create_app
from api.callers import Caller
from tests.official import official, serving
from tests.services import settings_for
from wicore.config import Settings
from wicore.files import PIECE_BYTES, Files

pytestmark = pytest.mark.valkey

LINES = b'{"custom_id": "a"}\n'


@pytest.fixture
def settings(valkey_url: str) -> Settings:
    return settings_for(
        valkey_url, api__max_body_bytes=4096, api__max_file_bytes=3 * 2**20, api__max_files_bytes=4 * 2**20
    )


@pytest.fixture
def url(redis_client: redis.Redis, settings: Settings) -> Iterator[str]:
    with serving(settings) as there:
        yield there


@pytest.fixture
def ai(url: str) -> Iterator[openai.OpenAI]:
    with official(url) as client:
        yield client


def put(ai: openai.OpenAI, content: bytes = LINES, name: str = "in.jsonl", **more: Any) -> Any:
    return ai.files.create(file=(name, content), purpose="batch", **more)


def test_a_file_is_uploaded_looked_up_read_and_deleted(ai: openai.OpenAI, redis_client: redis.Redis) -> None:
    made = put(ai, name="größe.jsonl")
    assert (made.bytes, made.filename, made.purpose) == (len(LINES), "größe.jsonl", "batch")
    assert made.expires_at == made.created_at + 30 * 86_400
    assert ai.files.retrieve(made.id) == made
    assert ai.files.content(made.id).content == LINES
    assert ai.files.delete(made.id).deleted
    for act in (ai.files.retrieve, ai.files.content, ai.files.delete):
        with pytest.raises(openai.NotFoundError):
            act(made.id)
    assert redis_client.keys() == []


def test_a_file_of_many_pieces_comes_back_the_same(ai: openai.OpenAI, redis_client: redis.Redis) -> None:
    content = bytes(range(256)) * (PIECE_BYTES // 100)
    made = put(ai, content)
    assert ai.files.content(made.id).content == content
    pieces = [redis_client.strlen(key) for key in redis_client.scan_iter(f"*{made.id}:*")]
    assert len(pieces) == 3
    assert max(pieces) == PIECE_BYTES


def test_an_expiry_holds_for_the_file_and_its_pieces(ai: openai.OpenAI, redis_client: redis.Redis) -> None:
    made = put(ai, expires_after={"anchor": "created_at", "seconds": 7200})
    assert made.expires_at == made.created_at + 7200
    lifetimes = [redis_client.ttl(key) for key in redis_client.scan_iter(f"*{made.id}*")]
    assert len(lifetimes) == 2
    assert all(7190 < seconds <= 7200 for seconds in lifetimes)


def test_an_expired_file_is_neither_listed_nor_counted(ai: openai.OpenAI, redis_client: redis.Redis) -> None:
    gone = put(ai, b"x" * 3 * 2**20)
    redis_client.delete(*redis_client.scan_iter(f"*{gone.id}*"))
    made = put(ai, b"x" * 3 * 2**20)
    assert [file.id for file in ai.files.list()] == [made.id]


def test_files_are_listed_in_pages_in_either_order(ai: openai.OpenAI) -> None:
    made = [put(ai).id for _ in range(5)]
    page = ai.files.list(limit=2)
    assert [file.id for file in page.data] == made[:2:-1]
    assert page.has_more
    assert [file.id for file in ai.files.list(limit=2)] == made[::-1]
    assert [file.id for file in ai.files.list(limit=2, order="asc")] == made
    assert [file.id for file in ai.files.list(after=made[2])] == [made[1], made[0]]
    assert len(list(ai.files.list(purpose="batch"))) == 5
    assert list(ai.files.list(purpose="batch_output")) == []


@pytest.mark.parametrize("size", [3 * 2**20 + 1, 3 * 2**20 + 200_000])
def test_a_file_over_the_limit_is_refused_and_leaves_nothing(
    ai: openai.OpenAI, redis_client: redis.Redis, size: int
) -> None:
    with pytest.raises(openai.APIStatusError, match=r"api\.max_file_bytes") as caught:
        put(ai, b"x" * size)
    assert caught.value.status_code == 413
    assert redis_client.keys() == []


def test_the_files_of_a_client_are_bounded_together(ai: openai.OpenAI, redis_client: redis.Redis) -> None:
    first = put(ai, b"x" * 2 * 2**20)
    with pytest.raises(openai.APIStatusError, match=r"api\.max_files_bytes"):
        put(ai, b"x" * 3 * 2**20)
    assert [file.id for file in ai.files.list()] == [first.id]
    assert len(list(redis_client.scan_iter("wicore:file:*"))) == 3
    ai.files.delete(first.id)
    put(ai, b"x" * 3 * 2**20)


def test_an_upload_that_breaks_off_leaves_nothing(redis_client: redis.Redis) -> None:
    pieces = iter([b"x" * 10, b"y" * 10])
    expiries = []

    def read(size: int) -> bytes:
        expiries.extend(redis_client.ttl(key) for key in redis_client.scan_iter("*"))
        try:
            return next(pieces)
        except StopIteration:
            raise OSError("the client went away") from None

    files = Files(redis_client)
    with pytest.raises(OSError, match="went away"):
        files.upload(read, client="", filename="f", purpose="batch", lifetime_s=3600)
    # Had the process died instead, the pieces would have gone by themselves.
    assert len(expiries) == 3
    assert all(0 < seconds <= 3600 for seconds in expiries)
    assert redis_client.keys() == []


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({}, "purpose"),
        ({"purpose": "fine-tune"}, "purpose"),
        ({"purpose": "batch", "file": None}, "file"),
        ({"purpose": "batch", "file": b""}, "file"),
        ({"purpose": "batch", "color": "red"}, "color"),
        ({"purpose": "batch", "more": (io.BytesIO(b"x"), "x")}, "more"),
        ({"purpose": "batch", "expires_after": "soon"}, "expires_after"),
        ({"purpose": "batch", "expires_after[seconds]": "3600"}, "expires_after.anchor"),
        (
            {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
            "expires_after.seconds",
        ),
        (
            {"purpose": "batch", "expires_after[anchor]": "now", "expires_after[seconds]": "3600"},
            "expires_after.anchor",
        ),
    ],
)
def test_a_bad_upload_is_refused_by_name(
    redis_client: redis.Redis, settings: Settings, form: dict[str, Any], param: str
) -> None:
    content = form.pop("file", LINES)
    files = {} if content is None else {"file": (io.BytesIO(content), "in.jsonl")}
    client = create_app(settings).test_client()
    answer = client.post("/v1/files", data={**form, **files}, content_type="multipart/form-data")
    assert (answer.status_code, answer.json["error"]["param"]) == (400, param)
    assert redis_client.keys() == []


def test_an_upload_that_is_no_form_is_refused(redis_client: redis.Redis, settings: Settings) -> None:
    answer = create_app(settings).test_client().post("/v1/files", json={"purpose": "batch"})
    assert answer.status_code == 415


@pytest.mark.parametrize(
    "body", [b"", b"abc", b'--X\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nba']
)
def test_a_form_that_breaks_off_is_refused_as_such(
    redis_client: redis.Redis, settings: Settings, body: bytes
) -> None:
    client = create_app(settings).test_client()
    answer = client.post("/v1/files", data=body, content_type="multipart/form-data; boundary=X")
    assert answer.status_code == 400
    assert answer.json["error"]["message"].startswith("body: ")


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "order=up", "color=red"])
def test_a_bad_query_is_refused_by_name(ai: openai.OpenAI, query: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ai.get(f"/files?{query}", cast_to=object)
    assert caught.value.body["param"] == query.partition("=")[0]  # type: ignore[index]


def test_a_file_is_there_for_its_owner_alone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def restricted() -> Caller:
        return Caller(request.headers["Authorization"].rpartition("-")[2], restricted=True)

    monkeypatch.setattr("api.files.caller", restricted)
    with official(url, "key-one") as one, official(url, "key-two") as two:
        made = put(one)
        assert [file.id for file in one.files.list()] == [made.id]
        assert list(two.files.list()) == []
        for act in (two.files.retrieve, two.files.content, two.files.delete):
            with pytest.raises(openai.NotFoundError):
                act(made.id)
        with pytest.raises(openai.NotFoundError):
            two.files.list(after=made.id)
        assert one.files.content(made.id).content == LINES
