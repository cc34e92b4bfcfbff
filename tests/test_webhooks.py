"""Webhooks: what is sent, to whom, how often, and what the record says afterwards."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import openai
import pytest

from tests.queue_site import Site
from tests.receiver import Receiver, receiver
from wicore.config import WebhookSettings, load_settings
from wicore.errors import ConfigError, EngineError, InvalidRequest
from wicore.queue.producer import JobRecord
from wicore.request import Priority, parse_job
from wicore.webhooks.message import check_webhook, is_public, wait_s
from wicore.webhooks.outbox import Outbox
from wicore.webhooks.post import PostError, post

SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
valkey = pytest.mark.valkey


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as there:
        yield there


def outbox(site: Site, **settings: Any) -> Outbox:
    given = {"secret": SECRET, "allow_private": True, **settings}
    return Outbox(site.redis, queue=site.settings, settings=WebhookSettings(**given))


def submit(site: Site, url: str, **more: Any) -> str:
    body = {"kind": "completion", "prompt": "Once", "webhook_url": url}
    return site.producer.submit(parse_job(body), Priority.NORMAL, **more).id


def ended(site: Site, url: str) -> str:
    """A job that succeeded."""
    job = submit(site, url)
    (delivery,) = site.worker().pop(1)
    site.start(delivery)
    site.finish(delivery)
    return job


def make_due(site: Site, job: str) -> None:
    """As if the time until the next attempt had passed."""
    assert site.redis.zadd(site.keys.webhooks, {job: 1}, xx=True, ch=True)


def record(site: Site, job: str) -> JobRecord:
    return site.producer.record(job)


def is_owed(site: Site, job: str) -> bool:
    return site.redis.zscore(site.keys.webhooks, job) is not None


# --- what is sent -------------------------------------------------------------------------------


@valkey
def test_openais_client_accepts_the_signature_and_the_record_says_delivered(
    site: Site, hook: Receiver
) -> None:
    job = ended(site, hook.url)
    assert record(site, job).webhook_status == "pending"
    assert outbox(site).deliver(job) is None
    sent = hook.next()
    with openai.OpenAI(api_key="none", webhook_secret=SECRET) as client:
        event = client.webhooks.unwrap(sent.body, sent.headers)
        assert event.type == "job.succeeded"
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.verify_signature(sent.body + b" ", sent.headers)
    message = json.loads(sent.body)
    assert message["id"] == sent.headers["webhook-id"]
    assert message["created_at"] == record(site, job).finished_ms // 1000
    assert message["data"]["id"] == job
    assert message["data"]["result"] == record(site, job).result
    assert sent.headers["content-type"] == "application/json"
    assert (record(site, job).webhook_status, record(site, job).webhook_error) == ("delivered", None)
    assert not is_owed(site, job)


def succeed(site: Site, delivery: Any) -> None:
    site.finish(delivery)


def fail(site: Site, delivery: Any) -> None:
    site.finish(delivery, "failed", error=EngineError("gone").body())


def cancel(site: Site, delivery: Any) -> None:
    site.producer.cancel(delivery.job_id)
    site.finish(delivery, "cancelled")


def expire(site: Site, delivery: Any) -> None:
    site.finish(delivery, "expired")


@valkey
@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (succeed, "job.succeeded"),
        (fail, "job.failed"),
        (cancel, "job.cancelled"),
        (expire, "job.expired"),
    ],
)
def test_every_end_of_a_job_is_told(
    site: Site, hook: Receiver, end: Callable[[Site, Any], None], kind: str
) -> None:
    job = submit(site, hook.url)
    (delivery,) = site.worker().pop(1)
    end(site, delivery)
    outbox(site).deliver(job)
    assert json.loads(hook.next().body)["type"] == kind


@valkey
def test_a_job_cancelled_while_it_waits_is_told(site: Site, hook: Receiver) -> None:
    job = submit(site, hook.url)
    site.producer.cancel(job)
    outbox(site).deliver(job)
    assert json.loads(hook.next().body)["type"] == "job.cancelled"


@valkey
def test_a_job_without_a_webhook_owes_none_and_leaves_no_message(site: Site) -> None:
    site.submit()
    (delivery,) = site.worker().pop(1)
    site.finish(delivery)
    assert site.redis.zcard(site.keys.webhooks) == site.redis.llen(site.keys.tasks) == 0


@valkey
def test_the_messages_for_tasks_that_nobody_takes_are_bounded(site: Site) -> None:
    site.redis.rpush(site.keys.tasks, *["x"] * 999)
    jobs = [submit(site, "https://there.example") for _ in range(3)]
    for job in jobs:
        site.producer.cancel(job)
    assert site.redis.llen(site.keys.tasks) == 1000
    assert site.redis.zcard(site.keys.webhooks) == 3


# --- how often ----------------------------------------------------------------------------------


@valkey
def test_it_is_tried_again_under_the_same_id_until_it_is_taken(site: Site, hook: Receiver) -> None:
    hook.answers = [(500, {}), (302, {"location": hook.url + "-other"}), (503, {})]
    job = ended(site, hook.url)
    box = outbox(site)
    assert box.deliver(job) == 5.0
    assert record(site, job).webhook_error == "answered 500"
    assert box.deliver(job) is None, "it is not due"
    for wait in (25.0, 125.0, None):
        make_due(site, job)
        assert box.deliver(job) == wait
    sent = [hook.next() for _ in range(4)]
    assert hook.received.empty()
    assert len({(request.headers["webhook-id"], request.body, request.path) for request in sent}) == 1
    assert record(site, job).webhook_status == "delivered"


@valkey
def test_it_is_given_up_after_the_last_attempt(site: Site, hook: Receiver) -> None:
    hook.answers = [(500, {})] * 2
    job = ended(site, hook.url)
    box = outbox(site, max_attempts=2)
    box.deliver(job)
    make_due(site, job)
    assert box.deliver(job) is None
    told = record(site, job)
    assert (told.webhook_status, told.webhook_error) == ("failed", "answered 500, in attempt 2")
    assert not is_owed(site, job)


@valkey
def test_a_server_that_is_gone_for_good_is_asked_once(site: Site, hook: Receiver) -> None:
    hook.answers = [(410, {})]
    job = ended(site, hook.url)
    assert outbox(site).deliver(job) is None
    assert record(site, job).webhook_status == "failed"


@valkey
@pytest.mark.parametrize(
    ("answer", "least", "most"),
    [
        ("90", 90, 90),
        (lambda: formatdate(time.time() + 100, usegmt=True), 95, 100),
        ("1", 5, 5),
        ("soon", 5, 5),
        ("99999999999999", 43_000, 86_400),
    ],
    ids=["seconds", "a date", "less than the schedule", "nonsense", "for ever"],
)
def test_the_server_may_ask_for_a_later_attempt(
    new_site: Callable[..., Site], hook: Receiver, answer: Any, least: float, most: float
) -> None:
    site = new_site(retention_s=10 * 86_400)
    hook.answers = [(429, {"retry-after": answer if isinstance(answer, str) else answer()})]
    wait = outbox(site).deliver(ended(site, hook.url))
    assert wait is not None
    assert least <= wait <= most


@valkey
def test_it_is_given_up_before_the_record_goes(new_site: Callable[..., Site], hook: Receiver) -> None:
    site = new_site(retention_s=4)
    hook.answers = [(500, {})]
    job = ended(site, hook.url)
    assert outbox(site).deliver(job) is None
    told = record(site, job)
    assert told.webhook_status == "failed"
    assert "queue.retention_s" in (told.webhook_error or "")
    assert not is_owed(site, job)


@valkey
def test_a_record_that_has_gone_takes_its_entry_along(site: Site) -> None:
    site.redis.zadd(site.keys.webhooks, {"gone": 1})
    assert outbox(site).deliver("gone") is None
    assert not is_owed(site, "gone")
    assert not site.redis.exists(site.keys.job("gone"))


@valkey
def test_one_attempt_holds_others_off_and_only_the_last_has_a_say(site: Site) -> None:
    job = ended(site, "https://there.example")

    def end(attempt: int, outcome: str) -> bytes:
        return site.scripts.call("webhook_end", job, attempt, outcome, "why", 5000)

    assert site.scripts.call("webhook", job, 60_000)[0] == 1
    assert site.scripts.call("webhook", job, 60_000) is None
    make_due(site, job)  # the claim ran out while the first attempt still waits
    assert site.scripts.call("webhook", job, 60_000)[0] == 2
    assert end(1, "failed") == b""
    assert record(site, job).webhook_status == "pending"
    assert end(2, "delivered") == b"delivered"
    assert end(2, "retry") == end(1, "retry") == b""
    assert record(site, job).webhook_status == "delivered"
    assert not is_owed(site, job)


@valkey
def test_the_sweep_finds_what_is_overdue_and_nothing_else(site: Site, hook: Receiver) -> None:
    box = outbox(site)
    late, fresh = ended(site, hook.url), ended(site, hook.url)
    make_due(site, late)
    assert box.overdue(10) == [late]
    assert is_owed(site, fresh)


def test_the_waits_grow_to_half_an_hour() -> None:
    waits = [wait_s(attempt, WebhookSettings()) for attempt in range(1, 8)]
    assert waits == [5, 25, 125, 625, 1800, 1800, 1800]


# --- to whom ------------------------------------------------------------------------------------


def send(url: str, *, allow_private: bool = True, timeout_s: float = 10.0) -> int:
    return post(url, {}, b"{}", allow_private=allow_private, timeout_s=timeout_s).status


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("ff02::1", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) == public


def test_a_name_that_means_a_private_address_is_refused_by_default(hook: Receiver) -> None:
    with pytest.raises(PostError, match=r"not a public address; webhooks\.allow_private") as caught:
        send(hook.url.replace("127.0.0.1", "localhost"), allow_private=False)
    assert caught.value.final
    assert hook.received.empty()


def test_the_address_that_was_checked_is_the_one_that_is_connected(
    hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that means another address when it is asked for a second time is never asked."""
    look_up, asked = socket.getaddrinfo, []

    def answer(host: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(host)
        return look_up("127.0.0.1" if host == "rebound.example" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    assert send(hook.url.replace("127.0.0.1", "rebound.example")) == 204
    assert asked.count("rebound.example") == 1
    assert hook.next().headers["Host"].startswith("rebound.example:")


def test_no_proxy_is_asked(hook: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert send(hook.url) == 204


def test_a_redirect_is_not_followed(hook: Receiver) -> None:
    hook.answers = [(307, {"location": hook.url})]
    assert send(hook.url) == 307
    hook.next()
    assert hook.received.empty()


def test_a_server_that_answers_byte_by_byte_is_left_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                for _ in range(60):
                    if stop.wait(0.05):
                        break
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        break

        thread = threading.Thread(target=drip)
        thread.start()
        started = time.monotonic()
        with pytest.raises(PostError, match=r"no answer within 0\.3 s"):
            send(f"http://127.0.0.1:{server.getsockname()[1]}/", timeout_s=0.3)
        assert time.monotonic() - started < 2
        stop.set()
        thread.join()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "http://no-such-name.invalid/"])
def test_a_server_that_cannot_be_reached_may_be_there_later(url: str) -> None:
    with pytest.raises(PostError, match="no answer") as caught:
        send(url)
    assert not caught.value.final


# --- what is accepted ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://there.example", "http or https"),
        ("there.example/hook", "http or https"),
        ("http://", "http or https"),
        (17, "valid string"),
        ("https://me:secret@there.example", "user or password"),
        ("https://there.example/" + "x" * 2048, "at most 2048"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_url_that_is_none_is_refused_by_name(url: Any, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as caught:
        parse_job({"kind": "completion", "prompt": "x", "webhook_url": url})
    assert caught.value.param == "webhook_url"


def test_a_url_is_kept_in_ascii_and_survives_the_queue() -> None:
    body = parse_job({"kind": "completion", "prompt": "x", "webhook_url": "https://bücher.example/ä?b=c"})
    assert body.webhook_url == "https://xn--bcher-kva.example/%C3%A4?b=c"
    assert parse_job(body.wire()) == body


@pytest.mark.parametrize(
    ("url", "settings", "told"),
    [
        ("https://there.example", {}, r"webhooks\.secret"),
        ("http://127.0.0.1/x", {"secret": SECRET}, r"webhooks\.allow_private"),
        ("http://[::1]:80/x", {"secret": SECRET}, r"webhooks\.allow_private"),
    ],
)
def test_a_webhook_that_could_not_be_delivered_is_refused(
    url: str, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidRequest, match=told) as caught:
        check_webhook(url, WebhookSettings(**settings))
    assert caught.value.param == "webhook_url"
    check_webhook(url, WebhookSettings(secret=SECRET, allow_private=True))


@pytest.mark.parametrize("secret", ["letmein", "whsec_", "whsec_short", "whsec_" + "!" * 32, SECRET + "A"])
def test_a_bad_secret_is_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(ConfigError, match=r"webhooks\.secret") as caught:
        load_settings(environ={}, overrides={"webhooks.secret": secret})
    assert caught.value.message.startswith("webhooks.secret: *** is not allowed")
    assert secret == "whsec_" or secret not in caught.value.message
