"""Spans: what is in them, whose children they are, and that a missing package is named."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from muntin.errors import DependencyError
from muntin.serving.protocol import InferOutput, InferResponse, ProtocolError
from muntin.serving.service import Answered
from muntin.serving.tracing import Tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ANSWERED = Answered(
    response=InferResponse(model="m", version="3", id="a", outputs=(InferOutput(name="labels", data=np.zeros(1, np.uint8)),)),
    read=0.0005, queued=0.001, computed=0.02, total=0.03, batch_rows=4, started=12.5,
)  # fmt: skip


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Iterator[Tracing]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield Tracing(provider)
    provider.shutdown()


def test_a_span_says_how_the_answer_came_about(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    with tracing.inference("http", "m", {"traceparent": PARENT}) as span:
        span.answered(ANSWERED)
    (found,) = exporter.get_finished_spans()
    assert found.parent is not None
    assert f"{found.context.trace_id:032x}" == PARENT.split("-")[1]
    attributes: Any = found.attributes
    assert attributes["muntin.version"] == "3"
    assert attributes["muntin.batch_rows"] == 4
    assert attributes["muntin.compute_ms"] == pytest.approx(20)


def test_what_fails_is_in_the_span_and_raised(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    with pytest.raises(ProtocolError), tracing.inference("grpc", "m", {"traceparent": "nonsense"}):
        raise ProtocolError("no such output")
    (found,) = exporter.get_finished_spans()
    assert found.parent is None
    assert not found.status.is_ok
    assert "no such output" in str(found.status.description)


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(DependencyError, match=r"pip install .*\[otel\]"):
        Tracing()
