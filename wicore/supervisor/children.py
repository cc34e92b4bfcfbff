"""Child processes: each leads a process group, its output is prefixed, and the reaper knows it."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from honcho.printer import Message, Printer

from wicore.supervisor import reaper

# The shell reports the group before it becomes the process itself, so there is no moment in which a
# child runs and the reaper does not know it. `exec` leaves no shell between a signal and the child.
_REPORT_AND_RUN = 'echo "+$$" >&0; exec </dev/null; exec '


class Output:
    """Prefixed lines of all processes on one stream, never mixed within a line."""

    def __init__(self, stream: IO[str], width: int) -> None:
        self._printer = Printer(stream, width=width)
        self._lock = threading.Lock()

    def write(self, name: str, text: bytes | str, colour: str | None = None) -> None:
        with self._lock:
            message = Message("line", text, datetime.datetime.now(), name, colour)
            self._printer.write(message)


class Reaper:
    """Our end of the pipe to `reaper.py`, which stops the children should this process be killed.

    A context manager: leave it when every child has ended; the reaper then has nothing to stop, and ends.
    Children get `grace_s` seconds to stop before they are killed.
    """

    def __init__(self, grace_s: float) -> None:
        read, self.pipe = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", reaper.__file__, str(grace_s)], stdin=read, start_new_session=True
        )
        os.close(read)

    def watch(self, group: int) -> None:
        """For a process group that does not report itself, as a `Child` does."""
        os.write(self.pipe, b"+%d\n" % group)

    def forget(self, group: int) -> None:
        os.write(self.pipe, b"-%d\n" % group)

    def __enter__(self) -> Reaper:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.pipe)
        self._process.wait()


class Child:
    """One run of one command.

    `on_exit` is called from another thread, once, when the command's process has ended; processes it
    left behind in its group are killed first.
    """

    def __init__(
        self,
        name: str,
        command: str,
        env: Mapping[str, str],
        reaper: Reaper,
        output: Callable[[bytes], None],
        on_exit: Callable[[Child], None],
    ) -> None:
        self.name = name
        self.started_s = time.monotonic()
        self._output = output
        self._on_exit = on_exit
        self._reaper = reaper
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _REPORT_AND_RUN + command],
            env=dict(env),
            stdin=reaper.pipe,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"output of {name}", daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, name=f"end of {name}", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, signum: int) -> None:
        """Signal the command's process alone: it knows how to stop its own."""
        self._process.send_signal(signum)

    def kill(self) -> None:
        """Kill the whole group at once."""
        reaper.send(self.pid, signal.SIGKILL)

    def ending(self) -> str:
        """How the process ended, in words."""
        code = self.returncode
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    @property
    def returncode(self) -> int:
        return int(self._process.wait())

    def _read(self) -> None:
        stream: Any = self._process.stdout
        with stream:
            for line in stream:
                self._output(line)

    def _wait(self) -> None:
        self._process.wait()
        self.kill()
        self._reader.join()
        self._reaper.forget(self.pid)
        self._on_exit(self)
