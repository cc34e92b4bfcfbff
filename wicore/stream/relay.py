"""The listener's side of the event stream: the log first, then the live channel, no gap, no repeat."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any, Protocol, cast

import redis

from wicore.errors import Unavailable, UnknownJob
from wicore.queue.connection import dedicated_connection, unavailable_on_failure
from wicore.queue.schema import Keys
from wicore.request import JOB_ID, STATUS_OF_TERMINAL, TERMINAL_TYPES, Event

log = logging.getLogger(__name__)

_CHUNK = 1000
"""Log entries read at a time."""
_READERS = 16
"""Listeners that read Redis at once: after a reconnect all want to, and others need the pool too."""
_PING_S = 5.0
_BACKOFF_S = 0.5
_ENDED = frozenset(status.encode() for status in STATUS_OF_TERMINAL.values())


def read_log(client: redis.Redis, job_id: str, after: int = 0, prefix: str = "wicore") -> list[Event]:
    """The job's events with `seq > after` that are in the log, in order; [] for an unknown job.

    Raises Unavailable.
    """
    with unavailable_on_failure(client):
        return [event for chunk in _chunks(client, Keys(prefix).log(job_id), after) for event in chunk]


def _chunks(client: redis.Redis, key: str, after: int) -> Iterator[list[Event]]:
    while True:
        entries = cast("list[Any]", client.xrange(key, f"(0-{after}", "+", count=_CHUNK))
        if entries:
            yield [json.loads(fields[b"event"]) for _, fields in entries]
        if len(entries) < _CHUNK:
            return
        after = int(entries[-1][0].split(b"-")[1])


class Relay:
    """One subscriber connection for all listeners of a process. Works with threads and under gevent.

    Create it after the fork. The thread and its connection start with the first listener.

    Why nothing is lost: a listener reads the log after its subscription is confirmed, so whatever is not
    in the log yet comes through the channel. Whenever the channel cannot be trusted (a new connection, a
    buffer that overflowed, a gap in the numbers) the listener reads the log again.
    """

    def __init__(self, client: redis.Redis, prefix: str = "wicore", buffer: int = 1024) -> None:
        """`buffer`: live events held for one listener; one that falls behind reads the log instead."""
        self._client = client
        self._keys = Keys(prefix)
        self._buffer = buffer
        self._readers = threading.BoundedSemaphore(_READERS)
        self._subscriber = Subscriber(client)

    def follow(self, job_id: str, after_seq: int = 0, idle_s: float | None = None) -> Iterator[list[Event]]:
        """Every event with `seq > after_seq`, once and in order, ending after the terminal one.

        Events come in batches of what is there. With `idle_s`, an empty batch comes whenever that many
        seconds bring no event: a chance to notice a client that left. Closing the iterator unsubscribes.
        While Redis is away the iterator waits; it goes on when Redis is back.
        Raises UnknownJob or Unavailable at the call, not at the first `next`; Unavailable from the iterator
        after `close`.
        """
        if not JOB_ID.fullmatch(job_id):
            raise _unknown(job_id)
        with unavailable_on_failure(self._client), self._readers:
            if not self._client.exists(self._keys.job(job_id)):
                raise _unknown(job_id)
        return self._follow(job_id, after_seq, idle_s)

    def close(self) -> None:
        """End the thread and all iterators. Idempotent."""
        self._subscriber.close()

    def _follow(self, job_id: str, last: int, idle_s: float | None) -> Iterator[list[Event]]:
        channel = self._keys.events(job_id).encode()
        listener = _Listener(self._buffer)
        self._subscriber.add(channel, listener)
        try:
            while True:
                for batch in self._next(listener, job_id, last, idle_s):
                    yield batch
                    if batch and batch[-1]["type"] in TERMINAL_TYPES:
                        return
                    last = batch[-1]["seq"] if batch else last
        except _NothingMoreError:
            return
        finally:
            self._subscriber.remove(channel, listener)

    def _next(
        self, listener: _Listener, job_id: str, last: int, idle_s: float | None
    ) -> Iterator[list[Event]]:
        """What follows `last`: from the channel when it goes on there without a gap, else from the log."""
        payloads = listener.get(idle_s)
        if payloads is not None:
            heard = [json.loads(payload) for payload in payloads]
            events = [event for event in heard if event["seq"] > last]
            if not events and heard and heard[-1]["type"] in TERMINAL_TYPES:
                raise _NothingMoreError
            if all(event["seq"] == last + 1 + i for i, event in enumerate(events)):
                if events or not payloads:
                    yield events
                return
        try:
            yield from self._replay(job_id, last)
        except Unavailable:
            self._subscriber.closed.wait(_BACKOFF_S)
            listener.mark_stale()
            if idle_s is not None:
                yield []

    def _replay(self, job_id: str, after: int) -> Iterator[list[Event]]:
        """The log after `after`. Raises _NothingMoreError when the job has ended and that was all."""
        with unavailable_on_failure(self._client):
            with self._readers:
                # Status before log: a job seen as ended has its terminal event in the log already.
                status = self._client.hget(self._keys.job(job_id), "status")
            chunks = _chunks(self._client, self._keys.log(job_id), after)
            while True:
                with self._readers:
                    chunk = next(chunks, None)
                if chunk is None:
                    break
                yield chunk
        if status is None:
            raise _unknown(job_id)
        if status in _ENDED:
            raise _NothingMoreError


class _NothingMoreError(Exception):
    """The job has ended, and the listener said that it has all up to the end."""


class _Listener:
    """What the subscriber thread hands to one iterator: payloads, or the word that the log must be read."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._payloads: list[bytes] = []
        self._stale = False
        self._closed = False
        self._changed = threading.Condition()

    def put(self, payload: bytes) -> None:
        with self._changed:
            if self._stale:
                return  # it is in the log, which will be read
            if len(self._payloads) < self._limit:
                self._payloads.append(payload)
                self._changed.notify()
                return
        self.mark_stale()

    def mark_stale(self) -> None:
        with self._changed:
            self._payloads.clear()
            self._stale = True
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def get(self, timeout: float | None) -> list[bytes] | None:
        """The payloads since; [] on timeout; None: read the log. Raises Unavailable once closed.

        The mark is taken off before the log is read: what comes meanwhile is kept.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._payloads or self._stale or self._closed, timeout)
            if self._closed:
                raise Unavailable("The event relay is shut down.")
            if self._stale:
                self._stale = False
                return None
            payloads = self._payloads
            self._payloads = []
            return payloads


class Listening(Protocol):
    """What a subscriber hands to one listener, from its thread."""

    def put(self, payload: bytes) -> None:
        """What was published on the channel."""

    def mark_stale(self) -> None:
        """The subscription is confirmed; what came before it, or during an outage, was not heard."""

    def close(self) -> None:
        """Nothing more will come."""


class Subscriber:
    """The connection that subscribes for all listeners, and the thread that reads it, through any outage.

    The thread and its connection start with the first listener.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._listeners: dict[bytes, set[Listening]] = {}
        self._confirmed: set[bytes] = set()
        self._connection: Any = None
        self._thread: threading.Thread | None = None
        self.closed = threading.Event()

    def add(self, channel: bytes, listener: Listening) -> None:
        """The listener is marked stale as soon as the subscription is confirmed. Raises Unavailable."""
        with self._lock:
            if self.closed.is_set():
                raise Unavailable("The event relay is shut down.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
                self._thread.start()
            listeners = self._listeners.setdefault(channel, set())
            listeners.add(listener)
            if channel in self._confirmed:
                listener.mark_stale()
            elif len(listeners) == 1:
                self._send("SUBSCRIBE", channel)

    def remove(self, channel: bytes, listener: Listening) -> None:
        with self._lock:
            listeners = self._listeners.get(channel, set())
            listeners.discard(listener)
            if not listeners and self._listeners.pop(channel, None) is not None:
                self._confirmed.discard(channel)
                self._send("UNSUBSCRIBE", channel)

    def close(self) -> None:
        self.closed.set()
        with self._lock:
            everyone = [listener for group in self._listeners.values() for listener in group]
            self._hang_up()
        for listener in everyone:
            listener.close()
        if self._thread is not None:
            self._thread.join()

    def _send(self, *command: str | bytes) -> None:
        """Under the lock; any thread. Without a connection there is nothing to do: a new one subscribes anew.

        Past redis-py, which would close its connection here while the thread reads from it.
        """
        if self._connection is None:
            return
        try:
            self._connection._sock.sendall(b"".join(self._connection.pack_command(*command)))
        except OSError:
            self._hang_up()

    def _hang_up(self) -> None:
        """Under the lock: make the thread see the end of the connection, which only it closes."""
        if self._connection is None:
            return
        try:
            self._connection._sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was first
            pass
        self._connection = None

    def _run(self) -> None:
        told = False
        while not self.closed.is_set():
            connection = None
            try:
                connection = dedicated_connection(self._client)
                told = False
                self._subscribe_all(connection)
                self._read(connection)
            except (redis.RedisError, OSError) as err:
                if not told and not self.closed.is_set():
                    log.warning("subscriptions: connection lost: %s", err)
                told = True
            finally:
                with self._lock:
                    self._connection = None
                    self._confirmed.clear()
                if connection is not None:
                    connection.disconnect()
            self.closed.wait(_BACKOFF_S)

    def _subscribe_all(self, connection: Any) -> None:
        with self._lock:
            self._connection = connection
            if self._listeners:
                self._send("SUBSCRIBE", *self._listeners)

    def _read(self, connection: Any) -> None:
        """Hand out what comes until the connection ends."""
        pinged = False
        while not self.closed.is_set():
            if connection.can_read(timeout=_PING_S):
                self._handle(connection.read_response(disable_decoding=True))
                pinged = False
            elif pinged:
                raise redis.ConnectionError(f"no answer to PING within {_PING_S:g} s")
            else:
                with self._lock:
                    self._send("PING")
                pinged = True

    def _handle(self, reply: Any) -> None:
        if not isinstance(reply, list):
            return  # of a PING while nothing is subscribed
        kind, channel = reply[0], reply[1]
        with self._lock:
            listeners = list(self._listeners.get(channel, ()))
            if kind == b"subscribe" and listeners:
                self._confirmed.add(channel)
        for listener in listeners:
            if kind == b"message":
                listener.put(reply[2])
            elif kind == b"subscribe":
                listener.mark_stale()


def _unknown(job_id: str) -> UnknownJob:
    return UnknownJob(
        f"No job {job_id!r:.140}: it was never accepted, or its record has expired.", param="id"
    )
