"""The Responses API, by OpenAI's own client, on a real queue with a real worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
import redis
from flask import request
from openai.types.responses import ResponseStreamEvent

from api.app import create_app
from api.callers import Caller
from tests.official import official, serving
from tests.queue_site import Site
from tests.services import running_worker, settings_for
from wicore.config import Settings

pytestmark = pytest.mark.valkey

SHORT: dict[str, Any] = {"model": "tiny", "max_output_tokens": 5}


@pytest.fixture
def settings(valkey_url: str) -> Settings:
    return settings_for(
        valkey_url,
        engine__kind="null",
        engine__null_step_ms=1.0,
        api__max_sockets=3,
        model__max_context=256,
    )


@pytest.fixture
def worker(redis_client: redis.Redis, settings: Settings) -> Iterator[Any]:
    with running_worker(settings) as running:
        yield running


@pytest.fixture
def url(redis_client: redis.Redis, settings: Settings) -> Iterator[str]:
    with serving(settings) as there:
        yield there


@pytest.fixture
def ai(url: str) -> Iterator[openai.OpenAI]:
    with official(url) as client:
        yield client


@pytest.fixture
def site(redis_client: redis.Redis, settings: Settings) -> Iterator[Site]:
    """Workers that a test drives by hand."""
    made = Site(redis_client)
    yield made
    made.close()


def asked(site: Site, response: Any) -> list[tuple[str, str]]:
    """The chat that a waiting response's job was given."""
    message = json.loads(site.redis.get(site.keys.message(response.id.removeprefix("resp_"))) or b"")
    return [(turn["role"], turn["content"]) for turn in json.loads(message["body"])[1]["messages"]]


def numbers(events: list[ResponseStreamEvent]) -> list[int]:
    return [event.sequence_number for event in events]


# --- create -------------------------------------------------------------------------------------


def test_a_response_is_answered_and_kept(ai: openai.OpenAI, worker: Any) -> None:
    made = ai.responses.create(input="Hello", metadata={"a": "b"}, instructions="Be brief.", **SHORT)
    assert (made.status, made.output[0].status) == ("incomplete", "incomplete")
    assert made.output_text
    assert made.usage is not None
    assert made.usage.output_tokens == 5
    assert (made.metadata, made.instructions, made.model) == ({"a": "b"}, "Be brief.", "tiny")
    assert ai.responses.retrieve(made.id) == made


def test_an_answer_that_ends_by_itself_is_completed(ai: openai.OpenAI, site: Site) -> None:
    made = ai.responses.create(input="Hello", background=True)
    (job,) = site.worker().pop(1)
    site.start(job)
    assert ai.responses.retrieve(made.id).status == "in_progress"
    result = {"choices": [{"message": {"content": "Well."}, "logprobs": None, "finish_reason": "stop"}]}
    site.finish(job)
    site.redis.hset(site.keys.job(job.job_id), "result", json.dumps(result))
    done = ai.responses.retrieve(made.id)
    assert (done.status, done.output_text, done.created_at) == ("completed", "Well.", made.created_at)
    assert done.completed_at is not None


def test_a_stream_ends_with_what_is_kept(ai: openai.OpenAI, worker: Any) -> None:
    events = list(ai.responses.create(input="Hello", stream=True, **SHORT))
    assert [events[0].type, events[-1].type] == ["response.created", "response.incomplete"]
    assert numbers(events) == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.incomplete"
    assert ai.responses.retrieve(last.response.id) == last.response
    assert last.response.output_text == "".join(
        e.delta for e in events if e.type == "response.output_text.delta"
    )


def test_the_official_helper_collects_a_stream(ai: openai.OpenAI, worker: Any) -> None:
    with ai.responses.stream(input="Hello", model="tiny", max_output_tokens=5) as stream:
        kinds = {event.type for event in stream}
    assert {"response.created", "response.output_text.delta", "response.output_text.done"} <= kinds


def test_logprobs_come_when_they_are_asked_for(ai: openai.OpenAI, worker: Any) -> None:
    made = ai.responses.create(
        input="Hello", include=["message.output_text.logprobs"], top_logprobs=2, **SHORT
    )
    (part,) = made.output[0].content  # type: ignore[union-attr]
    assert len(part.logprobs) == 5
    assert all(entry.top_logprobs for entry in part.logprobs)
    kept = ai.responses.retrieve(made.id, include=["message.output_text.logprobs"])
    assert kept.output == made.output


TOOL: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"in": {"enum": ["Rome", "Oslo"]}}, "required": ["in"]},
}


@pytest.fixture
def real(redis_client: redis.Redis, valkey_url: str) -> Iterator[openai.OpenAI]:
    """A service whose worker computes."""
    settings = settings_for(valkey_url)
    with running_worker(settings), serving(settings) as url, official(url) as client:
        yield client


class Choice(pydantic.BaseModel):
    place: Literal["Rome", "Oslo"]


def test_an_answer_keeps_to_its_format(real: openai.OpenAI) -> None:
    parsed = real.responses.parse(model="tiny", input="Where?", text_format=Choice, temperature=0)
    assert parsed.output_parsed is not None
    assert parsed.output_parsed.place in ("Rome", "Oslo")
    assert parsed.text is not None
    assert parsed.text.format is not None
    assert parsed.text.format.type == "json_schema"


def test_calls_are_made_streamed_and_answered(real: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    first = real.responses.create(input="How is the weather?", temperature=0, **asked)
    (call,) = first.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["in"] in ("Rome", "Oslo")
    assert (first.status, first.tools[0].type) == ("completed", "function")
    *_, last = real.responses.create(input="How is the weather?", temperature=0, stream=True, **asked)
    assert last.type == "response.completed"
    assert last.response.output[0].arguments == call.arguments  # type: ignore[union-attr]
    told: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    second = real.responses.create(
        model="tiny", input=told, previous_response_id=first.id, tools=[TOOL], max_output_tokens=5
    )
    kinds = [item.type for item in real.responses.input_items.list(second.id, order="asc")]
    assert kinds == ["message", "function_call", "function_call_output"]


def test_a_response_that_is_not_stored_is_not_there_afterwards(ai: openai.OpenAI, worker: Any) -> None:
    made = ai.responses.create(input="Hello", store=False, **SHORT)
    assert made.output_text
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(made.id)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        ai.responses.create(input="And?", previous_response_id=made.id, **SHORT)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": [{"role": "user", "content": "a"}] * 2}, "input"),
        ({"input": "a " * 2000}, "input"),
        ({"input": "a", "max_output_tokens": 1000}, "max_output_tokens"),
        ({"input": "a", "temperature": 3}, "temperature"),
        ({"input": "a", "previous_response_id": "resp_unknown"}, "previous_response_id"),
        ({"input": "a", "previous_response_id": "unknown"}, "previous_response_id"),
    ],
)
def test_what_cannot_be_served_is_refused_in_the_words_of_the_body(
    ai: openai.OpenAI, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ai.responses.create(**body)
    assert caught.value.status_code in (400, 413)
    assert caught.value.body["param"] == param  # type: ignore[index]
    assert f"{param}: " in caught.value.message


def test_a_job_that_fails_gives_its_error(ai: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.calls.EXPIRY_GRACE_S", 0.0)
    monkeypatch.setattr("api.streams.TICK_S", 0.01)
    with pytest.raises(openai.APIStatusError) as caught:
        ai.responses.create(input="a", extra_body={"timeout_s": 0.01, "queue_timeout_s": 0.01})
    assert caught.value.status_code == 504


# --- follow up ------------------------------------------------------------------------------------


def test_a_follow_up_has_the_whole_conversation(ai: openai.OpenAI, settings: Settings, site: Site) -> None:
    with running_worker(settings):
        first = ai.responses.create(input="One", instructions="First.", **SHORT)
        second = ai.responses.create(input="Two", previous_response_id=first.id, **SHORT)
    third = ai.responses.create(
        input=[{"role": "user", "content": "Three"}],
        previous_response_id=second.id,
        instructions="Third.",
        background=True,
    )
    assert third.previous_response_id == second.id
    assert asked(site, third) == [
        ("developer", "Third."),
        *(("user", "One"), ("assistant", first.output_text)),
        *(("user", "Two"), ("assistant", second.output_text)),
        ("user", "Three"),
    ]


def test_a_follow_up_does_not_need_what_it_follows_any_more(ai: openai.OpenAI, worker: Any) -> None:
    first = ai.responses.create(input="One", **SHORT)
    second = ai.responses.create(input="Two", previous_response_id=first.id, **SHORT)
    ai.responses.delete(first.id)
    third = ai.responses.create(input="Three", previous_response_id=second.id, **SHORT)
    listed = ai.responses.input_items.list(third.id, order="asc")
    assert len(listed.data) == 5


def test_an_open_response_cannot_be_followed_up(ai: openai.OpenAI) -> None:
    first = ai.responses.create(input="One", background=True)
    with pytest.raises(openai.BadRequestError, match="is queued"):
        ai.responses.create(input="Two", previous_response_id=first.id)


def test_truncation_makes_a_long_conversation_fit(ai: openai.OpenAI, site: Site) -> None:
    words = [{"role": role, "content": "so " * 40} for role in ("user", "assistant") * 5]
    talk: Any = [*words, {"role": "user", "content": "Well?"}]
    with pytest.raises(openai.APIStatusError):
        ai.responses.create(input=talk, **SHORT)
    made = ai.responses.create(input=talk, truncation="auto", background=True, **SHORT)
    chat = asked(site, made)
    assert 1 < len(chat) < len(talk)
    assert (chat[0][0], chat[-1]) == ("user", ("user", "Well?"))


def test_input_items_are_listed_in_pages_newest_first(ai: openai.OpenAI, worker: Any) -> None:
    first = ai.responses.create(input="One", **SHORT)
    talk: Any = [{"role": "user", "content": "Two", "id": "mine"}]
    second = ai.responses.create(input=talk, previous_response_id=first.id, **SHORT)
    page = ai.responses.input_items.list(second.id, limit=2)
    assert page.data[0].id == "mine"
    assert page.has_more
    everything = list(ai.responses.input_items.list(second.id, limit=1, order="asc"))
    assert len({item.id for item in everything}) == 3
    assert [item.id for item in everything[:0:-1]] == [item.id for item in page.data]
    assert everything[1].id == first.output[0].id


# --- background, resuming, cancelling, deleting ---------------------------------------------------


def test_a_background_stream_goes_on_elsewhere_where_it_was_left(
    ai: openai.OpenAI, settings: Settings, worker: Any
) -> None:
    stream = ai.responses.create(input="Hello", background=True, stream=True, **SHORT)
    seen = [next(iter(stream)) for _ in range(2)]
    stream.close()
    whole = list(ai.responses.retrieve(seen[0].response.id, stream=True))  # type: ignore[union-attr]
    with serving(settings) as other, official(other) as there:
        rest = list(there.responses.retrieve(seen[0].response.id, stream=True, starting_after=1))  # type: ignore[union-attr]
    assert [event.type for event in whole][:3] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    assert numbers(whole) == list(range(len(whole)))
    assert whole[:2] == seen
    assert whole[2:] == rest


def test_a_resumed_stream_follows_what_is_still_to_come(ai: openai.OpenAI, site: Site) -> None:
    made = ai.responses.create(input="Hello", background=True)
    stream = iter(ai.responses.retrieve(made.id, stream=True, starting_after=0))
    assert next(stream).type == "response.queued"
    (job,) = site.worker().pop(1)
    site.start(job)
    assert [next(stream).type for _ in range(4)][-1] == "response.output_text.delta"
    site.finish(job, "cancelled")
    assert next(stream).response.status == "cancelled"  # type: ignore[union-attr]


def test_a_waiting_response_is_cancelled_at_once_and_again_to_no_effect(ai: openai.OpenAI) -> None:
    made = ai.responses.create(input="Hello", background=True)
    assert made.status == "queued"
    assert ai.responses.cancel(made.id).status == "cancelled"
    assert ai.responses.cancel(made.id) == ai.responses.retrieve(made.id)


def test_a_running_response_is_cancelled_with_what_it_has(
    ai: openai.OpenAI, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.responses.CANCEL_WAIT_S", 0.0)
    monkeypatch.setattr("api.streams.TICK_S", 0.01)
    made = ai.responses.create(input="Hello", background=True)
    (job,) = site.worker().pop(1)
    site.start(job)
    assert ai.responses.cancel(made.id).status == "in_progress"
    site.finish(job, "cancelled")
    kept = ai.responses.retrieve(made.id)
    assert (kept.status, kept.output_text) == ("cancelled", "a")


def test_only_a_background_response_can_be_cancelled(ai: openai.OpenAI, worker: Any) -> None:
    made = ai.responses.create(input="Hello", **SHORT)
    with pytest.raises(openai.BadRequestError, match="background"):
        ai.responses.cancel(made.id)


def test_a_deleted_response_is_gone_with_its_job(ai: openai.OpenAI, worker: Any, site: Site) -> None:
    made = ai.responses.create(input="Hello", **SHORT)
    ai.responses.delete(made.id)
    for act in (
        ai.responses.retrieve,
        ai.responses.delete,
        ai.responses.cancel,
        ai.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError):
            act(made.id)
    job = made.id.removeprefix("resp_")
    assert not list(site.redis.scan_iter(f"*{job}*"))
    assert site.jobs() == []


def test_deleting_an_open_response_calls_its_job_off(ai: openai.OpenAI, site: Site) -> None:
    made = ai.responses.create(input="Hello", background=True)
    ai.responses.delete(made.id)
    assert site.producer.record(made.id.removeprefix("resp_")).status == "cancelled"
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(made.id)
    site.check()


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("?starting_after=3", "starting_after"),
        ("?stream=true&starting_after=x", "starting_after"),
        ("?stream=perhaps", "stream"),
        ("?include[]=reasoning.encrypted_content", "include"),
        ("?include_obfuscation=true", "include_obfuscation"),
        ("?color=red", "color"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=nobody", "after"),
        ("/input_items?before=x", "before"),
    ],
)
def test_a_bad_query_is_refused_by_name(ai: openai.OpenAI, path: str, param: str) -> None:
    made = ai.responses.create(input="Hello", background=True)
    with pytest.raises(openai.BadRequestError) as caught:
        ai.get(f"/responses/{made.id}{path}", cast_to=object)
    assert caught.value.body["param"] == param  # type: ignore[index]


def test_a_response_is_there_for_its_owner_alone(
    url: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def restricted() -> Caller:
        return Caller(request.headers["Authorization"].rpartition("-")[2], restricted=True)

    monkeypatch.setattr("api.responses.caller", restricted)
    with official(url, "key-one") as one, official(url, "key-two") as two:
        made = one.responses.create(input="Hello", background=True)
        assert one.responses.retrieve(made.id).id == made.id
        for act in (two.responses.retrieve, two.responses.cancel, two.responses.delete):
            with pytest.raises(openai.NotFoundError):
                act(made.id)
        with pytest.raises(openai.NotFoundError):
            two.responses.retrieve(made.id, stream=True)
        with pytest.raises(openai.BadRequestError, match="No response"):
            two.responses.create(input="And?", previous_response_id=made.id)
        assert one.responses.retrieve(made.id).status == "queued"


def test_a_stream_that_was_refused_leaves_no_job_behind(
    redis_client: redis.Redis, settings: Settings
) -> None:
    client = create_app(settings).test_client()
    held = [
        client.post("/v1/responses", json={"input": "a", "stream": True}, buffered=False) for _ in range(3)
    ]
    assert client.post("/v1/responses", json={"input": "a", "stream": True}).status_code == 503
    assert len(client.get("/v1/jobs").json["data"]) == 3
    for answer in held:
        answer.close()
