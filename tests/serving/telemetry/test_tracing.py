"""OpenTelemetry spans."""

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
from muntin.serving.inference.service import Answered
from muntin.serving.protocol.messages import InferOutput, InferResponse, ProtocolError
from muntin.serving.telemetry.tracing import Tracing, set_answer

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ANSWERED = Answered(
    response=InferResponse(model="m", version="3", id="a", outputs=(InferOutput(name="labels", data=np.zeros(1, np.uint8)),)),
    read=0.0005, queued=0.001, computed=0.02, total=0.03, batch_rows=4,
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


def test_span_of_an_answer(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    with tracing.inference("http", "m", {"traceparent": PARENT}) as span:
        set_answer(span, ANSWERED)
    (span,) = exporter.get_finished_spans()
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    attributes: Any = span.attributes
    assert attributes["muntin.version"] == "3"
    assert attributes["muntin.batch_rows"] == 4
    assert attributes["muntin.compute_ms"] == pytest.approx(20)


def test_span_of_an_error(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    with pytest.raises(ProtocolError), tracing.inference("grpc", "m", {"traceparent": "nonsense"}):
        raise ProtocolError("no such output")
    (span,) = exporter.get_finished_spans()
    assert span.parent is None
    assert not span.status.is_ok
    assert "no such output" in str(span.status.description)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(DependencyError, match=r"pip install .*\[otel\]"):
        Tracing()
