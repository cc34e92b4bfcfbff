"""One `WS /v1/stream` socket: many jobs, multiplexed.

The handler's own thread reads commands. Each followed job has a thread that puts its events into one
bounded queue, which a writer thread empties into the socket. A slow reader holds back the writer, the
queue and then the followers, whose events wait in Redis: memory stays bounded.
(Under gunicorn every thread here is a greenlet.)
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from simple_websocket import ConnectionClosed
from wsproto.utilities import LocalProtocolError

from api import http, streams
from api.keyring import Caller
from api.services import Services
from wicore.errors import Conflict, InvalidRequest, RateLimited, Unavailable, WicoreError
from wicore.request import Priority, parse_job

STALL_S = 30.0
"""A reader that takes nothing for this long is disconnected; it can resume from the log."""
MAX_FOLLOWED = 256
MAX_WAITING = 16
"""Commands received and not yet looked at; then nothing more is read from the client."""
MAX_REF = 256
NOT_ALLOWED, SERVICE_RESTART, TRY_AGAIN_LATER = 1008, 1012, 1013
GONE = (ConnectionClosed, OSError, LocalProtocolError)


def error_frame(error: WicoreError, **tags: Any) -> str:
    return http.dumps({"type": "error", **tags, "error": error.body()})


class Session:
    def __init__(
        self, ws: Any, services: Services, stopping: Callable[[], bool], request_id: str, caller: Caller
    ) -> None:
        self._ws = ws
        self._caller = caller
        self._services = services
        self._stopping = stopping
        self._request_id = request_id
        self._outbox: queue.Queue[str | None] = queue.Queue(services.settings.api.stream_buffer)
        self._followed: set[str] = set()
        self._closed = threading.Event()
        self._goodbye: tuple[int, str] | None = None
        self._held = 0
        """Bytes received and not looked at yet, as far as they are accounted for."""

    def run(self) -> None:
        """Serve the socket until the client leaves, is too slow, or this process stops.

        Raises ConnectionClosed when the client left.
        """
        self._ws.sock.hold_input = self._holds_input
        writer = threading.Thread(target=self._write, name="ws-writer", daemon=True)
        writer.start()
        try:
            while not self._closed.is_set():
                message = self._ws.receive(timeout=streams.TICK_S)
                if self._stopping():
                    self._leave(SERVICE_RESTART, "restarting; resume your jobs")
                elif not self._services.keys.is_live(self._caller):
                    self._leave(NOT_ALLOWED, "the key was revoked")
                elif message is not None:
                    self._handle(message)
        finally:
            self._close()
            writer.join()
            self._services.arriving.change(-self._held)

    def _holds_input(self) -> bool:
        """Asked before each read: account for what came and is not looked at yet; hold back what is more."""
        if self._closed.is_set():
            return False
        waiting = self._ws.input_buffer
        held = sum(map(len, waiting)) + self._ws.incoming_message_len
        try:
            self._services.arriving.change(held - self._held)
            self._held = held
        except Unavailable as err:
            self._leave(TRY_AGAIN_LATER, err.message)
        return len(waiting) >= MAX_WAITING

    def _leave(self, code: int, reason: str) -> None:
        """Make the writer close the socket, once it is done with the frame it is sending."""
        self._goodbye = (code, reason)
        self._close()

    def _close(self) -> None:
        self._closed.set()
        try:
            self._outbox.put_nowait(None)  # wakes a writer that waits
        except queue.Full:
            pass  # then it does not wait

    # --- commands -------------------------------------------------------------------------------

    def _handle(self, message: str | bytes) -> None:
        tags: dict[str, Any] = {}
        try:
            command = self._parse(message, tags)
            self._COMMANDS[command.pop("type")](self, command, tags)
        except Exception as err:
            self._send(error_frame(http.as_wicore_error(err, self._request_id), **tags))

    def _parse(self, message: str | bytes, tags: dict[str, Any]) -> dict[str, Any]:
        """The command without its `ref`, which goes to `tags` so that any answer can carry it."""
        if isinstance(message, bytes):
            raise InvalidRequest("frame: must be JSON text, not binary")
        command = http.loads(message)
        if not isinstance(command, dict):
            raise InvalidRequest("frame: must be a JSON object")
        if "ref" in command:
            ref = command.pop("ref")
            if not (type(ref) is int or isinstance(ref, str)) or len(str(ref)) > MAX_REF:
                raise InvalidRequest(
                    f"ref: must be a string or whole number of at most {MAX_REF} characters", param="ref"
                )
            tags["ref"] = ref
        kind = command.get("type")
        if not isinstance(kind, str) or kind not in self._COMMANDS:
            allowed = ", ".join(self._COMMANDS)
            raise InvalidRequest(f"type: must be one of {allowed}", param="type")
        return command

    def _submit(self, command: dict[str, Any], tags: dict[str, Any]) -> None:
        self._check_room()
        job = self._services.accept(parse_job(command), Priority.INTERACTIVE, self._caller)
        self._send(http.dumps({"type": "accepted", **tags, "job": job.id}))
        self._follow(job.id, 1)

    def _resume(self, command: dict[str, Any], tags: dict[str, Any]) -> None:
        job_id = self._job_of(command, tags, "from")
        first = streams.first_of(command.get("from", 1))
        if job_id in self._followed:
            raise Conflict(f"job: {job_id} is followed on this socket already", param="job")
        self._check_room()
        self._services.record(job_id, self._caller)
        self._follow(job_id, first)

    def _cancel(self, command: dict[str, Any], tags: dict[str, Any]) -> None:
        job_id = self._job_of(command, tags)
        self._services.cancel(job_id, self._caller)
        self._send(http.dumps({"type": "cancelling", **tags}))

    _COMMANDS: Mapping[str, Callable[[Session, dict[str, Any], dict[str, Any]], None]] = {
        "submit": _submit,
        "resume": _resume,
        "cancel": _cancel,
    }

    def _job_of(self, command: dict[str, Any], tags: dict[str, Any], *optional: str) -> str:
        job_id = command.get("job")
        if not isinstance(job_id, str):
            raise InvalidRequest("job: must be the id of a job", param="job")
        tags["job"] = job_id
        for name in command.keys() - {"job", *optional}:
            raise InvalidRequest(f"{name}: unknown or unsupported field; remove it", param=name)
        return job_id

    def _check_room(self) -> None:
        if len(self._followed) >= MAX_FOLLOWED:
            raise RateLimited(f"A socket follows at most {MAX_FOLLOWED} jobs; wait for one to end")

    # --- events ---------------------------------------------------------------------------------

    def _follow(self, job_id: str, first: int) -> None:
        self._followed.add(job_id)
        threading.Thread(
            target=self._relay_events, args=(job_id, first), name=f"ws-follow-{job_id}", daemon=True
        ).start()

    def _relay_events(self, job_id: str, first: int) -> None:
        try:
            for batch in self._services.relay.follow(job_id, first - 1, streams.TICK_S):
                for event in batch:
                    self._send(http.dumps(event))
                if self._closed.is_set():
                    return
        except Exception as err:
            self._send(error_frame(http.as_wicore_error(err, self._request_id), job=job_id))
        finally:
            self._followed.discard(job_id)

    def _send(self, frame: str) -> None:
        """Queue a frame, waiting while the queue is full; gives the socket up when that takes STALL_S."""
        waited = 0.0
        while not self._closed.is_set():
            try:
                self._outbox.put(frame, timeout=streams.TICK_S)
                return
            except queue.Full:
                waited += streams.TICK_S
                if waited >= STALL_S:
                    self._leave(TRY_AGAIN_LATER, "too slow; resume from the log")

    def _write(self) -> None:
        try:
            while (frame := self._outbox.get()) is not None and not self._closed.is_set():
                self._ws.send(frame)
            if self._goodbye is not None:
                self._ws.close(*self._goodbye)
        except GONE:
            self._closed.set()
