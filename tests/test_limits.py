"""Limits of keys: the buckets against a model, what a job's end settles, and what clients are told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib import resources
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.app import create_app
from api.keyring import Caller
from api.rates import duration
from api.services import Services, build
from api.session import Session
from tests.queue_site import Site
from tests.services import settings_for
from wicore.access.keys import Limits
from wicore.access.store import KeyStore
from wicore.config import QueueSettings
from wicore.errors import RateLimited
from wicore.queue.schema import Keys
from wicore.queue.scripts import _header
from wicore.request import Priority

pytestmark = pytest.mark.valkey

TELL = {"kind": "completion", "prompt": "Tell", "max_tokens": 3}

# --- the buckets ----------------------------------------------------------------------------------

START = 4_000_000_000_000  # in a future, so that no bucket expires by the server's own clock
ACT = """
local client, limits = ARGV[2], cjson.decode(ARGV[3])
if ARGV[4] == 'settle' then
  take(client, 'tokens', tonumber(ARGV[5]), limits.tokens_per_minute)
  return {'spent', levels_of(client, limits)}
end
return spend(client, limits, tonumber(ARGV[5]), false) or {'spent', levels_of(client, limits)}
"""
FIRST_STATEMENT = "local TERMINAL"


def at_a_given_time() -> str:
    """The scripts' own limits, with the clock as an argument."""
    lua = resources.files("wicore.queue") / "lua"
    base, line, limits = ((lua / f"{part}.lua").read_text() for part in ("base", "line", "limits"))
    base = base.replace(FIRST_STATEMENT, f"NOW = tonumber(ARGV[1])\n{FIRST_STATEMENT}", 1)
    return "\n".join((_header(Keys(), QueueSettings()), base, line, limits, ACT))


class Bucket:
    """The textbook's: so many, refilled steadily up to its size; it may come to owe."""

    def __init__(self, size: int, per_minute: int) -> None:
        self.size, self.per_minute = size, per_minute
        self.level = Fraction(size)

    def pass_ms(self, ms: int) -> None:
        self.level = min(Fraction(self.size), self.level + Fraction(ms * self.per_minute, 60_000))

    def short_of(self, amount: int) -> Fraction:
        return min(amount, self.size) - self.level

    def take(self, amount: int) -> None:
        self.level = min(Fraction(self.size), self.level - amount)


rates = st.integers(1, 5000)
steps = st.lists(
    st.tuples(st.integers(0, 90_000), st.sampled_from(["spend", "settle"]), st.integers(0, 6000)), max_size=20
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rates, st.integers(1, 100), rates, steps)
def test_the_buckets_do_what_the_textbooks_do(
    redis_client: redis.Redis, requests: int, burst: int, tokens: int, steps: list[tuple[int, str, int]]
) -> None:
    redis_client.delete("wicore:bucket:c")
    limits = json.dumps({"requests_per_minute": requests, "burst": burst, "tokens_per_minute": tokens})
    text, now = at_a_given_time(), START
    models = {"requests": Bucket(burst, requests), "tokens": Bucket(tokens, tokens)}
    near = Fraction(1, 100)  # thousandths of a ms are kept
    for ms, act, amount in steps:
        now += ms
        for model in models.values():
            model.pass_ms(ms)
        amount = amount if act == "spend" else amount - 3000
        answer: Any = redis_client.eval(text, 0, now, "c", limits, act, amount)
        short = {"requests": models["requests"].short_of(1), "tokens": models["tokens"].short_of(amount)}
        if act == "settle":
            models["tokens"].take(amount)
        elif answer[0] == b"spent":
            assert max(short.values()) < near
            models["requests"].take(1)
            models["tokens"].take(amount)
        else:
            name, wait_ms = answer[1].decode(), answer[3]
            assert short[name] > -near
            assert abs(wait_ms - short[name] * 60_000 / models[name].per_minute) < 1.1
            assert wait_ms >= 0
        for name, size, left, _ in answer[1] if answer[0] == b"spent" else answer[4]:
            model = models[name.decode()]
            assert size == model.size
            assert abs(left - max(0, model.level)) < 1 + near


# --- jobs -----------------------------------------------------------------------------------------

PER_MINUTE = 1000


def tokens_gone(site: Site, client: str = "c") -> int:
    """What is missing from the bucket of tokens now, as if no time had passed since it was filled."""
    full_at = float(site.redis.hget(site.keys.bucket(client), "tokens") or 0)
    seconds, micros = site.redis.time()
    return round(max(0.0, full_at - seconds * 1000 - micros / 1000) * PER_MINUTE / 60_000)


def submit(site: Site, reserve: int = 500, **more: Any) -> str:
    limits = Limits(tokens_per_minute=PER_MINUTE, parallel=2)
    return site.submit(client="c", limits=limits, reserve=reserve, **more).id


def leased(site: Site) -> Any:
    (delivery,) = site.worker().pop(1)
    return delivery


def end_well(site: Site, job: str) -> None:
    delivery = leased(site)
    site.start(delivery)
    assert site.finish(delivery) == 1  # with a usage of two tokens


def fail(site: Site, job: str) -> None:
    delivery = leased(site)
    assert site.finish(delivery, "failed", error={"message": "no", "code": "internal_error"}) == 1


def cancel_waiting(site: Site, job: str) -> None:
    site.producer.cancel(job)


def cancel_lost(site: Site, job: str) -> None:
    leased(site)
    site.producer.cancel(job)
    site.lose_workers()


def expire(site: Site, job: str) -> None:
    site.redis.zadd(site.keys.deadlines, {job: 1})
    site.reap()


def kill_workers(site: Site, job: str) -> None:
    for _ in range(site.settings.max_attempts):
        leased(site)
        site.lose_workers()


ENDS = {end_well: 2, fail: 2, cancel_waiting: 0, cancel_lost: 0, expire: 0, kill_workers: 0}
"""Ways in which a job ends, and the tokens it then has taken: of what never ran, or was lost here, none."""


@pytest.mark.parametrize(("end", "took"), ENDS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_jobs_end_settles_the_tokens_taken_for_it_and_makes_room(
    new_site: Callable[..., Site], end: Callable[[Site, str], None], took: int
) -> None:
    site = new_site(max_attempts=2)
    job = submit(site)
    assert tokens_gone(site) == pytest.approx(500, abs=5)
    end(site, job)
    assert site.types(job)[-1] in ("done", "failed", "cancelled", "expired")
    assert tokens_gone(site) == pytest.approx(took, abs=2)
    submit(site, 0)
    submit(site, 0)
    with pytest.raises(RateLimited, match="2 jobs of this key"):
        submit(site, 0)


def test_what_a_job_took_beyond_its_estimate_is_owed(site: Site) -> None:
    job = submit(site, 1)
    delivery = leased(site)
    site.redis.hset(site.keys.job(job), "reserved", -2000)  # as if it had taken so many more
    site.finish(delivery)
    assert tokens_gone(site) > PER_MINUTE
    with pytest.raises(RateLimited, match="1000 tokens a minute") as caught:
        submit(site, 1)
    assert 59 < (caught.value.retry_after or 0) < 62


def test_a_job_larger_than_the_bucket_goes_when_that_is_full(site: Site) -> None:
    submit(site, 5 * PER_MINUTE)
    with pytest.raises(RateLimited):
        submit(site, 1)


def test_what_is_refused_takes_nothing_and_leaves_no_job(site: Site) -> None:
    submit(site, 900)
    before = site.redis.hgetall(site.keys.bucket("c"))
    with pytest.raises(RateLimited):
        submit(site, 900)
    assert site.redis.hgetall(site.keys.bucket("c")) == before
    assert len(site.jobs()) == 1


def test_a_repeated_submit_takes_once(site: Site) -> None:
    for _ in range(3):
        submit(site, 400, idempotency_key="k")
    assert tokens_gone(site) == pytest.approx(400, abs=5)


# --- what clients are told ------------------------------------------------------------------------


@pytest.fixture
def services(redis_client: Any, valkey_url: str) -> Iterator[Services]:
    services = build(settings_for(valkey_url, engine__kind="null"))
    yield services
    services.relay.close()
    services.redis.close()


@pytest.fixture
def client_with(services: Services) -> Callable[..., FlaskClient]:
    """`client_with(**limits)` is a client whose every call brings a key with these limits."""

    def make(**limits: Any) -> FlaskClient:
        secret = KeyStore(services.redis).create("anna", Limits(**limits))[1]
        client = create_app(services.settings, services).test_client()
        client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {secret}"
        return client

    return make


@pytest.mark.parametrize(
    ("door", "body"), [("/v1/jobs", TELL), ("/v1/tokenize", {"prompt": "a"})], ids=["jobs", "tokenize"]
)
def test_requests_over_the_limit_are_told_when_to_come_back(
    client_with: Callable[..., FlaskClient], door: str, body: Any
) -> None:
    client = client_with(requests_per_minute=6, burst=2)
    first, second, third = (client.post(door, json=body) for _ in range(3))
    assert [a.status_code // 100 for a in (first, second, third)] == [2, 2, 4]
    assert third.status_code == 429
    assert third.json["error"]["code"] == "rate_limited"
    assert third.json["error"]["type"] == "rate_limit_error"
    assert third.headers["Retry-After"] == "10"
    assert [a.headers["X-RateLimit-Remaining-Requests"] for a in (first, second, third)] == ["1", "0", "0"]
    assert first.headers["X-RateLimit-Limit-Requests"] == "2"
    assert first.headers["X-RateLimit-Reset-Requests"] == "10s"
    assert "X-RateLimit-Limit-Tokens" not in first.headers


def test_tokens_are_told_as_prompt_and_output_take_them(client_with: Callable[..., FlaskClient]) -> None:
    client = client_with(tokens_per_minute=600)
    asked = {"kind": "completion", "prompt": [5, 6, 7], "max_tokens": 10, "n": 2}
    answer = client.post("/v1/jobs", json=asked)
    assert int(answer.headers["X-RateLimit-Remaining-Tokens"]) == pytest.approx(600 - 23, abs=2)
    unbounded = client.post("/v1/jobs", json={"kind": "chat", "messages": [{"role": "user", "content": "a"}]})
    assert unbounded.status_code == 202  # not the whole context is taken for it
    assert client.post("/v1/jobs", json=asked | {"max_tokens": 300}).status_code == 429


def test_a_stream_counts_and_tells_too(client_with: Callable[..., FlaskClient]) -> None:
    client = client_with(parallel=1)
    assert client.post("/v1/jobs", json=TELL).status_code == 202
    answer = client.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "2")


def test_a_key_gets_the_highest_level_that_it_may_use(client_with: Callable[..., FlaskClient]) -> None:
    client = client_with(priority="batch")

    def priority(**asked: Any) -> str:
        job = client.post("/v1/jobs", json=TELL | asked).json["id"]
        return str(client.get(f"/v1/jobs/{job}").json["priority"])

    assert [priority(), priority(priority="batch"), priority(priority="background")] == [
        "batch",
        "batch",
        "background",
    ]
    refused = client.post("/v1/jobs", json=TELL | {"priority": "normal"})
    assert (refused.status_code, refused.json["error"]["param"]) == (403, "priority")
    assert "highest, batch" in refused.json["error"]["message"]


def test_a_key_may_use_its_models_alone(client_with: Callable[..., FlaskClient]) -> None:
    client = client_with(models=("other",))
    for door, body in (
        ("/v1/jobs", TELL),
        ("/v1/tokenize", {"prompt": "a"}),
        ("/v1/completions", {"prompt": "a"}),
    ):
        refused = client.post(door, json=body)
        assert (refused.status_code, refused.json["error"]["param"]) == (403, "model")


class Left(OSError):
    """As a socket fails whose client has gone."""


class ScriptedSocket:
    """Sends each command when the one before is answered, then leaves."""

    def __init__(self, *commands: Any) -> None:
        self.sock, self.input_buffer = SimpleNamespace(), []
        self.commands = [json.dumps(command) for command in commands]
        self.frames: list[Any] = []
        self.answered = threading.Semaphore(1)

    def receive(self, timeout: float) -> str:
        assert self.answered.acquire(timeout=10)
        if not self.commands:
            raise Left
        return self.commands.pop(0)

    def send(self, frame: str) -> None:
        self.frames.append(json.loads(frame))
        self.answered.release()

    def close(self, code: int, reason: str) -> None:
        self.frames.append(code)


def converse(services: Services, caller: Caller, *commands: Any) -> list[Any]:
    ws = ScriptedSocket(*commands)
    with pytest.raises(Left):
        Session(ws, services, lambda: False, "request", caller).run()
    return ws.frames


def test_a_socket_submits_under_the_same_limits_and_sees_its_own_jobs_alone(services: Services) -> None:
    anna = Caller("anna", True, Limits(requests_per_minute=1, priority="normal"))
    ben = Caller("ben", True)
    high = {"type": "submit", **TELL, "priority": "interactive"}
    frames = converse(services, anna, high, {"type": "submit", **TELL}, {"type": "submit", **TELL})
    assert [frame.get("error", {}).get("code") for frame in frames] == ["forbidden", None, "rate_limited"]
    job = frames[1]["job"]
    assert services.record(job, anna).priority is Priority.NORMAL
    for command in ("resume", "cancel"):
        (refused,) = converse(services, ben, {"type": command, "job": job})
        assert refused["error"]["code"] == "unknown_job"
    assert services.record(job, anna).status == "queued"


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0, "0ms"), (999, "999ms"), (1000, "1s"), (1500, "1.5s"), (360_000, "6m0s"), (61_999, "1m1s")],
)
def test_durations_are_written_as_openai_writes_them(ms: int, text: str) -> None:
    assert duration(ms) == text
