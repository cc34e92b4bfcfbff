"""Gunicorn's settings, from WiCore's: gevent workers, so that thousands of streams cost one thread."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sys
from typing import Any

from gevent import Timeout, monkey, sleep

# Before anything imports ssl, threading or redis: what is imported earlier keeps blocking calls.
monkey.patch_all()

from api.counts import counts_folder  # noqa: E402

# Before anything imports prometheus_client.
os.environ["PROMETHEUS_MULTIPROC_DIR"], _counts_lock = counts_folder()

import gunicorn.http.wsgi  # noqa: E402
from gunicorn.arbiter import Arbiter  # noqa: E402
from prometheus_client.multiprocess import mark_process_dead  # noqa: E402

from api import access_log  # noqa: E402
from api.connections import HEADS  # noqa: E402
from api.services import EXTENSION  # noqa: E402
from wicore.access.store import KeyStore, require_keys  # noqa: E402
from wicore.config import load_settings  # noqa: E402
from wicore.errors import ConfigError, Unavailable, WicoreError  # noqa: E402
from wicore.exit_codes import ExitCode  # noqa: E402
from wicore.queue.connection import connect  # noqa: E402

_settings = load_settings()
# Clients need not know what answers them.
gunicorn.http.wsgi.SERVER = "wicore"

STALLED_READER_MS = 60_000
LINGER_S = 2.0
LINGER_PIECE = 65_536
OTHER_FILES = 500
"""Connections to Redis, the checkpoint, and the like."""

bind = f"{_settings.api.host}:{_settings.api.port}"
workers = _settings.api.workers
worker_class = "api.connections.Worker"
# Beyond the streams and the calls that wait, room for those that come and go, so that these are still
# answered when all streams are taken; and for connections that have not said yet what they want.
worker_connections = _settings.api.max_sockets + 1000 + HEADS
# Short, because a stopping process waits for idle connections too. A request's head must come within it.
keepalive = 5
timeout = 60
graceful_timeout = 20
limit_request_line = 8190
limit_request_fields = 100
limit_request_field_size = 8190
# The app writes its own, as JSON: api/access_log.py.
accesslog = None
errorlog = "-"
loglevel = _settings.telemetry.log_level
proc_name = "wicore-api"
# Its path is one for all services of a user.
control_socket_disable = True


def on_starting(server: Any) -> None:
    """Refuse to be open to the network. While Redis is away that is not known, and then nobody is let in."""
    _open_files(worker_connections + OTHER_FILES)
    url, prefix = _settings.redis.url, _settings.redis.prefix
    if url is None:  # which each process complains of
        return
    with connect(url) as client:
        try:
            require_keys(_settings.api, KeyStore(client, prefix))
        except ConfigError as err:
            server.log.error("%s", err.message)
            sys.exit(ExitCode.CONFIG)
        except Unavailable as err:
            server.log.warning("%s", err.message)


def _open_files(wanted: int) -> None:
    """Let this process and its children have so many; a connection is one, and the usual bound is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def when_ready(server: Any) -> None:
    """Have the kernel drop clients that stop reading; accepted connections inherit the option.

    A blocked send would otherwise hold its greenlet for as long as the client keeps the connection.
    """
    for listener in server.LISTENERS:
        if listener.sock.family in (socket.AF_INET, socket.AF_INET6) and hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_READER_MS)


def post_request(worker: Any, req: Any, environ: dict[str, Any], response: Any) -> None:
    """Take the rest of a body that was refused unread, for a while, then have the connection closed.

    Closing at once would reset it, and the client might never see the answer. Gunicorn would read on
    without end and, from a client that sends fast enough, without ever letting another greenlet run.
    """
    drained = False
    with Timeout(LINGER_S, False):
        try:
            while req.body.read(LINGER_PIECE):
                sleep(0)
            drained = True
        except Exception as err:
            worker.log.debug("unread body: %s", err)
    if not drained:
        req.force_close()


def post_fork(server: Any, worker: Any) -> None:
    """A new process must find the folder, should a cleaner of temporary files have taken it."""
    os.makedirs(os.environ["PROMETHEUS_MULTIPROC_DIR"], exist_ok=True)


def child_exit(server: Any, worker: Any) -> None:
    """Forget what a process that has ended had open; what it counted stays."""
    mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def on_exit(server: Any) -> None:
    shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)


def post_worker_init(worker: Any) -> None:
    """Load tokenizer and connections before the first request; tell streams when to end."""
    if _settings.telemetry.access_log:
        access_log.write()
    services = worker.wsgi.extensions[EXTENSION]
    services.stopping = lambda: not worker.alive
    try:
        services.get()
    except WicoreError as err:
        worker.log.error("%s", err.message)
        sys.exit(Arbiter.APP_LOAD_ERROR)  # which also stops the master
