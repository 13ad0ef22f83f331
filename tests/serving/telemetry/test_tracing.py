"""OpenTelemetry spans."""

from __future__ import annotations

import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from muntin.errors import DependencyError
from muntin.images import encode_png
from muntin.serving.inference.service import Answered
from muntin.serving.protocol.messages import InferOutput, InferResponse, ProtocolError
from muntin.serving.protocol.open_inference_pb2 import ModelInferRequest
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


def test_spans_at_a_collector(socketless: Any, write_pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[bytes] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    collector = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    traces = [f"{number:032x}" for number in (0xABC, 0xDEF, 0xFED)]
    parents = [("traceparent", f"00-{trace}-00000000000000ff-01") for trace in traces]
    pixel = b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 0, 0]}]}'
    message = ModelInferRequest(model_name="pixels", raw_input_contents=[b"abc"])
    message.inputs.add(name="images", datatype="UINT8", shape=[1, 1, 1, 3])
    tracing = Tracing()
    with socketless(write_pixels(tmp_path / "pixels"), tracing=tracing) as server:
        assert server.fetch("/v2/models/pixels/infer", pixel, dict(parents[:1]))[0] == 200
        server.call("ModelInfer", message.SerializeToString(), metadata=parents[1:2])
        assert server.fetch("/predict", encode_png(np.zeros((8, 8, 3), np.uint8)), dict(parents[2:]))[0] == 200
    tracing.close()
    collector.shutdown()
    collector.server_close()
    for trace in traces:
        assert any(bytes.fromhex(trace) in body for body in received)
    assert any(b"infer pixels" in body for body in received)
