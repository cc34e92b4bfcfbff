"""A short run of random requests; `make fuzz` is the long one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fuzz.__main__ import run
from tests.fuzz.hooks import IMAGE, settle
from wicore.request import parse_job


@pytest.mark.valkey
def test_no_request_breaks_what_the_service_says_of_itself(redis_client: Any, valkey_url: str) -> None:
    assert run(valkey_url, seconds=60, seed=1) == 0


def test_a_settled_body_keeps_what_the_description_has_words_for() -> None:
    body = {
        "messages": [{"role": "assistant", "content": "a"}, {"role": "system", "content": "b"}],
        "logit_bias": {"9999999": 1.0},
        "timeout_s": 0.001,
        "max_tokens": 10**9,
        "temperature": 0.5,
    }
    settled = settle(body)
    assert parse_job(settled).temperature == 0.5
    assert [one["role"] for one in settled["messages"]] == ["user", "assistant"]
    assert settled["messages"][0]["content"] == "a"
    assert settle({"messages": None, "n": 2}) == {"messages": None, "n": 2}


def test_what_is_drawn_as_an_image_is_sent_as_one_by_users_alone() -> None:
    drawn = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "high"}}
    said = [{"role": role, "content": [drawn]} for role in ("user", "assistant")]
    user, assistant = settle({"messages": said})["messages"]
    assert user["content"] == [{"type": "image_url", "image_url": {"url": IMAGE, "detail": "high"}}]
    assert assistant["content"] == "Hello"
    given = {"type": "input_image", "image_url": "nothing", "detail": "low"}
    [item] = settle({"input": [{"role": "user", "content": [given]}]})["input"]
    assert item["content"] == [given | {"image_url": IMAGE}]
