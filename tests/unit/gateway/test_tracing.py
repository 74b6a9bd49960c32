"""Spans of requests, into OpenTelemetry's own in-memory exporter, over the fakes of conftest.py."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from gateway import tracing
from gateway.tracing import RequestSpans, check_packages, open_spans
from protocol.errors import ConfigError
from tests.unit.gateway.conftest import until

pytestmark = pytest.mark.pure

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs the extra [tracing]")
BODY = {"prompt": "abc", "max_tokens": 4}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Exported:
    """A provider that keeps what is ended."""

    def __init__(self) -> None:
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self._exporter = InMemorySpanExporter()
        self.provider = sdk.TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def spans(self) -> Any:
        return self._exporter.get_finished_spans()


@pytest.fixture
def exported(cluster: Any) -> Iterator[Exported]:
    exported = Exported()
    cluster.service._spans = RequestSpans(exported.provider)
    yield exported


async def test_a_request_is_one_span_in_its_clients_trace_with_its_placement(cluster: Any, exported: Exported) -> None:
    """Seen to fail without the context of the client."""
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    async with cluster.http.post("/v1/completions", json=BODY, headers=headers) as response:
        answer = await response.json()
    (span,) = exported.spans
    (record,) = cluster.router.explanations
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    told = dict(span.attributes)
    assert answer["id"].endswith(told["gen_ai.request.id"]) and told["gen_ai.usage.input_tokens"] == 3
    assert told["gen_ai.usage.output_tokens"] == 4 and told["baton.outcome"] == "finished"
    assert (told["baton.prefill_worker"], told["baton.policy"]) == (record.assignment.prefill_worker, "fake")
    assert (told["baton.cached_expected"], told["baton.cached_found"], told["baton.ttft_predicted_s"]) == (0, 2, 0.001)
    assert span.status.is_ok and 0 < span.end_time - span.start_time < 10e9
    assert [event.name for event in span.events] == ["attempt ended"]


async def test_a_retry_is_an_event_and_a_failure_an_error_and_no_span_is_left(cluster: Any, exported: Exported) -> None:
    """How: a worker dies under one request, then the router refuses another. Seen to
    fail with the span ended by its first attempt."""
    cluster.set(stop_before=2)

    async def ask() -> int:
        async with cluster.http.post("/v1/completions", json=BODY) as response:
            return int(response.status)

    task = asyncio.create_task(ask())
    await until(lambda: any(w.tasks for w in cluster.workers.values() if w.role.decodes))
    (placed,) = cluster.router.explanations
    await until(lambda: placed.first_token_s is not None)
    await cluster.workers[placed.assignment.decode_worker].kill()
    cluster.set(stop_before=None)
    assert await task == 200
    cluster.router.refuse = (429, "too much", 1.0)
    assert await ask() == 429
    await until(lambda: len(exported.spans) == 2)
    moved, refused = exported.spans
    assert [event.attributes["baton.state"] for event in moved.events] == ["lost", "finished"] and moved.status.is_ok
    assert not refused.status.is_ok and refused.attributes["baton.outcome"] == "failed"
    assert len(cluster.service._spans) == 0


async def test_an_odd_traceparent_begins_a_trace_of_its_own(cluster: Any, exported: Exported) -> None:
    async with cluster.http.post("/v1/completions", json=BODY, headers={"traceparent": "00-zz-1-01"}) as response:
        assert response.status == 200
    (span,) = exported.spans
    assert span.parent is None


def test_without_its_packages_an_endpoint_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail with a check that looks at the first package only."""
    assert open_spans("") is None
    known = importlib.util.find_spec
    monkeypatch.setattr(tracing, "find_spec", lambda name: None if "exporter" in name else known(name))
    with pytest.raises(ConfigError, match=r"baton-serve\[tracing\]"):
        check_packages("http://127.0.0.1:4318/v1/traces")
