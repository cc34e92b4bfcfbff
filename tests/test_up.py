"""`wicore up` with real processes: readiness, restart, ordered stop, and no orphan."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from wicore.exit_codes import ExitCode
from wicore.supervisor import reaper

API = """
import os, signal, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()
    def log_message(self, *args): pass

server = HTTPServer(("127.0.0.1", int(os.environ["WICORE_API__PORT"])), Answer)
def stop(*_):
    print("api stops", flush=True)
    threading.Thread(target=server.shutdown).start()
signal.signal(signal.SIGTERM, stop)
print("api pid", os.getpid(), flush=True)
server.serve_forever()
"""
WORKER = """
import os, signal, sys, time
def stop(*_):
    print("worker hands back", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("worker pid", os.getpid(), flush=True)
while True: signal.pause()
"""
STUBBORN = """
import os, signal
for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
print("worker pid", os.getpid(), flush=True)
while True: signal.pause()
"""
# Leaves a process of its own behind, which ignores everything but SIGKILL.
PARENT = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {STUBBORN!r}])\n" + WORKER.replace(
    "worker pid", "parent pid"
)


class Up:
    """A running `wicore up`: its output so far, and a way to wait for more of it."""

    def __init__(self, folder: Path, scripts: dict[str, str], **env: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        lines = []
        for name, script in scripts.items():
            (folder / f"{name}.py").write_text(script)
            lines.append(f"{name}: python {folder / name}.py\n")
        procfile = folder / "Procfile"
        procfile.write_text("".join(lines))
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from wicore.cli import main; main()", "up", "--procfile", str(procfile)],
            env={
                **os.environ,
                "WICORE_API__PORT": str(self.port),
                "WICORE_REDIS__URL": "redis://127.0.0.1:1/0",
                "WICORE_QUEUE__DRAIN_S": "0",
                **env,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.output = ""

    def wait_for(self, text: str, times: int = 1, seconds: float = 20) -> None:
        assert self.process.stdout is not None
        until = time.monotonic() + seconds
        while self.output.count(text) < times:
            left = until - time.monotonic()
            assert left > 0, f"no {text!r} in:\n{self.output}"
            select.select([self.process.stdout], [], [], left)
            chunk = self.process.stdout.read()
            assert chunk != b"", f"ended without {text!r}:\n{self.output}"
            self.output += (chunk or b"").decode()

    def pid(self, name: str) -> int:
        """Of the latest start of a test process."""
        self.wait_for(f"{name} pid ")
        return int(self.output.rsplit(f"{name} pid ", 1)[1].split()[0])

    def end(self, seconds: float = 25) -> int:
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), True)
        rest, _ = self.process.communicate(timeout=seconds)
        self.output += rest.decode()
        return self.process.returncode


@pytest.fixture
def data_dir() -> Iterator[str]:
    """Short, because a socket lives in it."""
    with tempfile.TemporaryDirectory(prefix="wicore") as folder:
        yield folder


@pytest.fixture
def up(tmp_path: Path, data_dir: str) -> Iterator[Callable[..., Up]]:
    """Starts services; ends them in good order, before their data folder goes."""
    started: list[Up] = []

    def start(scripts: dict[str, str], **env: str) -> Up:
        started.append(Up(tmp_path, scripts, **env))
        return started[-1]

    yield start
    for running in started:
        with suppress(ProcessLookupError):
            running.process.terminate()
        try:
            running.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            running.process.kill()
            running.process.communicate()


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which nobody waits for in a container, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(*pids: int, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_it_says_when_it_is_ready_and_stops_cleanly(up: Callable[..., Up], signum: signal.Signals) -> None:
    service = up({"api": API, "worker": WORKER})
    service.wait_for(f"ready at http://127.0.0.1:{service.port}")
    pids = service.pid("api"), service.pid("worker")
    service.process.send_signal(signum)
    assert service.end() == ExitCode.OK
    assert "api stops" in service.output
    assert "worker hands back" in service.output
    assert gone(*pids, seconds=0)


def test_a_worker_that_dies_is_started_again(up: Callable[..., Up]) -> None:
    service = up({"api": API, "worker": WORKER})
    service.wait_for("ready at")
    first = service.pid("worker")
    os.kill(first, signal.SIGKILL)
    service.wait_for("worker was killed by SIGKILL; starting it again in 0.5 s")
    service.wait_for("worker pid ", times=2)
    assert service.pid("worker") != first
    assert alive(service.pid("api"))


def test_what_a_dead_process_left_behind_is_killed_before_it_starts_again(up: Callable[..., Up]) -> None:
    service = up({"api": API, "worker": PARENT})
    service.wait_for("ready at")
    left_behind = service.pid("worker")
    os.kill(service.pid("parent"), signal.SIGKILL)
    service.wait_for("parent pid ", times=2)
    assert gone(left_behind, seconds=0)


def test_when_it_is_killed_itself_the_rest_stops_in_good_order(up: Callable[..., Up], tmp_path: Path) -> None:
    handed_back = tmp_path / "handed back"
    worker = WORKER.replace("print(", f"open({str(handed_back)!r}, 'w').close()\n    print(", 1)
    service = up({"api": API, "worker": worker})
    service.wait_for("ready at")
    pids = service.pid("api"), service.pid("worker")
    service.process.kill()
    assert gone(*pids)
    assert handed_back.exists()


def test_the_reaper_kills_what_does_not_stop_in_time() -> None:
    read, write = os.pipe()
    command = [sys.executable, "-c", STUBBORN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as stubborn:
        assert stubborn.stdout is not None
        assert stubborn.stdout.readline().startswith(b"worker pid")
        with subprocess.Popen([sys.executable, "-I", "-S", reaper.__file__, "0.2"], stdin=read) as process:
            os.close(read)
            os.write(write, b"+%d\n" % stubborn.pid)
            os.close(write)
            assert process.wait(20) == 0
        assert stubborn.wait(20) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        ([b"+7\n", b"+8\n", b"-7\n"], [8]),
        ([b"+7\n", b"+8\n"], [7, 8]),
        ([b"+7\n", b"-7\n", b"+7\n"], [7]),
        ([b"+7\n", b"+12"], [7]),
        ([], []),
    ],
)
def test_the_reaper_stops_exactly_the_groups_that_have_not_ended(lines: list[bytes], left: list[int]) -> None:
    assert reaper.groups_left(lines) == left


def test_a_second_signal_kills_what_does_not_stop(up: Callable[..., Up]) -> None:
    service = up({"api": API, "worker": STUBBORN}, WICORE_QUEUE__DRAIN_S="600")
    service.wait_for("ready at")
    pid = service.pid("worker")
    service.process.send_signal(signal.SIGINT)
    service.wait_for("stopping; again to force")
    service.process.send_signal(signal.SIGINT)
    assert service.end() == ExitCode.FAILED
    assert "worker: killed, forced" in service.output
    assert gone(pid, seconds=0)


def test_a_process_with_bad_settings_stops_everything_at_once(up: Callable[..., Up]) -> None:
    service = up({"api": API, "worker": "print('error: no such model'); raise SystemExit(78)"})
    assert service.end() == ExitCode.CONFIG
    assert "error: no such model" in service.output
    assert "worker exited with 78: its settings are wrong" in service.output


def test_a_process_that_never_works_is_given_up(up: Callable[..., Up]) -> None:
    service = up({"api": "raise SystemExit(3)", "worker": WORKER})
    assert service.end() == ExitCode.FAILED
    assert "api exited with 3, 3 times before it was ready" in service.output


def test_a_used_port_is_an_error_that_names_the_setting(up: Callable[..., Up]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        service = up({"api": API}, WICORE_API__PORT=str(port))
        assert service.end() == ExitCode.CONFIG
    assert f"error: api.port: cannot listen on 127.0.0.1:{port}" in service.output
    assert "WICORE_API__PORT" in service.output
    assert "Traceback" not in service.output


def test_children_get_the_settings_of_the_command_line(up: Callable[..., Up], tmp_path: Path) -> None:
    script = "import os; print('redis', os.environ['WICORE_REDIS__URL'], flush=True)\n" + WORKER
    service = up({"worker": script})
    service.wait_for("redis redis://127.0.0.1:1/0")


def test_every_line_says_which_process_wrote_it(up: Callable[..., Up]) -> None:
    service = up({"api": API, "worker": WORKER})
    service.wait_for("ready at")
    service.wait_for("worker pid")
    lines = [line for line in service.output.splitlines() if " pid " in line]
    assert {line.split()[1] for line in lines} == {"api", "worker"}
    assert all(" | " in line for line in service.output.splitlines())


def test_a_procfile_without_processes_is_an_error(up: Callable[..., Up]) -> None:
    service = up({})
    assert service.end() == ExitCode.CONFIG
    assert "lists no process" in service.output


REMEMBER = """
import os, redis
client = redis.Redis.from_url(os.environ["WICORE_REDIS__URL"])
print("seen", client.incr("starts"), client.config_get("append*")["appendonly"], flush=True)
"""
EMBEDDED = {"WICORE_REDIS__URL": ""}


@pytest.mark.valkey
def test_the_embedded_valkey_keeps_what_it_accepted_over_a_restart(
    up: Callable[..., Up], data_dir: str
) -> None:
    env = {**EMBEDDED, "WICORE_REDIS__DATA_DIR": data_dir}
    first = up({"api": API, "worker": REMEMBER + WORKER}, **env)
    first.wait_for("seen 1 yes")
    first.process.send_signal(signal.SIGINT)
    assert first.end() == ExitCode.OK
    second = up({"api": API, "worker": REMEMBER + WORKER}, **env)
    second.wait_for("seen 2 yes")


@pytest.mark.valkey
def test_two_services_cannot_share_a_data_folder(up: Callable[..., Up], data_dir: str) -> None:
    env = {**EMBEDDED, "WICORE_REDIS__DATA_DIR": data_dir}
    up({"api": API}, **env).wait_for("ready at")
    second = up({"api": API}, **env)
    assert second.end() == ExitCode.CONFIG
    assert "error: redis.data_dir: another server uses" in second.output


@pytest.mark.valkey
def test_when_valkey_dies_everything_stops_and_says_so(up: Callable[..., Up], data_dir: str) -> None:
    script = REMEMBER + "print('valkey', client.info('server')['process_id'], flush=True)\n" + WORKER
    service = up({"api": API, "worker": script}, **EMBEDDED, WICORE_REDIS__DATA_DIR=data_dir)
    service.wait_for("worker pid")
    os.kill(int(service.output.split("valkey ")[1].split()[0]), signal.SIGKILL)
    assert service.end() == ExitCode.FAILED
    assert "the embedded Valkey died" in service.output


@pytest.mark.valkey
def test_valkey_does_not_outlive_a_killed_service_even_if_it_cannot_save(
    up: Callable[..., Up], data_dir: str
) -> None:
    script = REMEMBER + "print('valkey', client.info('server')['process_id'], flush=True)\n" + WORKER
    service = up({"api": API, "worker": script}, **EMBEDDED, WICORE_REDIS__DATA_DIR=data_dir)
    service.wait_for("worker pid")
    pids = int(service.output.split("valkey ")[1].split()[0]), service.pid("worker")
    shutil.rmtree(data_dir)
    service.process.kill()
    assert gone(*pids)
    Path(data_dir).mkdir()
