"""Loading and calling the Lua scripts.

A script's text is its flags, a header with the key names and settings (so that both have one source),
`base.lua`, `line.lua`, `limits.lua`, `common.lua`, then its own file. Keys are built in the scripts and not
declared: see schema.py about Redis Cluster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, Literal

import redis
from redis.exceptions import NoScriptError

from wicore.config import QueueSettings
from wicore.queue.schema import ALIVE_PERIODS, BELL, Keys
from wicore.request import STATUS_OF_TERMINAL, JobStatus

Name = Literal[
    "submit",
    "pop",
    "peek",
    "adopt",
    "renew",
    "append",
    "finish",
    "hand_back",
    "recover",
    "abandon",
    "reap",
    "cancel",
    "acquit",
    "forget",
    "batch_line",
    "dead_list",
    "dead_get",
    "dead_drop",
    "webhook",
    "webhook_end",
    "spend",
]
_NEED_MEMORY: frozenset[Name] = frozenset(("submit", "pop", "adopt", "append", "spend"))
"""What the server refuses when memory is full. The rest ends jobs or keeps leases: needs little, or frees."""
_READ_ONLY: frozenset[Name] = frozenset(("peek", "dead_list", "dead_get"))
"""The server refuses their writes; there should be none."""

Arg = str | bytes | int
Call = tuple[Name, Sequence[Arg]]

WEBHOOK_TASK = "wicore.deliver_webhook"
"""The Celery task that delivers a job's webhook; its one argument is the job's id."""

_RECORD_STATES: tuple[JobStatus, ...] = ("queued", "running", *STATUS_OF_TERMINAL.values())


class Scripts:
    """The scripts under one prefix and one set of queue settings. Thread-safe."""

    def __init__(self, client: redis.Redis, keys: Keys, settings: QueueSettings) -> None:
        self._client: Any = client  # redis-py does not type execute_command
        self._header = _header(keys, settings)

    def call(self, name: Name, *args: Arg) -> Any:
        """Run one script. Raises what redis-py raises."""
        text, digest = _text(self._header, name)
        try:
            return self._client.execute_command("EVALSHA", digest, 0, *args)
        except NoScriptError:  # the server restarted or never saw it
            return self._client.execute_command("EVAL", text, 0, *args)

    def call_many(self, calls: Sequence[Call]) -> list[Any]:
        """Run scripts in order in one round trip; a script's own failure is returned, as an exception.

        Raises ConnectionError or TimeoutError when it is unknown which of them ran.
        """
        return self.call_replicated(calls, 0, 0)[0]

    def call_replicated(self, calls: Sequence[Call], replicas: int, timeout_ms: int) -> tuple[list[Any], int]:
        """As `call_many`; also how many replicas hold all that was written, after waiting for `replicas`."""
        replies, holders = self._pipeline(calls, replicas, timeout_ms)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            for name in {name for name, _ in calls}:
                self._client.script_load(_text(self._header, name)[0])
            missing = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
            again, holders = self._pipeline([calls[i] for i in missing], replicas, timeout_ms)
            for i, reply in zip(missing, again, strict=True):
                replies[i] = reply
        return replies, holders

    def _pipeline(self, calls: Sequence[Call], replicas: int, timeout_ms: int) -> tuple[list[Any], int]:
        with self._client.pipeline(transaction=False) as pipe:
            for name, args in calls:
                pipe.execute_command("EVALSHA", _text(self._header, name)[1], 0, *args)
            if not replicas:
                return list(pipe.execute(raise_on_error=False)), 0
            pipe.execute_command("WAIT", replicas, timeout_ms)
            *replies, holders = pipe.execute(raise_on_error=False)
            # An old master that has become a replica refuses WAIT, too.
            return replies, 0 if isinstance(holders, Exception) else holders


@cache
def _text(header: str, name: Name) -> tuple[str, str]:
    lua = resources.files("wicore.queue") / "lua"
    parts = [(lua / f"{part}.lua").read_text() for part in ("base", "line", "limits", "common", name)]
    text = "\n".join((_flags(name), header, *parts))
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def _flags(name: Name) -> str:
    if name in _READ_ONLY:  # which implies allow-oom
        return "#!lua flags=no-writes"
    return "#!lua" if name in _NEED_MEMORY else "#!lua flags=allow-oom"


def _header(keys: Keys, settings: QueueSettings) -> str:
    names: dict[str, Any] = {
        name: getattr(keys, name)
        for name in (
            *(
                "suspect",
                "dead",
                "dead_count",
                "unacked",
                "leases",
                "deliveries",
                "deadlines",
                "jobs",
                "finished",
            ),
            *("control", "workers", "turns", "waiting", "pace", "capacity", "counts", "webhooks", "tasks"),
            "batches_open",
        )
    }
    # Keys of one job, owner or level: the name up to that, which the scripts append.
    families = (
        *("job", "log", "events", "cancel", "message", "celery_result", "idempotency", "trial"),
        *("file", "batch"),
    )
    names |= {name: getattr(keys, name)("") for name in families}
    names |= {"jobs_of_all": keys.jobs_of(""), "bucket": keys.bucket("")}
    names |= {"queue": keys.line(""), "clients": keys.clients(""), "backlog": keys.backlog("")}
    names["jobs_by_status"] = {status: keys.jobs_by_status(status) for status in _RECORD_STATES}
    names["levels"] = [str(int(level)) for level in keys.queues()]
    names["lists"] = {str(int(level)): name for level, name in keys.queues().items()}
    share = settings.background_share
    constants = {
        "lease_ms": round(settings.lease_s * 1000),
        "max_attempts": settings.max_attempts,
        "max_jobs": settings.max_jobs,
        "max_tokens": settings.max_tokens,
        "alive_periods": ALIVE_PERIODS,
        "bell": BELL.decode(),
        "retention_s": settings.retention_s,
        "webhook_task": WEBHOOK_TASK,
        "background_every": round(1 / share) if share else 0,
    }
    return f"local K = {_lua(names)}\nlocal C = {_lua(constants)}"


def _lua(value: Any) -> str:
    """A Lua literal. Strings are escaped byte by byte, so that Kombu's control characters survive."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"[{_lua(key)}] = {_lua(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "{" + ", ".join(map(_lua, value)) + "}"
    if isinstance(value, str):
        return '"' + "".join(c if c.isalnum() or c in "-_:." else f"\\{ord(c):03d}" for c in value) + '"'
    return str(value)
