"""A small service that keeps events of made-up jobs, and misbehaves on purpose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Event = dict[str, Any]


def story(*texts: str, end: Event | None = None) -> list[Event]:
    events: list[Event] = [{"seq": 1, "type": "started", "attempt": 1}]
    for text in texts:
        events.append({"seq": len(events) + 1, "type": "token", "index": 0, "text": text})
    return [*events, {"seq": len(events) + 1, **(end or {"type": "done"})}]


class Service(ThreadingHTTPServer):
    """Keeps one job's events, and sends at most `events_a_connection` before it drops the line."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Door)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.stories = {"j1": story("Once ", "upon ", "a ", "time")}
        self.next_job = iter(self.stories)
        self.events_a_connection = 1000
        self.submitted: list[Event] = []
        self.asked_after: list[int] = []
        self.refusals = 0
        """How many requests to answer 503 first."""
        self.lost_answers = 0
        """How many submits to take and not to answer."""
        self.full = 0
        """How many submits to answer 429 first."""
        self.keys: list[str | None] = []
        """Idempotency keys of the submits, in order."""


class Door(BaseHTTPRequestHandler):
    server: Service

    def answer(self, status: int, value: Any = None, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        error = {"message": message, "type": "x", "code": code, "param": None}
        self.answer(status, {"error": error}, headers)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("max_tokens") == 0:
            self.refuse(400, "invalid_request", "max_tokens: must be at least 1 (got 0)")
            return
        self.server.keys.append(self.headers["Idempotency-Key"])
        if self.server.full:
            self.server.full -= 1
            self.refuse(429, "queue_full", "full", {"Retry-After": "0.01"})
            return
        if self.server.lost_answers:
            self.server.lost_answers -= 1
            self.close_connection = True
            return
        self.server.submitted.append(body)
        self.answer(202, {"id": next(self.server.next_job)})

    def do_DELETE(self) -> None:
        job = self.path.rsplit("/", 1)[1]
        if job in self.server.stories:
            self.answer(200, {"id": job, "status": "running"})
        else:
            self.refuse(404, "unknown_job", f"no job {job}")

    def do_GET(self) -> None:
        job = self.path.split("/")[3]
        if self.server.refusals:
            self.server.refusals -= 1
            self.refuse(503, "unavailable", "Redis is not reachable")
        elif job not in self.server.stories:
            self.refuse(404, "unknown_job", f"no job {job}")
        else:
            last = int(self.headers["Last-Event-ID"])
            self.server.asked_after.append(last)
            left = [event for event in self.server.stories[job] if event["seq"] > last]
            self.send_response(200 if left else 204)
            self.end_headers()
            if left:
                self.wfile.write(b": comment\n\n")
            for event in left[: self.server.events_a_connection]:
                self.wfile.write(f"id: {event['seq']}\ndata: {json.dumps(event)}\n\n".encode())
            if len(left) > self.server.events_a_connection:
                self.wfile.write(b'id: 99\ndata: {"seq": 99, "ty')

    def log_message(self, *args: Any) -> None:
        pass
