"""The message codec: what Celery writes is read, and everything else is refused by name."""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.messages import message, raw
from wicore.queue.codec import MalformedMessage, decode, encode
from wicore.request import JobBody, Message, Priority

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
BODIES = st.builds(
    JobBody,
    kind=st.just("completion"),
    prompt=TEXT.filter(bool) | st.lists(st.integers(0, 262143), min_size=1, max_size=5),
    max_tokens=st.none() | st.integers(1, 100),
    temperature=st.floats(0, 2),
    stop=st.lists(TEXT.filter(bool), max_size=3),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    priority=st.none() | st.sampled_from(Priority),
    metadata=st.dictionaries(TEXT, TEXT, max_size=3),
) | st.builds(
    JobBody,
    kind=st.just("chat"),
    messages=st.lists(st.builds(Message, role=st.just("user"), content=TEXT), min_size=1, max_size=3),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


def plain(*parts: Any) -> bytes:
    """A good message with this as its plain JSON body."""
    return raw(body=json.dumps(parts), properties={"delivery_tag": "t1"})


@given(BODIES, st.sampled_from(Priority))
def test_what_is_encoded_decodes_to_an_equal_job(body: JobBody, priority: Priority) -> None:
    read = decode(encode(body, job_id="j1", tag="t1", priority=priority))
    assert (read.body, read.job_id, read.tag, read.expires_ms) == (body, "j1", "t1", None)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_as_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(data)


@given(
    st.sampled_from(["headers", "properties", "body", "content-type", "content-encoding"])
    | st.tuples(
        st.just("headers"), st.sampled_from(["id", "task", "expires", "eta", "compression", "retries"])
    )
    | st.tuples(st.just("properties"), st.sampled_from(["delivery_tag", "body_encoding"])),
    JSON,
)
def test_any_field_of_any_type_is_read_or_refused_as_malformed(where: Any, value: Any) -> None:
    mutated = message()
    if isinstance(where, str):
        mutated[where] = value
    else:
        mutated[where[0]][where[1]] = value
    with contextlib.suppress(MalformedMessage):
        decode(json.dumps(mutated).encode())


@given(JSON)
def test_any_body_is_read_or_refused_as_malformed(value: Any) -> None:
    with pytest.raises(MalformedMessage) as refused:
        decode(raw(body=json.dumps(value), properties={"delivery_tag": "t1"}))
    assert refused.value.job_id == "j1"


def test_the_body_may_be_base64_or_plain_json() -> None:
    assert decode(raw()).body == decode(plain([], {"kind": "completion", "prompt": "x"}, {})).body


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"[1]", "message"),
        (b"\xff", "UTF-8"),
        (b"[" * 100_000, "JSON"),
        (raw(headers__id=7), "headers.id"),
        (raw(headers__id="a b"), "headers.id"),
        (raw(headers__id="j" * 129), "headers.id"),
        (raw(properties__delivery_tag=None), "properties.delivery_tag"),
        (raw(content_type="application/x-python-serialize"), "content-type"),
        (raw(content_encoding="binary"), "content-encoding"),
        (raw(headers__task="other.task"), "headers.task"),
        (raw(headers__eta="2026-01-01T00:00:00"), "headers.eta"),
        (raw(headers__compression="application/x-gzip"), "headers.compression"),
        (raw(headers__expires="tomorrow"), "headers.expires"),
        (raw(properties__body_encoding="hex"), "properties.body_encoding"),
        (raw(body="%%%"), "base64"),
        (plain([], {}), "[args, kwargs, embed]"),
        (plain(["x"], {"prompt": "x"}, {}), "args"),
        (plain([], {"kind": "completion", "prompt": "x"}, {"chain": [1]}), "chains"),
        (plain([], {"kind": "completion", "prompt": "x", "wings": 2}, {}), "wings"),
        (plain([], {"kind": "completion", "prompt": "x", "temperature": 9}, {}), "temperature"),
    ],
)
def test_a_malformed_message_is_refused_with_the_field_at_fault(data: bytes, names: str) -> None:
    with pytest.raises(MalformedMessage) as refused:
        decode(data)
    assert names in refused.value.reason


def test_pickle_is_never_loaded() -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("unpickled",))

    body = base64.b64encode(pickle.dumps(Bomb())).decode()
    for content_type in ("application/x-python-serialize", "application/json"):
        with pytest.raises(MalformedMessage):
            decode(raw(body=body, content_type=content_type))


@pytest.mark.parametrize("text", ["2026-11-24T01:00:00Z", "2026-11-24T01:00:00", "2026-11-24T02:00:00+01:00"])
def test_expires_is_a_moment_in_utc_unless_it_says_otherwise(text: str) -> None:
    assert decode(raw(headers__expires=text)).expires_ms == 1_795_482_000_000
