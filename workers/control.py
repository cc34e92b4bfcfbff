"""What reaches a worker while it works: cancels, on WiCore's own channel, and Celery's remote control.

Each has a thread that reconnects by itself through any outage and never touches the engine. A cancel that is
missed in an outage is heard with the next lease renewal.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import redis

from wicore.queue.celery_url import celery_url
from wicore.queue.schema import Keys
from wicore.stream.relay import Subscriber

log = logging.getLogger("wicore.worker")

_TICK_S = 0.25
"""How long the Celery thread may take to notice that it should stop."""
_BACKOFF_S = (0.5, 1.0, 2.0, 5.0)
_NAMESPACE = "celery"
_NODE_EXPIRES_S = 10.0
"""As Celery's `control_exchange` and `control_queue_expires`: what a killed worker leaves in Redis goes."""


class CancelListener:
    """Calls `on_cancel(job_id)`, from a thread of its own, for each cancel of a job that is leased."""

    def __init__(self, client: redis.Redis, prefix: str, on_cancel: Callable[[str], None]) -> None:
        self._channel = Keys(prefix).control.encode()
        self._on_cancel = on_cancel
        self._subscriber = Subscriber(client)

    def start(self) -> None:
        self._subscriber.add(self._channel, self)

    def stop(self) -> None:
        self._subscriber.close()

    def put(self, payload: bytes) -> None:
        try:
            notice = json.loads(payload)
            kind, job_id = notice["type"], notice["job"]
        except (ValueError, TypeError, KeyError):
            log.warning("control: not a notice: %.80r", payload)
            return
        if kind == "cancel":
            self._on_cancel(job_id)

    def mark_stale(self) -> None:
        """Nothing to do: wishes are kept, and seen with the next lease renewal."""

    def close(self) -> None:
        """Nothing to do: nobody waits for the next notice."""


class CeleryNode:
    """A node of Celery's remote control (Kombu's pidbox) that answers by `commands`.

    It subscribes to the broadcast channel alone and consumes no queue, so it can neither take nor restore
    a message. Kombu is imported in the thread: the worker's start does not wait for it.
    """

    def __init__(self, url: str, name: str, commands: Mapping[str, Callable[..., Any]]) -> None:
        """`url` is `redis.url`; `name` the node's, unique among all workers."""
        self._broker = celery_url(url)
        self._name = name
        self._commands = commands
        self._stop = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._run, name="celery-control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread soon; it is not waited for, as it may hang in an outage."""
        self._stop.set()

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                self._answer()
            except Exception as err:  # Kombu's errors have no common root
                if not self._lost:
                    log.warning("%s: no remote control until Redis is back: %s", self._name, err)
                failures = failures + 1 if self._lost else 0
                self._lost = True
                self._stop.wait(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])

    def _answer(self) -> None:
        """Answer until told to stop or the connection fails."""
        from kombu import Connection
        from kombu.pidbox import Mailbox

        timeouts = {"socket_timeout": 5.0, "socket_connect_timeout": 5.0, "socket_keepalive": True}
        options = {**timeouts, "health_check_interval": 15, **self._broker.options}
        with Connection(self._broker.url, transport_options=options) as connection:
            mailbox = Mailbox(
                _NAMESPACE,
                type="fanout",
                connection=connection,
                accept=["json"],
                queue_expires=_NODE_EXPIRES_S,
            )
            node = mailbox.Node(self._name, handlers=self._commands, channel=connection.channel())
            with node.Consumer(callbacks=[lambda body, message: _dispatch(node, body, message)]):
                if self._lost:
                    log.info("%s: remote control is back", self._name)
                    self._lost = False
                while not self._stop.is_set():
                    try:
                        connection.drain_events(timeout=_TICK_S)
                    except TimeoutError:
                        pass


def _dispatch(node: Any, body: Any, message: Any) -> None:
    """Run one command, if it is for this node. Anyone can write to the channel, so anything may come."""
    try:
        node.handle_message(body, message)
    except (AttributeError, TypeError, ValueError) as err:
        log.warning("%s: not a remote control command: %s", node.hostname, err)
