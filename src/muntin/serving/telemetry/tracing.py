"""An OpenTelemetry span for each inference and each picture, a child of the client's span (`traceparent`) if there is one.

Needs the extra `otel`. OpenTelemetry's environment variables say where spans go: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME,
OTEL_TRACES_SAMPLER.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from muntin.errors import DependencyError, install
from muntin.serving.inference.service import Answered

SERVICE = "muntin"


class Tracing:
    """Makes spans. `provider`: an OpenTelemetry TracerProvider; by default one that exports as the environment says.

    Raises DependencyError if OpenTelemetry is not installed.
    """

    def __init__(self, provider: Any = None) -> None:
        try:
            from opentelemetry import propagate, trace

            self._provider = _exporting_provider() if provider is None else provider
        except ModuleNotFoundError as error:
            raise DependencyError(f"tracing needs the package {error.name}: {install('otel')}, or leave --trace out") from error
        self._own = provider is None
        self._trace, self._extract = trace, propagate.extract
        self._tracer = self._provider.get_tracer("muntin.serving", version("muntin"))

    @contextmanager
    def inference(self, face: str, model: str, carrier: Mapping[str, str]) -> Iterator[Any]:
        """Put a span around the block, with the error that the block raises. `carrier`: header fields, names in lower case."""
        with self._tracer.start_as_current_span(
            f"infer {model}",
            context=self._extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes={"rpc.system": face, "muntin.model": model},
        ) as span:
            yield span

    def close(self) -> None:
        """Export the spans that are not exported yet."""
        if self._own:
            self._provider.shutdown()


def set_answer(span: Any, answered: Answered) -> None:
    """Add the attributes of an answer to its span."""
    span.set_attributes(
        {
            "muntin.version": answered.response.version,
            "muntin.request_id": answered.response.id,
            "muntin.read_ms": answered.read * 1e3,
            "muntin.queue_ms": answered.queued * 1e3,
            "muntin.compute_ms": answered.computed * 1e3,
            "muntin.batch_rows": answered.batch_rows,
        }
    )


def _exporting_provider() -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # `create` gives OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES precedence over a default that is merged first
    provider = TracerProvider(resource=Resource({SERVICE_NAME: SERVICE}).merge(Resource.create()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
