"""Keep the processes of a service running, and stop them in order.

honcho's own manager stops everything when one process ends and kills what has not stopped after
five seconds; a worker that drains needs longer, and one that crashed needs to be restarted. So this
takes honcho's Procfile reader and printer, and supervises itself.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import IO, Literal

from honcho.colour import get_colours

from wicore.exit_codes import ExitCode
from wicore.supervisor.children import Child, Output, Reaper

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Before a restart; each failure in a row doubles it."""
STEADY_S = 60.0
"""A process that lived this long failed anew, not again."""
FAILURES_BEFORE_READY = 3
"""A process that ends this often before the service was ever ready is not going to work."""
STOP_MARGIN_S = 10.0
"""What a process may take to stop beyond the time that it may drain."""


@dataclass(slots=True)
class _Slot:
    """One line of the Procfile: its child while it runs, else when to start the next one."""

    name: str
    command: str
    colour: str
    child: Child | None = None
    start_at: float = 0.0
    failures: int = 0


Event = tuple[Literal["exit"], Child] | tuple[Literal["signal"], int] | tuple[Literal["ready"], None]


class Supervisor:
    """Runs `commands` (name to shell command, in the order to stop them) until told to stop.

    Args:
        env: the environment of every child.
        reaper: what stops the children if this process is killed; outlives `run`.
        stream: where all output goes.
        drain_s: how long a process may finish its work once it is told to stop.
        ready: whether the service is able to serve; called in another thread until it says so.
        on_ready: called once, when it is.
        fault: what else has failed, in words, so that everything must stop; None if nothing has.
    """

    def __init__(
        self,
        commands: Mapping[str, str],
        env: Mapping[str, str],
        reaper: Reaper,
        stream: IO[str],
        drain_s: float,
        ready: Callable[[], bool],
        on_ready: Callable[[], None],
        fault: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._env, self._reaper = env, reaper
        self._stop_s = drain_s + STOP_MARGIN_S
        self._ready, self._on_ready, self._fault = ready, on_ready, fault
        self._slots = [
            _Slot(name, line, colour)
            for (name, line), colour in zip(commands.items(), get_colours(), strict=False)
        ]
        self._output = Output(stream, max(map(len, [*commands, "wicore"])))
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._is_ready = False
        self._ended = threading.Event()
        self._stop_by: float | None = None
        self._result = ExitCode.OK

    def say(self, text: str) -> None:
        self._output.write("wicore", text)

    def run(self) -> ExitCode:
        """Run until SIGINT or SIGTERM, or until going on is pointless; every child has ended then.

        Call it in the main thread. A second signal kills what is still stopping.
        """
        before = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
        }
        threading.Thread(target=self._wait_until_ready, name="readiness", daemon=True).start()
        try:
            while self._stop_by is None or any(slot.child for slot in self._slots):
                self._step()
        finally:
            self._ended.set()
            for slot in self._slots:
                if slot.child is not None:
                    slot.child.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._result

    def _step(self) -> None:
        now = time.monotonic()
        if self._stop_by is None:
            if (reason := self._fault()) is not None:
                self._stop(reason, ExitCode.FAILED)
            else:
                self._start_due(now)
        elif now > self._stop_by:
            self._kill_all("not stopped in time")
        try:
            kind, value = self._events.get(timeout=0.2)
        except queue.Empty:
            return
        if isinstance(value, Child):
            self._child_ended(value)
        elif kind == "signal" and self._stop_by is None:
            self._stop("stopping; again to force", ExitCode.OK)
        elif kind == "signal":
            self._kill_all("forced")
        elif self._stop_by is None:
            self._is_ready = True
            self._on_ready()

    def _start_due(self, now: float) -> None:
        for slot in self._slots:
            if slot.child is None and now >= slot.start_at:
                slot.child = self._start(slot)

    def _start(self, slot: _Slot) -> Child:
        return Child(
            slot.name,
            slot.command,
            self._env,
            self._reaper,
            output=lambda line: self._output.write(slot.name, line, slot.colour),
            on_exit=lambda child: self._events.put(("exit", child)),
        )

    def _child_ended(self, child: Child) -> None:
        slot = next(slot for slot in self._slots if slot.child is child)
        slot.child = None
        if self._stop_by is not None:
            return
        now = time.monotonic()
        slot.failures = 1 if now - child.started_s > STEADY_S else slot.failures + 1
        what = f"{slot.name} {child.ending()}"
        if child.returncode == ExitCode.CONFIG:
            self._stop(f"{what}: its settings are wrong, see above; stopping", ExitCode.CONFIG)
        elif not self._is_ready and slot.failures >= FAILURES_BEFORE_READY:
            self._stop(f"{what}, {slot.failures} times before it was ready; stopping", ExitCode.FAILED)
        else:
            pause = min(FIRST_PAUSE_S * 2 ** (slot.failures - 1), LONGEST_PAUSE_S)
            slot.start_at = now + pause
            self.say(f"{what}; starting it again in {pause:g} s")

    def _stop(self, reason: str, result: ExitCode) -> None:
        """Tell all to stop, the API first: it takes no more requests while the worker drains."""
        self.say(reason)
        self._result = result
        self._stop_by = time.monotonic() + self._stop_s
        for slot in self._slots:
            if slot.child is not None:
                slot.child.signal(signal.SIGTERM)

    def _kill_all(self, reason: str) -> None:
        self._result = ExitCode.FAILED
        for slot in self._slots:
            if slot.child is not None:
                self.say(f"{slot.name}: killed, {reason}")
                slot.child.kill()
        self._stop_by = time.monotonic() + self._stop_s

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # SimpleQueue.put is reentrant, so this is safe in a signal handler.
        self._events.put(("signal", number))

    def _wait_until_ready(self) -> None:
        while not self._ended.is_set():
            if self._ready():
                self._events.put(("ready", None))
                return
            self._ended.wait(0.2)
