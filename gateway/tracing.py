"""A span of OpenTelemetry for each request, with its attempts as events: behind the extra [tracing], and off until an endpoint is named.

client's traceparent ──► span llm_request  accepted ─► attempt ended (placement, expected, found) ─► ... ─► end
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from gateway.events import AttemptEnded
from gateway.explain import attempt_fields
from gateway.session import Session
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

SERVICE_NAME = "baton-gateway"
EXPORT_TIMEOUT_S = 5.0
PACKAGES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


class RequestSpans:
    """The spans of requests that are not over: one each, as many as the gateway has requests. Moments are of the gateway's clock."""

    def __init__(self, provider: TracerProvider, *, wall_time_ns: Callable[[], int] = time.time_ns) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("baton")
        self._wall_time_ns = wall_time_ns
        self._spans: dict[str, Span] = {}

    def __len__(self) -> int:
        return len(self._spans)

    def begin(self, session: Session, traceparent: str) -> None:
        """`traceparent`: as the client sent it; empty or odd: a trace of its own."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": traceparent}) if traceparent else None
        request = session.request
        attributes = {
            "gen_ai.request.id": request.request_id,
            "gen_ai.request.model": request.model_id,
            "gen_ai.usage.input_tokens": request.num_prompt_tokens,
        }
        self._spans[request.request_id] = self._tracer.start_span(
            "llm_request", context, SpanKind.SERVER, attributes, start_time=self._wall_time_ns()
        )

    def attempt_ended(self, session: Session, ended: AttemptEnded) -> None:
        """An event of the span; the span itself carries the newest placement."""
        span = self._spans.get(session.request.request_id)
        if span is None:
            return
        fields = {f"baton.{name}": value for name, value in attempt_fields(session, ended).items() if isinstance(value, str | int | float)}
        span.add_event("attempt ended", fields, timestamp=self._wall_time_ns())
        span.set_attributes(fields)

    def end(self, session: Session, outcome: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        span = self._spans.pop(session.request.request_id, None)
        if span is None:
            return
        span.set_attributes({"gen_ai.usage.output_tokens": session.num_output_tokens, "baton.outcome": outcome})
        if outcome == "failed":
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._wall_time_ns())

    def close(self) -> None:
        """Send what is left, for EXPORT_TIMEOUT_S at most."""
        self._provider.force_flush(int(EXPORT_TIMEOUT_S * 1e3))
        self._provider.shutdown()


def open_spans(endpoint: str) -> RequestSpans | None:
    """Spans sent to an OTLP endpoint over HTTP, such as http://127.0.0.1:4318/v1/traces, from a thread with a bounded queue; None
    where `endpoint` is empty.

    Raises:
        ConfigError: the packages of the extra are not installed.
    """
    if not endpoint:
        return None
    check_packages(endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": SERVICE_NAME}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)))
    return RequestSpans(provider)


def check_packages(endpoint: str) -> None:
    """Before anything is started.

    Raises:
        ConfigError: traces are to be sent to `endpoint`, and the packages of the extra are not installed.
    """
    if not endpoint:
        return
    try:
        found = [find_spec(name) for name in PACKAGES]
    except ModuleNotFoundError:  # not even the package it would be in
        found = [None]
    if not all(found):
        remedy = "install it with `pip install 'baton-serve[tracing]'`, or leave the endpoint out"
        raise ConfigError(f"gateway.otlp_traces_endpoint is {endpoint}, which takes OpenTelemetry and its OTLP exporter; {remedy}")
