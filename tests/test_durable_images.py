"""Chats with images on the CPU engine: what is cached of them, and that their text survives the worker."""

from __future__ import annotations

from typing import Any

import pytest

from tests.images import asked, png
from tests.killed import undisturbed_and_killed
from tests.seeing import SEEING
from tests.services import follow, running_worker, settings_for
from wicore.config import Settings
from wicore.queue.producer import Producer
from wicore.request import Priority, parse_job

pytestmark = pytest.mark.valkey

RED, BLUE = png(seed=1), png(seed=2)
WORDS = "Look at this picture and say what there is to be seen in it."


def submit(redis_client: Any, image: bytes, job_id: str | None = None, **fields: Any) -> str:
    asked_for = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, **fields}
    body = parse_job({"messages": asked(WORDS, image, WORDS), **asked_for})
    return Producer(redis_client).submit(body, Priority.NORMAL, job_id=job_id).id


def answer(redis_client: Any, image: bytes) -> tuple[str, int]:
    """The text, and how many tokens of the prompt were cached."""
    events = list(follow(redis_client, submit(redis_client, image)))
    assert events[-1]["type"] == "done"
    text = "".join(event["text"] for event in events if event["type"] == "token")
    return text, events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture
def settings(valkey_url: str) -> Settings:
    return settings_for(valkey_url, hmt__block_tokens=16, model__path=str(SEEING))


def test_the_same_image_is_found_in_the_cache_and_another_one_is_not(
    redis_client: Any, settings: Settings
) -> None:
    with running_worker(settings):
        first, nothing = answer(redis_client, RED)
        other, before_it = answer(redis_client, BLUE)
        again, all_of_it = answer(redis_client, RED)
    assert nothing == 0
    # What stands before the image is common to both.
    assert 0 < before_it < all_of_it
    assert other != first
    assert again == first


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.9, "seed": 11, "repetition_penalty": 1.2, "n": 2}])
def test_a_killed_worker_costs_no_token_of_an_answer_about_an_image(
    redis_client: Any, valkey_url: str, fields: dict[str, Any]
) -> None:
    settings = settings_for(valkey_url, queue__lease_s=1.0, model__path=str(SEEING))
    fields = {"max_tokens": 300, **fields}
    undisturbed, killed = undisturbed_and_killed(
        redis_client, settings, lambda: submit(redis_client, RED, "job", **fields)
    )
    assert killed.result["choices"] == undisturbed.result["choices"]
    assert killed.attempts == 2
