"""The examples for other systems, each run as it stands, and the page that explains them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.services import ROOT, settings_for, worker_process
from wicore.queue.connection import connect
from wicore.queue.embedded import EmbeddedValkey
from wicore.queue.producer import JobRecord, Producer
from wicore.queue.schema import Keys
from wicore.request import Priority, parse_job, terminal_event, token_event

pytestmark = pytest.mark.valkey
EXAMPLES = ROOT / "examples"
ALONE = """
import runpy, sys
sys.modules.update(wicore=None, workers=None, api=None)  # importing these fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PROMPT = 'Once "upon" a \\ tíme'
TOKENS = 24
PATIENCE_S = 60


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, valkey_server: EmbeddedValkey) -> Iterator[str]:
    """A server on TCP with a worker process on the tiny model, as others find them."""
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey"), port=0, appendonly=False) as server:
        worker = worker_process(settings_for(server.url))
        yield server.url
        worker.terminate()
        assert worker.wait(PATIENCE_S) == 0


@pytest.fixture
def client(url: str) -> Iterator[redis.Redis]:
    client = connect(url)
    yield client
    client.close()


@pytest.fixture
def run(url: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            env={**os.environ, "REDIS_URL": url},
            timeout=PATIENCE_S,
            check=True,
            capture_output=True,
            text=True,
            **options,
        )

    return run


@pytest.fixture
def python(run: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a Python file where no part of WiCore can be imported."""
    return lambda *command: run(sys.executable, "-I", "-c", ALONE, *command)


_NO_REGISTRY = (
    r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ERR_SOCKET_TIMEOUT|\bE(401|403|407|5\d\d)\b"
)


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Node.js example beside the packages that its lock file names."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.lstrip("v").split(".")[0]) < 18:
        pytest.skip(f"node is {version.strip()}; the example needs 18")
    folder = tmp_path_factory.mktemp("node") / "client"
    shutil.copytree(EXAMPLES / "node", folder)
    fetch = ["npm", "ci", "--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=20000"]
    try:
        fetched = subprocess.run(fetch, cwd=folder, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        pytest.skip("npm gets no answer from its registry")
    if fetched.returncode and re.search(_NO_REGISTRY, fetched.stderr):
        pytest.skip("npm cannot reach its registry")
    assert fetched.returncode == 0, fetched.stderr
    return folder / "client.mjs"


def newest(client: redis.Redis, offset: int = 0) -> JobRecord:
    return Producer(client).list()[offset]


def text_of(record: JobRecord) -> str:
    assert record.result is not None
    return str(record.result["choices"][0]["text"])


def events_of(client: redis.Redis, job: str) -> list[dict[str, Any]]:
    return [json.loads(fields[b"event"]) for _, fields in client.xrange(f"wicore:log:{job}")]


def test_where_the_python_examples_run_wicore_cannot_be_imported(
    python: Callable[..., Any], tmp_path: Path
) -> None:
    for module in ("wicore", "wicore.request", "workers.worker", "api"):
        (tmp_path / "probe.py").write_text(f"import {module}")
        with pytest.raises(subprocess.CalledProcessError) as caught:
            python(tmp_path / "probe.py")
        assert "ModuleNotFoundError" in caught.value.stderr


def test_celery_gets_the_text_and_the_error(python: Callable[..., Any], client: redis.Redis) -> None:
    ran = python(EXAMPLES / "celery_client.py", PROMPT, TOKENS)
    revoked, refused, done = (newest(client, offset) for offset in range(3))
    assert ran.stdout == text_of(done) + "\n"
    assert done.usage is not None
    assert done.usage["completion_tokens"] == TOKENS
    assert refused.error is not None
    assert ran.stderr == f"InvalidRequest: {refused.error['message']}\nrevoked\n"
    assert revoked.status == "cancelled"
    assert "temperature" in ran.stderr


def stream_and_resume(
    run_client: Callable[..., subprocess.CompletedProcess[str]], client: redis.Redis
) -> None:
    """A streaming client prints the whole text, and on coming back the rest of it."""
    ran = run_client(PROMPT, TOKENS)
    record = newest(client)
    job, usage = ran.stderr.splitlines()
    assert job == record.id
    assert ran.stdout == text_of(record) + "\n"
    assert json.loads(usage.replace("'", '"')) == record.usage
    assert record.priority.name == "NORMAL"

    rest = "".join(event["text"] for event in events_of(client, job) if event["seq"] > 9 and "text" in event)
    assert 0 < len(rest) < len(text_of(record))
    assert run_client("--resume", job, 9).stdout == rest + "\n"


def test_a_redis_client_streams_the_text_and_resumes_it(
    python: Callable[..., Any], client: redis.Redis
) -> None:
    stream_and_resume(lambda *args: python(EXAMPLES / "redis_client.py", *args), client)


def test_a_node_client_streams_the_text_and_resumes_it(
    run: Callable[..., Any], client: redis.Redis, node_client: Path
) -> None:
    stream_and_resume(lambda *args: run("node", node_client, *args), client)


def test_a_shell_gets_every_event_and_the_result(run: Callable[..., Any], client: redis.Redis) -> None:
    if shutil.which("valkey-cli") is None and shutil.which("redis-cli") is None:
        pytest.skip("neither valkey-cli nor redis-cli is installed")
    job, *events, result = run("sh", EXAMPLES / "shell.sh", PROMPT, TOKENS).stdout.splitlines()
    assert [json.loads(event) for event in events] == events_of(client, job)
    assert json.loads(result)["result"] == newest(client).result
    assert newest(client).id == job


@pytest.fixture(params=["python", "node"])
def follow(request: pytest.FixtureRequest, url: str) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a client that follows a job from its first event, in each language."""
    if request.param == "node":
        command = ["node", request.getfixturevalue("node_client")]
    else:
        command = [sys.executable, "-I", "-c", ALONE, EXAMPLES / "redis_client.py"]
    followers = []

    def start(job: str) -> subprocess.Popen[bytes]:
        arguments = [str(part) for part in (*command, "--resume", job, 0)]
        environ = {**os.environ, "REDIS_URL": url}
        followers.append(subprocess.Popen(arguments, env=environ, stdout=subprocess.PIPE))
        return followers[-1]

    yield start
    for follower in followers:
        follower.kill()
        with follower:
            pass


def printed(follower: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """What it prints, piece by piece as it comes."""
    assert follower.stdout is not None
    while piece := os.read(follower.stdout.fileno(), 2**16):
        yield piece
    assert follower.wait(PATIENCE_S) == 0


def test_a_stream_whose_subscription_is_cut_again_and_again_loses_nothing(
    client: redis.Redis, follow: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    body = parse_job({"kind": "completion", "prompt": "Once", "max_tokens": 800, "ignore_eos": True})
    job = Producer(client).submit(body, Priority.NORMAL).id
    text, cuts = b"", 0
    for piece in printed(follow(job)):
        text += piece
        cuts += int(client.client_kill_filter(_type="pubsub"))
    assert text.decode() == text_of(Producer(client).record(job)) + "\n"
    assert cuts >= 2


def test_what_the_channel_lost_comes_from_the_log(
    client: redis.Redis, follow: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    keys = Keys()
    job = str(uuid.uuid4())

    def write(event: dict[str, Any], *, heard: bool) -> None:
        client.xadd(keys.log(job), {"event": json.dumps(event)}, id=f"0-{event['seq']}")
        if heard:
            client.publish(keys.events(job), json.dumps(event))

    follower = follow(job)
    deadline = time.monotonic() + PATIENCE_S
    while not client.pubsub_numsub(keys.events(job))[0][1]:
        assert time.monotonic() < deadline
    client.set(keys.celery_result(job), json.dumps({"status": "SUCCESS", "result": {"usage": {}}}))
    pieces = printed(follower)
    write(token_event(job, 1, 0, "once ", [1]), heard=True)
    assert next(pieces) == b"once "
    write(token_event(job, 2, 0, "upon ", [2]), heard=False)
    write(token_event(job, 3, 0, "a time", [3]), heard=True)
    write(terminal_event(job, 4, "done"), heard=True)
    assert b"".join(pieces) == b"upon a time\n"


# --- the page -------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "integration.md").read_text()
BLOCKS = re.findall(r"(?:<!-- (\S+) -->\n)?```(\w+)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("source", "language", "code"), BLOCKS)
def test_the_code_on_the_page_is_the_code_that_runs(source: str, language: str, code: str) -> None:
    assert source, f"this {language} block does not say which example it is from"
    assert code in (ROOT / source).read_text()


def test_the_page_names_every_example() -> None:
    files = {path for path in EXAMPLES.rglob("*") if path.suffix in {".py", ".mjs", ".sh"}}
    assert {source for source, _, _ in BLOCKS} == {str(path.relative_to(ROOT)) for path in files}
    for path in files:
        assert f"(../{path.relative_to(ROOT)})" in PAGE
