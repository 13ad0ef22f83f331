"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
Reading = Callable[[], Iterable[tuple[tuple[str, ...], float]]]
"""(label values, value) for each series, read when Prometheus asks."""


class Metrics:
    """The server's counters and histograms. Cheap to change, read when `render` is called."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "muntin_requests", "Requests for inference, by face (http, grpc) and outcome.", ("face", "outcome"), registry=self.registry
        )
        self.rows = Counter("muntin_rows", "Images answered, by version.", ("version",), registry=self.registry)
        self.queue = Histogram(
            "muntin_queue_seconds", "From a request's admission to the start of its batch.", buckets=SECONDS, registry=self.registry
        )
        self.compute = Histogram(
            "muntin_compute_seconds", "Computation of the batch that a request was in.", buckets=SECONDS, registry=self.registry
        )
        self.total = Histogram(
            "muntin_request_seconds", "From a request's last byte to its answer's first.", buckets=SECONDS, registry=self.registry
        )
        self.batch = Histogram("muntin_batch_rows", "Rows of the batch that a request was in.", buckets=ROWS, registry=self.registry)
        self.late = Counter("muntin_objective_missed", "Answered requests that took longer than the objective.", registry=self.registry)
        self.shadow_dropped = Counter(
            "muntin_shadow_skipped", "Shadow computations left out since the candidate was behind.", registry=self.registry
        )

    def read(self, kind: str, name: str, text: str, labels: tuple[str, ...], reading: Reading) -> None:
        """Adds a gauge or a counter whose values lie elsewhere."""
        self.registry.register(_Read(kind, name, text, labels, reading))

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge without labels."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)


class _Read(Collector):
    def __init__(self, kind: str, name: str, text: str, labels: tuple[str, ...], reading: Reading) -> None:
        self._family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
        self._name, self._text, self._labels, self._reading = name, text, labels, reading

    def collect(self) -> Iterator[Metric]:
        family = self._family(self._name, self._text, labels=self._labels)
        for labels, value in self._reading():
            family.add_metric(labels, value)
        yield family

    def describe(self) -> Iterator[Metric]:
        yield self._family(self._name, self._text, labels=self._labels)
