"""The server's metrics in the form that Prometheus reads.

Only the event loop counts. Counters with labels are plain dictionaries, read when Prometheus asks, so those of old versions can be dropped.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
Reading = Callable[[], Iterable[tuple[tuple[str, ...], float]]]
"""Returns (label values, value) for each series; called when Prometheus asks."""


class Metrics:
    """The server's counters and histograms, used on one thread. `max_rows`: rows of the largest batch."""

    def __init__(self, *, max_rows: int = 128) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.refused: Counts[str] = Counts()
        """Requests that were refused before the batcher was asked, by reason."""
        self.requests: Counts[tuple[str, str]] = Counts()
        self.rows: Counts[str] = Counts()
        self.read(
            "counter", "muntin_requests", "Requests for inference, pictures too, by face (http, grpc) and outcome.", ("face", "outcome"),
            self.requests.items,
        )  # fmt: skip
        self.read(
            "counter", "muntin_rows", "Rows (images) computed, by version; of a picture in tiles, each tile.", ("version",),
            lambda: [((version,), count) for version, count in self.rows.items()],
        )  # fmt: skip
        seconds = partial(Histogram, buckets=SECONDS, registry=self.registry)
        self.queue = seconds("muntin_queue_seconds", "From a request's admission to the start of its batch.")
        self.compute = seconds("muntin_compute_seconds", "Computation of the batch that a request was in.")
        self.total = seconds("muntin_request_seconds", "From a request's last byte to its answer's first; no pictures.")
        self.batch = Histogram(
            "muntin_batch_rows", "Rows of the batch that a request was in.", buckets=row_bounds(max_rows), registry=self.registry
        )
        self.late = Counter("muntin_objective_missed", "Answered requests that took longer than the objective.", registry=self.registry)
        self.shadow_dropped = Counter(
            "muntin_shadow_skipped", "Shadow computations left out since the candidate was behind.", registry=self.registry
        )

    def read(self, kind: str, name: str, text: str, labels: tuple[str, ...], reading: Reading) -> None:
        """Add a gauge or a counter whose values are read elsewhere."""
        self.registry.register(_Read(kind, name, text, labels, reading))

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge without labels."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def count(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a counter without labels."""
        self.read("counter", name, text, (), lambda: [((), value())])

    def sums(self, *histograms: str) -> dict[str, tuple[int, float]]:
        """Return (number, sum) of what these histograms, attributes of this object, have observed."""
        samples = {name: {sample.name.rpartition("_")[2]: sample.value for sample in _samples(getattr(self, name))} for name in histograms}
        return {name: (int(values["count"]), values["sum"]) for name, values in samples.items()}

    def render(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


def _samples(histogram: Histogram) -> list[Sample]:
    return [sample for family in histogram.collect() for sample in family.samples]


def row_bounds(most: int) -> tuple[int, ...]:
    """Bounds of the histogram of batch sizes: the powers of two below the rows of the largest batch, and that number."""
    return (*(1 << n for n in range((most - 1).bit_length())), most)


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
