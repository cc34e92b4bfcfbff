"""Traces of single jobs, by OpenTelemetry: optional, and nothing of it is imported unless it is asked for.

A trace goes from the submit to the terminal event over several processes. What ties it together is the W3C's
`traceparent` (https://www.w3.org/TR/trace-context/): a client may send it as a header, and the queue message
carries it in its headers, as OpenTelemetry's instrumentation of Celery does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from wicore import __version__
from wicore.config import TelemetrySettings
from wicore.errors import ConfigError, WicoreError

if TYPE_CHECKING:
    from opentelemetry.context import Context

Attributes = Mapping[str, str | int | float | bool]
Kind = Literal["internal", "producer", "consumer"]
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def valid_traceparent(value: object) -> str | None:
    """The value if it is a `traceparent`; a bad one is to be ignored, says the standard."""
    return value if isinstance(value, str) and _TRACEPARENT.fullmatch(value) else None


def tracer_of(settings: TelemetrySettings, service: str) -> Tracer | None:
    """What exports spans to `telemetry.otlp_endpoint`, as `service`; None when that is unset.

    One a process, made after a fork. Raises ConfigError when OpenTelemetry is not installed.
    """
    if settings.otlp_endpoint is None:
        return None
    try:
        return Tracer(settings.otlp_endpoint, service)
    except ImportError as err:
        raise ConfigError(
            f"telemetry.otlp_endpoint: needs OpenTelemetry ({err}); pip install 'wicore[otel]'",
            param="telemetry.otlp_endpoint",
        ) from None


class LiveSpan(NamedTuple):
    """A span that is not over."""

    traceparent: str | None
    """Names it as the parent of others; None when nothing is traced."""
    attributes: dict[str, str | int | float | bool]
    """To be filled in until it ends."""


class Tracer:
    """Makes spans and sends them in the background; a collector that is away costs spans, nothing else."""

    def __init__(self, endpoint: str, service: str) -> None:
        """`endpoint`: where OTLP is taken over HTTP, without `/v1/traces`. Raises ImportError."""
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": service, "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("wicore", __version__)
        self._context = TraceContextTextMapPropagator()
        self._trace = trace

    @contextmanager
    def span(self, name: str, parent: str | None, kind: Kind = "internal") -> Iterator[LiveSpan]:
        """A span for as long as the block runs; a WicoreError that leaves the block is its status."""
        span = self._tracer.start_span(name, self._under(parent), self._kind(kind))
        live = LiveSpan(self._parent_of(span), {})
        try:
            yield live
        except WicoreError as err:
            span.set_status(self._trace.StatusCode.ERROR, err.message)
            raise
        finally:
            span.set_attributes(live.attributes)
            span.end()

    def record(
        self,
        name: str,
        parent: str | None,
        start_s: float,
        end_s: float,
        attributes: Attributes | None = None,
        kind: Kind = "internal",
        error: str | None = None,
    ) -> str:
        """A span that is over, between two Unix times; its traceparent. `error` is its status."""
        span = self._tracer.start_span(
            name, self._under(parent), self._kind(kind), dict(attributes or {}), start_time=int(start_s * 1e9)
        )
        if error is not None:
            span.set_status(self._trace.StatusCode.ERROR, error)
        span.end(int(max(start_s, end_s) * 1e9))
        return self._parent_of(span)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _under(self, parent: str | None) -> Context:
        return self._context.extract({"traceparent": parent} if parent else {})

    def _parent_of(self, span: Any) -> str:
        carrier: dict[str, str] = {}
        self._context.inject(carrier, self._trace.set_span_in_context(span))
        return carrier["traceparent"]

    def _kind(self, kind: Kind) -> Any:
        return self._trace.SpanKind[kind.upper()]
