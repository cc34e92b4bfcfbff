"""`python -m tests.fuzz --seconds N`: schemathesis with all its checks against API, worker and Valkey."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.fuzz.hooks import FILE
from tests.seeing import SEEING
from tests.services import settings_for, start_api, stop, worker_process
from tests.waiting import free_port, until
from wicore.config import Settings
from wicore.queue.codec import encode
from wicore.queue.connection import connect
from wicore.queue.embedded import EmbeddedValkey
from wicore.request import JobBody, Priority

HERE = Path(__file__).parent
CONTEXT = 256
"""So short that no request takes long, whatever it asks for."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=1200, help="how long to send requests")
    parser.add_argument("--seed", type=int, help="of the requests; drawn and printed if unset")
    options, more = parser.parse_known_args()
    folder = tempfile.mkdtemp(prefix="wicore-")
    server = EmbeddedValkey(folder)
    server.start()
    try:
        return run(server.url, options.seconds, options.seed, more)
    finally:
        server.stop()
        shutil.rmtree(folder)


def run(url: str, seconds: int, seed: int | None, more: Sequence[str] = ()) -> int:
    """Start API and worker on the empty Redis at `url`, and run schemathesis; its exit status.

    `more` goes to schemathesis.
    """
    settings = settings_for(
        url,
        api__port=free_port(),
        model__path=str(SEEING),
        model__name="tiny",
        model__max_context=CONTEXT,
        telemetry__access_log=False,
    )
    worker = worker_process(settings)
    try:
        api = start_api(settings)
        try:
            with dead_letters(url):
                return fuzz(settings, seconds, seed, more)
        finally:
            stop(api)
    finally:
        stop(worker)


@contextmanager
def dead_letters(url: str) -> Iterator[None]:
    """Meanwhile dead letters come, a few a second: half hold no job, half one that can be tried again."""
    done = threading.Event()

    def send() -> None:
        client = connect(url)
        body = JobBody(kind="completion", prompt="Once", max_tokens=4)
        for i in itertools.count():
            # The first makes the job; the id is taken from then on.
            again = encode(body, job_id="taken", tag=f"tag-{i}", priority=Priority.NORMAL)
            client.lpush("wicore", f"no message {i}", again)
            if done.wait(0.3):
                break
        client.close()

    sender = threading.Thread(target=send)
    sender.start()
    yield
    done.set()
    sender.join()


def fuzz(settings: Settings, seconds: int, seed: int | None, more: Sequence[str]) -> int:
    """Run schemathesis; its exit status."""
    url = f"http://127.0.0.1:{settings.api.port}"
    until(lambda: httpx.get(f"{url}/ready", timeout=20).status_code == 200, "the service was ready")
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "--no-color",
        "--config-file",
        str(HERE / "schemathesis.toml"),
    ]
    command += ["run", f"{url}/openapi.json", "--max-time", str(seconds)]
    # Websockets speak no HTTP after their handshake.
    command += ["--exclude-path-regex", "/stream$", *more]
    if seed is not None:
        command += ["--seed", str(seed)]

    return subprocess.run(command, env=os.environ | {FILE: _uploaded(url)}, check=False).returncode


def _uploaded(url: str) -> str:
    """The id of a file of which a batch can be made."""
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once"}}
    sent = {"file": ("lines.jsonl", json.dumps(line))}
    answer = httpx.post(f"{url}/v1/files", data={"purpose": "batch"}, files=sent).raise_for_status()
    return str(answer.json()["id"])


if __name__ == "__main__":
    sys.exit(main())
