"""What the processes of this API count themselves: requests, and streams that are open.

Under gunicorn each process writes its counts to files of one folder (api/gunicorn_conf.py makes it), and
whoever is asked adds them all up: prometheus_client's multiprocess mode.
"""

from __future__ import annotations

import os

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The variable that names the folder; prometheus_client reads it when it is imported."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"})
# When a series began is nothing to look at, and without several processes there would be one for each.
disable_created_metrics()  # type: ignore[no-untyped-call]
_OWN = CollectorRegistry()
_requests = Counter(
    "wicore_http_requests", "HTTP requests answered.", ("method", "route", "status"), registry=_OWN
)
_seconds = Histogram(
    "wicore_http_request_duration_seconds",
    "Seconds from a request to the end of its answer; a stream's is its life.",
    ("method", "route"),
    buckets=SECONDS,
    registry=_OWN,
)
_streams = Gauge(
    "wicore_http_streams_open",
    "Websockets, event streams and calls that wait for their answer.",
    registry=_OWN,
    multiprocess_mode="livesum",
)


def answered(method: str, route: str, status: int, seconds: float) -> None:
    """Count a request. `route` is the door's pattern, not the path: labels must have few values."""
    method = method if method in _METHODS else "other"
    _requests.labels(method, route, str(status)).inc()
    _seconds.labels(method, route).observe(seconds)


def streams_changed(by: int) -> None:
    """So many more streams are open, or fewer."""
    _streams.inc(by)


def exposition() -> bytes:
    """In Prometheus's text format, of all processes."""
    if FOLDER not in os.environ:
        return generate_latest(_OWN)
    # A cleaner of temporary files may have taken it: what was counted in it is lost, but nothing fails.
    os.makedirs(os.environ[FOLDER], exist_ok=True)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
