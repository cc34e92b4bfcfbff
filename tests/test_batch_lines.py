"""What a batch's file must hold, and the jobs and answers of its lines."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wicore.access.keys import NO_LIMITS, Limits
from wicore.batches.lines import Checker, Line, job_of, parse_line, split
from wicore.errors import Forbidden, InvalidRequest
from wicore.request import JobBody, Priority
from wicore.text.prompt import Prompt

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
LONGEST = 1000


def line(custom_id: Any = "a", **more: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": HELLO, **more}


def errors(*lines: Any, endpoint: Any = CHAT) -> list[tuple[int | None, str, str | None]]:
    texts = [text if isinstance(text, str) else json.dumps(text) for text in lines]
    checker = Checker(endpoint, LONGEST)
    for number, content in split(["\n".join(texts).encode()], LONGEST):
        checker.check(number, content)
    checker.finish()
    return [(error["line"], error["code"], error["param"]) for error in checker.errors]


@given(st.lists(st.binary(max_size=20)), st.lists(st.integers(1, 7), min_size=1))
def test_lines_are_the_same_however_the_file_is_cut(lines: list[bytes], cuts: list[int]) -> None:
    content, pieces = b"\n".join(lines), []
    rest = content
    for cut in cuts * len(content):
        pieces.append(rest[:cut])
        rest = rest[cut:]
    whole = list(enumerate(content.split(b"\n"), 1))
    assert list(split([*pieces, rest], 100)) == [(number, text) for number, text in whole if text.strip()]


def test_a_line_that_is_too_long_is_not_held() -> None:
    pieces = [b"x" * 50 for _ in range(1000)]
    ((number, content),) = split([*pieces, b"\n"], 100)
    assert number == 1
    assert 100 < len(content) <= 200


def test_a_file_of_requests_has_no_faults_with_blank_lines_and_windows_ends() -> None:
    assert errors(line("a"), "", json.dumps(line("b")) + "\r", "") == []


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        ("{", "invalid_json_line", None),
        ("[" * 100_000, "line_too_long", None),
        ("[" * 900, "invalid_json_line", None),
        ('{"a": NaN}', "invalid_json_line", None),
        ("[]", "invalid_request_line", None),
        (line(None), "invalid_request_line", "custom_id"),
        (line(""), "invalid_request_line", "custom_id"),
        (line("b", method="GET"), "invalid_request_line", "method"),
        (line("b", body="x"), "invalid_request_line", "body"),
        (line("b", extra=1), "invalid_request_line", "extra"),
        (line("b", url="/v1/responses"), "mismatched_url", "url"),
        (line("a"), "duplicate_custom_id", "custom_id"),
    ],
)
def test_a_bad_line_is_told_with_its_number(bad: Any, code: str, param: str | None) -> None:
    assert errors(line("a"), "", bad, line("c")) == [(3, code, param)]


def test_a_file_without_requests_is_refused() -> None:
    assert errors("", " ") == [(None, "empty_file", None)]


def test_only_so_many_requests_and_faults_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wicore.batches.lines.MAX_LINES", 2)
    assert errors(line("a"), line("b"), line("c")) == [(3, "too_many_requests", None)]
    checker = Checker(CHAT, LONGEST)
    for number in range(100):
        assert not checker.is_full
        checker.check(number, b"{")
    assert checker.is_full


def job(endpoint: Any, body: dict[str, Any], limits: Limits = NO_LIMITS) -> Any:
    def check(body: JobBody) -> Prompt:
        return Prompt([1, 2], 5, frozenset())

    return job_of(endpoint, Line(custom_id="a", method="POST", url=endpoint, body=body), limits, check)


@pytest.mark.parametrize(
    ("endpoint", "body", "kind"),
    [
        (CHAT, HELLO, "chat"),
        ("/v1/completions", {"prompt": "Once"}, "completion"),
        ("/v1/responses", {"input": "Hello"}, "chat"),
    ],
)
def test_a_line_becomes_the_job_that_its_endpoint_would_make(endpoint: str, body: Any, kind: str) -> None:
    made = job(endpoint, {**body, "temperature": 0, "priority": "background"})
    assert (made.body.kind, made.body.temperature) == (kind, 0)
    assert made.priority is Priority.BACKGROUND
    assert ("response" in made.fields()) == (endpoint == "/v1/responses")


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        (CHAT, {**HELLO, "stream": True}, "stream"),
        (CHAT, {**HELLO, "priority": "interactive"}, "priority"),
        (CHAT, {**HELLO, "temperature": 9}, "temperature"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/responses", {"input": "a", "background": True}, "background"),
        ("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
    ],
)
def test_a_request_that_cannot_be_served_names_the_field(endpoint: str, body: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        job(endpoint, body)
    assert caught.value.param == param


def test_a_request_is_no_higher_than_its_client_may_be() -> None:
    low = Limits(priority="background")
    assert job(CHAT, HELLO).priority is Priority.BATCH
    assert job(CHAT, HELLO, low).priority is Priority.BACKGROUND
    with pytest.raises(Forbidden, match="priority"):
        job(CHAT, {**HELLO, "priority": "batch"}, low)


def test_a_request_with_lone_surrogates_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        parse_line(json.dumps(line("\ud800")).encode())
