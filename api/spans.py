"""Spans of requests, under the one that the client names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flask import has_request_context, request

from wicore.telemetry.tracing import LiveSpan, Tracer, valid_traceparent


@contextmanager
def of_request(tracer: Tracer | None, name: str) -> Iterator[LiveSpan]:
    """A span for as long as the block runs. Without a tracer the client's own is passed on to workers."""
    sent = request.headers.get("traceparent") if has_request_context() else None
    parent = valid_traceparent(sent)
    if tracer is None:
        yield LiveSpan(parent, {})
        return
    with tracer.span(name, parent, "producer") as span:
        yield span
