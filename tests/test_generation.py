"""One job from tokens to events and result, and its resumption at any point. No engine, no Redis."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wicore.gemma3.checkpoint import Checkpoint
from wicore.generation import Generation
from wicore.request import Event, JobBody, Priority, parse_job
from wicore.sampling import SampledToken
from wicore.text.prompt import prepare
from wicore.text.tokenizer import Tokenizer

QUIET = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def start(body: JobBody, tiny: Checkpoint, tokenizer: Tokenizer, log: list[Event] = ()) -> Generation:  # type: ignore[assignment]
    prompt = prepare(body, tokenizer, tiny.config)
    attempt = 2 if log else 1
    return Generation("j", body, prompt, tokenizer, priority=Priority.NORMAL, attempt=attempt, log=log)


def completion(**fields: object) -> JobBody:
    return parse_job({"kind": "completion", "prompt": "Hello", **fields})


def run(generation: Generation, tokens: list[list[int]]) -> list[Event]:
    """Feed each choice its tokens in turn, from where it stands, until the job is finished."""
    events = generation.events()
    waiting = {index: tokens[index][len(request.generated) :] for index, request in generation.requests(0)}
    while not generation.finished:
        for index in [i for i in waiting if waiting[i]]:
            ended = generation.take(index, SampledToken(waiting[index].pop(0), -0.5, ((7, -0.5),)))
            [event] = generation.events()
            events.append(event)
            assert ended == ("finish_reason" in event)
            if ended:
                waiting[index] = []
    events.append(generation.end("done"))
    return events


def text_of(events: list[Event], index: int = 0) -> str:
    return "".join(e["text"] for e in events if e["type"] == "token" and e["index"] == index)


def test_events_are_numbered_from_one_and_end_once(tiny, tiny_tokenizer) -> None:
    events = run(start(completion(max_tokens=5), tiny, tiny_tokenizer), [[300, 301, 302, 303, 304]])
    assert [e["seq"] for e in events] == list(range(1, 8))
    assert [e["type"] for e in events] == ["started", *["token"] * 5, "done"]
    usage = events[-1]["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5
    assert events[-1]["finish_reason"] == "length"


def test_an_end_token_stops_the_text_and_is_not_part_of_it(tiny, tiny_tokenizer) -> None:
    events = run(start(completion(max_tokens=9), tiny, tiny_tokenizer), [[300, 301, tiny_tokenizer.eos]])
    assert events[-1]["finish_reason"] == "stop"
    assert text_of(events) == tiny_tokenizer.decode([300, 301])


def test_end_tokens_are_ignored_when_asked(tiny, tiny_tokenizer) -> None:
    body = completion(max_tokens=3, ignore_eos=True)
    events = run(start(body, tiny, tiny_tokenizer), [[300, tiny_tokenizer.eos, 301]])
    assert events[-1]["finish_reason"] == "length"


def test_a_stop_string_ends_the_choice_before_it(tiny, tiny_tokenizer) -> None:
    ids = tiny_tokenizer.encode("one two three four five", bos=False)
    events = run(start(completion(max_tokens=99, stop=["ee fo"]), tiny, tiny_tokenizer), [ids])
    assert text_of(events) == "one two thr"
    assert events[-1]["finish_reason"] == "stop"


def test_logprobs_come_with_each_token_and_in_the_result(tiny, tiny_tokenizer) -> None:
    generation = start(completion(max_tokens=2, logprobs=1), tiny, tiny_tokenizer)
    events = run(generation, [[300, 301]])
    assert all(len(e["logprobs"]) == 1 for e in events if e["type"] == "token")
    result = generation.result("m", 1)
    assert result["choices"][0]["logprobs"]["token_logprobs"] == [-0.5, -0.5]


def test_the_result_holds_every_choice_and_the_usage(tiny, tiny_tokenizer) -> None:
    generation = start(completion(max_tokens=3, n=2), tiny, tiny_tokenizer)
    run(generation, [[300, 301, 302], [310, 311, 312]])
    result = generation.result("m", 1)
    assert [c["text"] for c in result["choices"]] == [
        tiny_tokenizer.decode([300, 301, 302]),
        tiny_tokenizer.decode([310, 311, 312]),
    ]
    assert result["usage"]["completion_tokens"] == 6


def test_choices_draw_from_seeds_of_their_own_and_an_attempt_does_not_change_them(
    tiny, tiny_tokenizer
) -> None:
    body = completion(max_tokens=3, n=3)
    first = [r.sampling.seed for _, r in start(body, tiny, tiny_tokenizer).requests(0)]
    again = [r.sampling.seed for _, r in start(body, tiny, tiny_tokenizer).requests(50)]
    assert first == again
    assert len(set(first)) == 3


@QUIET
@given(data=st.data())
def test_a_job_cut_off_after_any_event_ends_with_the_same_text_and_no_gap(data, tiny, tiny_tokenizer) -> None:
    n = data.draw(st.integers(1, 3))
    token = st.integers(5, tiny.config.vocab_size - 1)
    tokens = [data.draw(st.lists(token, min_size=12, max_size=12)) for _ in range(n)]
    stop = data.draw(st.lists(st.sampled_from(["a", "e ", "\n", "ing"]), max_size=2))
    body = completion(max_tokens=12, n=n, stop=stop, logprobs=1)
    whole = start(body, tiny, tiny_tokenizer)
    undisturbed = run(whole, tokens)
    cut = data.draw(st.integers(1, len(undisturbed) - 1))
    resumed = start(body, tiny, tiny_tokenizer, undisturbed[:cut])
    after = run(resumed, tokens)
    assert after[0] == {"job": "j", "seq": cut + 1, "type": "resumed", "attempt": 2}
    events = undisturbed[:cut] + after
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
    for index in range(n):
        assert text_of(events, index) == text_of(undisturbed, index)
    assert resumed.result("m", 1) == whole.result("m", 1)


def test_a_resumed_sequence_goes_on_at_the_position_where_it_was(tiny, tiny_tokenizer) -> None:
    body = completion(max_tokens=9, temperature=0.5, seed=4)
    log = run(start(body, tiny, tiny_tokenizer), [[300] * 9])[:4]
    [(_, request)] = start(body, tiny, tiny_tokenizer, log).requests(0)
    assert list(request.generated) == [300, 300, 300]
    assert request.sampling.position == 3


def test_events_may_be_asked_for_long_after_the_tokens(tiny, tiny_tokenizer) -> None:
    tokens = [300, 301, 302, 303]
    for stop in ([], ["zz"]):
        body = completion(max_tokens=4, stop=stop, logprobs=1)
        expected = run(start(body, tiny, tiny_tokenizer), [tokens])
        late = start(body, tiny, tiny_tokenizer)
        ended = [late.take(0, SampledToken(token, -0.5, ((7, -0.5),))) for token in tokens]
        assert ended == [False, False, False, True]
        assert [*late.events(), late.end("done")] == expected
        assert late.events() == []


@pytest.mark.parametrize("kind", ["failed", "cancelled", "expired"])
def test_a_job_called_off_ends_with_the_usage_so_far(tiny, tiny_tokenizer, kind) -> None:
    generation = start(completion(max_tokens=9), tiny, tiny_tokenizer)
    generation.take(0, SampledToken(300, None, ()))
    event = generation.end(kind, {"code": "x"})
    assert (event["type"], event["usage"]["completion_tokens"]) == (kind, 1)
    assert event["error"] == {"code": "x"}


# --- completions that choose, echo ----------------------------------------------------------------


def test_the_best_of_several_choices_are_those_with_the_likeliest_tokens(tiny, tiny_tokenizer) -> None:
    generation = start(completion(max_tokens=2, best_of=3, n=2), tiny, tiny_tokenizer)
    for index, (token, logprob) in enumerate([(300, -3.0), (310, -1.0), (320, -2.0)]):
        generation.take(index, SampledToken(token, logprob, ()))
        generation.take(index, SampledToken(token, logprob, ()))
    generation.events()
    choices = generation.result("m", 1)["choices"]
    assert [c["text"] for c in choices] == [tiny_tokenizer.decode([t, t]) for t in (310, 320)]
    assert [c["index"] for c in choices] == [0, 1]
    assert all(c["logprobs"] is None for c in choices)
    assert generation.usage()["completion_tokens"] == 6


def test_an_echoed_prompt_begins_the_text_whether_given_as_text_or_ids(tiny, tiny_tokenizer) -> None:
    for prompt in ("Hello", tiny_tokenizer.encode("Hello", bos=False)):
        body = parse_job({"kind": "completion", "prompt": prompt, "echo": True, "max_tokens": 1})
        generation = start(body, tiny, tiny_tokenizer)
        run(generation, [[300]])
        text = generation.result("m", 1)["choices"][0]["text"]
        assert text.strip() == f"Hello{tiny_tokenizer.decode([300])}"


# --- calls ----------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
CALLS = '[{"name": "f", "parameters": {"x": "}"}}, {"name": "g", "parameters": {}}]'


def asking(**fields: object) -> JobBody:
    return parse_job({"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, **fields})


def test_an_answer_that_calls_ends_for_its_calls_and_the_result_has_them(tiny, tiny_tokenizer) -> None:
    ids = [*tiny_tokenizer.encode(CALLS, bos=False), tiny_tokenizer.end_of_turn]
    generation = start(asking(), tiny, tiny_tokenizer)
    events = run(generation, [ids])
    assert events[-1]["finish_reason"] == events[-2]["finish_reason"] == "tool_calls"
    (choice,) = generation.result("m", 1)["choices"]
    calls = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in calls] == [
        ("f", '{"x": "}"}'),
        ("g", "{}"),
    ]
    assert len({c["id"] for c in calls}) == 2


@pytest.mark.parametrize(
    ("text", "reason", "content", "called"),
    [
        ("Hello", "stop", "Hello", 0),
        (CALLS[:40], "length", None, 1),
        (CALLS[:5], "length", None, 0),
        ("Hello", "length", "Hello", 0),
    ],
)
def test_text_and_cut_off_calls_end_as_they_would_without_tools(
    tiny, tiny_tokenizer, text, reason, content, called
) -> None:
    ids = tiny_tokenizer.encode(text, bos=False)
    end = [tiny_tokenizer.end_of_turn] if reason == "stop" else []
    generation = start(asking(max_tokens=len(ids) + len(end)), tiny, tiny_tokenizer)
    assert run(generation, [[*ids, *end]])[-1]["finish_reason"] == reason
    message = generation.result("m", 1)["choices"][0]["message"]
    assert (message["content"], len(message.get("tool_calls", []))) == (content, called)


@QUIET
@given(data=st.data())
def test_a_call_cut_off_by_a_workers_death_is_the_same_call(data, tiny, tiny_tokenizer) -> None:
    ids = [*tiny_tokenizer.encode(CALLS, bos=False), tiny_tokenizer.end_of_turn]
    whole = start(asking(), tiny, tiny_tokenizer)
    undisturbed = run(whole, [ids])
    cut = data.draw(st.integers(1, len(undisturbed) - 1))
    resumed = start(asking(), tiny, tiny_tokenizer, undisturbed[:cut])
    assert run(resumed, [ids])[-1]["finish_reason"] == "tool_calls"
    assert resumed.result("m", 1) == whole.result("m", 1)
