"""Messages that were given up: listed, shown, tried again, thrown away."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from flask.testing import FlaskClient
from werkzeug.serving import make_server

from api.app import create_app
from api.services import build
from tests.messages import message, pushed
from tests.queue_site import Site, ids
from tests.services import settings_for
from wicore.cli import main
from wicore.errors import InvalidRequest, QueueFull, UnknownDeadLetter
from wicore.exit_codes import ExitCode
from wicore.queue.dead import DeadLetters
from wicore.request import Priority

pytestmark = pytest.mark.valkey


@pytest.fixture
def dead(site: Site) -> DeadLetters:
    return DeadLetters(site.redis, settings=site.settings)


def lose(site: Site, *jobs: str) -> None:
    """Let every worker that takes these jobs die, until they are given up."""
    for attempt in range(site.settings.max_attempts * len(jobs)):
        site.worker(f"lost{attempt}").pop(len(jobs))
        site.lose_workers()
    assert {site.producer.record(job).status for job in jobs} == {"failed"}


def bury_garbage(site: Site, *texts: bytes) -> None:
    for text in texts:
        site.redis.lpush("wicore", text)
        assert site.worker().pop(1) == []


def test_a_letter_says_what_was_given_up_and_why(site: Site, dead: DeadLetters) -> None:
    job = site.submit(Priority.BATCH, text="How é began").id
    lose(site, job)
    (letter,) = dead.list()
    assert (letter.job, letter.priority, letter.truncated) == (job, Priority.BATCH, False)
    assert "3 attempts" in letter.reason
    assert letter.id.startswith(f"{letter.at_ms}-")
    assert dead.get(letter.id) == letter
    assert "How é began" in letter.message


def test_bytes_that_are_no_text_are_kept(site: Site, dead: DeadLetters) -> None:
    bury_garbage(site, b'\xff\x00,"message":"x')
    (letter,) = dead.list()
    assert letter.job is None
    assert letter.message.encode("latin-1") == b'\xff\x00,"message":"x'


def test_a_large_message_is_cut_in_a_listing_and_whole_when_asked_for(site: Site, dead: DeadLetters) -> None:
    large = '\x01é\\"'.encode() * 500_000
    bury_garbage(site, large)
    (letter,) = dead.list()
    assert letter.truncated
    assert 1000 < len(letter.message.encode()) <= 4000
    assert large.startswith(letter.message.encode())
    assert dead.get(letter.id).message.encode() == large


@pytest.mark.parametrize("cut", range(40))
def test_a_listing_cuts_no_character_and_no_escape_in_two(
    site: Site, dead: DeadLetters, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    raw = 'a\x01é\\"\n\U0001f600\\u00zz'.encode()
    bury_garbage(site, raw)
    monkeypatch.setattr("wicore.queue.dead._EXCERPT", cut)
    (letter,) = dead.list()
    assert raw.startswith(letter.message.encode())
    assert letter.truncated == (letter.message.encode() != raw)
    assert len(letter.message.encode()) >= (cut - 5) / 6


def test_pages_hold_every_letter_once_newest_first_although_some_go_meanwhile(
    site: Site, dead: DeadLetters
) -> None:
    bury_garbage(site, *(b"garbage %d" % i for i in range(10)))
    first = dead.list(4)
    dead.drop(first[-1].id)
    dead.drop(dead.list()[-1].id)
    bury_garbage(site, b"newer")
    rest = dead.list(100, after=first[-1].id)
    assert [letter.message for letter in first + rest] == [f"garbage {i}" for i in range(9, 0, -1)]


def test_the_list_is_bounded_and_the_oldest_go(site: Site, dead: DeadLetters) -> None:
    bury_garbage(site, b"oldest")
    oldest = dead.list()[0].id
    site.redis.lpush("wicore", *(b"%d" % i for i in range(10_000)))
    while sum(site.producer.depths().values()):
        site.worker().pop(1)
    assert site.redis.llen(site.keys.dead) == 10_000
    with pytest.raises(UnknownDeadLetter):
        dead.get(oldest)
    last = dead.list(100, after=dead.list(100)[-1].id)[-1]
    assert last.message == "9800"


def test_a_retry_is_a_new_job_with_the_same_body_at_the_old_priority(site: Site, dead: DeadLetters) -> None:
    site.redis.lpush(
        site.keys.queue(Priority.BATCH),
        pushed("old", prompt="Once", timeout_s=60, metadata={"a": "b"}, seed=4),
    )
    lose(site, "old")
    (letter,) = dead.list()
    retried = dead.retry(letter.id)
    assert retried.created
    assert dead.list() == []
    record = site.producer.record(retried.id)
    assert (record.retry_of, record.status, record.metadata) == (letter.id, "queued", {"a": "b"})
    (delivery,) = site.worker("sound").pop(1)
    assert (delivery.job_id, delivery.level, delivery.attempt) == (retried.id, Priority.BATCH, 1)
    assert (delivery.body.prompt, delivery.body.seed) == ("Once", 4)
    assert delivery.deadline_ms is not None
    assert delivery.deadline_ms > delivery.popped_ms + 50_000
    assert site.finish(delivery) == 1
    assert site.types("old")[-1] == "failed"


def test_a_retry_that_crashed_before_the_letter_went_gives_the_same_job(
    site: Site, dead: DeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = site.submit().id
    lose(site, job)
    (letter,) = dead.list()

    def crash(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DeadLetters, "_remove", crash)
        with pytest.raises(KeyboardInterrupt):
            dead.retry(letter.id)
    assert dead.list() == [letter]
    again = dead.retry(letter.id)
    assert not again.created
    assert dead.list() == []
    assert dead.retry(letter.id).id == again.id
    assert ids(site.worker("sound").pop(5)) == [again.id]


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"garbage", "not JSON"),
        (pushed("bad", temperature=17), "temperature"),
        (json.dumps(message(headers__id="bad", headers__task="other")).encode(), "headers.task"),
    ],
)
def test_what_holds_no_job_is_not_tried_again_and_stays(
    site: Site, dead: DeadLetters, raw: bytes, why: str
) -> None:
    bury_garbage(site, raw)
    (letter,) = dead.list()
    with pytest.raises(InvalidRequest, match=why):
        dead.retry(letter.id)
    assert dead.list() == [letter]
    assert sum(site.producer.depths().values()) == 0


def test_a_letter_stays_when_the_queue_is_full(new_site: Callable[..., Site]) -> None:
    site = new_site(max_jobs=1)
    dead = DeadLetters(site.redis, settings=site.settings)
    lose(site, site.submit().id)
    waiting = site.submit()
    (letter,) = dead.list()
    with pytest.raises(QueueFull):
        dead.retry(letter.id)
    assert dead.list() == [letter]
    assert ids(site.worker().pop(5)) == [waiting.id]


def test_a_dropped_letter_is_gone_and_no_other(site: Site, dead: DeadLetters) -> None:
    bury_garbage(site, b"same", b"same", b"same")
    newest, middle, oldest = dead.list()
    dead.drop(middle.id)
    assert dead.list() == [newest, oldest]
    for unknown in (middle.id, "1-1", "nonsense", "1-1-1", f"{newest.id}0"):
        for act in (dead.get, dead.retry, dead.drop):
            with pytest.raises(UnknownDeadLetter):
                act(unknown)
    assert dead.drop_all() == 2
    assert dead.list() == []
    bury_garbage(site, b"same")
    assert dead.list()[0].id not in {newest.id, middle.id, oldest.id}


# --- doors and commands ---------------------------------------------------------------------------


@pytest.fixture
def app(redis_client: redis.Redis, valkey_url: str) -> Iterator[Any]:
    services = build(settings_for(valkey_url))
    yield create_app(services.settings, services)
    services.relay.close()
    services.redis.close()


@pytest.fixture
def client(app: Any) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def wicore(app: Any) -> Iterator[Callable[..., Any]]:
    """Runs `wicore dead ...` against the service."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    yield lambda *args: CliRunner().invoke(main, ["dead", args[0], "--url", url, *args[1:]])
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_doors_list_show_retry_and_drop(site: Site, client: FlaskClient) -> None:
    lose(site, site.submit(Priority.BACKGROUND).id)
    bury_garbage(site, b"garbage")
    page = client.get("/v1/dead?limit=1").json
    assert (page["object"], page["has_more"]) == ("list", True)
    garbage = page["data"][0]
    (lost,) = client.get(f"/v1/dead?after={garbage['id']}").json["data"]
    assert (garbage["job"], garbage["message"], lost["priority"]) == (None, "garbage", "background")
    assert client.get(f"/v1/dead/{lost['id']}").json == lost

    answer = client.post(f"/v1/dead/{lost['id']}/retry")
    job = answer.json["id"]
    assert (answer.status_code, answer.headers["Location"]) == (202, f"/v1/jobs/{job}")
    assert client.get(f"/v1/jobs/{job}").json["retry_of"] == lost["id"]
    refused = client.post(f"/v1/dead/{garbage['id']}/retry")
    assert (refused.status_code, refused.json["error"]["code"]) == (400, "invalid_request")

    assert client.delete(f"/v1/dead/{garbage['id']}").json["dropped"] is True
    gone = client.delete(f"/v1/dead/{garbage['id']}")
    assert (gone.status_code, gone.json["error"]["code"]) == (404, "unknown_dead_letter")
    assert client.get("/v1/dead").json == {"object": "list", "data": [], "has_more": False}


def test_a_bad_page_is_refused(client: FlaskClient) -> None:
    for query, param in (("after=nonsense", "after"), ("limit=0", "limit"), ("limit=101", "limit")):
        answer = client.get(f"/v1/dead?{query}")
        assert (answer.status_code, answer.json["error"]["param"]) == (400, param)


def test_the_command_lists_over_pages_shows_retries_and_drops(site: Site, wicore: Callable[..., Any]) -> None:
    job = site.submit().id
    lose(site, job)
    bury_garbage(site, *(b"garbage %d" % i for i in range(120)))
    lines = wicore("list").stdout.splitlines()
    assert len(lines) == 121
    assert [len(wicore("list", "--limit", str(n)).stdout.splitlines()) for n in (1, 100, 101)] == [
        1,
        100,
        101,
    ]
    assert all(part in lines[-1] for part in (job, "normal", "3 attempts"))
    newest, lost = (line.split()[0] for line in (lines[0], lines[-1]))
    assert json.loads(wicore("show", newest).stdout)["message"] == "garbage 119"

    retried = wicore("retry", lost).stdout.strip()
    assert site.producer.record(retried).retry_of == lost
    refused = wicore("retry", newest)
    assert (refused.exit_code, "not JSON" in refused.stderr) == (ExitCode.REFUSED, True)
    assert wicore("drop", newest).exit_code == ExitCode.OK
    assert wicore("show", newest).exit_code == ExitCode.REFUSED
    assert wicore("drop", "--all").stdout == "dropped 119\n"
    assert wicore("list").stdout == ""


def test_retrying_all_leaves_what_holds_no_job(site: Site, wicore: Callable[..., Any]) -> None:
    jobs = [site.submit().id for _ in range(2)]
    lose(site, *jobs)
    bury_garbage(site, b"garbage")
    result = wicore("retry", "--all")
    assert result.exit_code == ExitCode.FAILED
    assert set(result.stdout.split()) == set(ids(site.worker("sound").pop(5)))
    assert "not JSON" in result.stderr
    assert [entry["message"] for entry in site.dead()] == ["garbage"]


def test_retry_and_drop_want_one_letter_or_all(wicore: Callable[..., Any]) -> None:
    for command in ("retry", "drop"):
        assert wicore(command).exit_code == ExitCode.USAGE
        assert wicore(command, "1-1", "--all").exit_code == ExitCode.USAGE
