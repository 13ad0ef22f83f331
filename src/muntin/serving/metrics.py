"""What a server counts, as Prometheus reads it.

The event loop alone counts, so what it counts for every answer needs no locks and no children looked up by their labels: numbers that are
put into the form of Prometheus when it asks. With the library's own counters this was a tenth of the loop's time at a small classifier.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
Reading = Callable[[], Iterable[tuple[tuple[str, ...], float]]]
"""(label values, value) for each series, read when Prometheus asks."""


class Metrics:
    """The server's counters and histograms. Cheap to change, for one thread; read when `render` is called, on the same.

    `max_rows`: of a batch.
    """

    def __init__(self, *, max_rows: int = 128) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.refused: Counts[str] = Counts()
        """Requests that were refused without asking the batcher, by reason."""
        self.requests: Counts[tuple[str, str]] = Counts()
        self.rows: Counts[str] = Counts()
        self.read(
            "counter", "muntin_requests", "Requests for inference, pictures too, by face (http, grpc) and outcome.", ("face", "outcome"),
            lambda: [(key, float(count)) for key, count in self.requests.items()],
        )  # fmt: skip
        self.read(
            "counter", "muntin_rows", "Images computed, by version; of a picture that is computed in tiles, each tile.", ("version",),
            lambda: [((version,), float(count)) for version, count in self.rows.items()],
        )  # fmt: skip
        self.queue = self._histogram("muntin_queue_seconds", "From a request's admission to the start of its batch.", SECONDS)
        self.compute = self._histogram("muntin_compute_seconds", "Computation of the batch that a request was in.", SECONDS)
        self.total = self._histogram("muntin_request_seconds", "From a request's last byte to its answer's first; no pictures.", SECONDS)
        self.batch = self._histogram("muntin_batch_rows", "Rows of the batch that a request was in.", row_bounds(max_rows))
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

    def count(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a counter without labels."""
        self.read("counter", name, text, (), lambda: [((), float(value()))])

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, bounds)
        self.registry.register(histogram)
        return histogram

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)


def row_bounds(most: int) -> tuple[int, ...]:
    """The powers of two below the rows of the largest batch, and those."""
    return (*(1 << n for n in range((most - 1).bit_length())), most)


class Histogram(Collector):
    """Counts values by the first of the bounds that is not below them."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        names = (*map(floatToGoString, self._bounds), "+Inf")
        yield HistogramMetricFamily(
            self._name, self._text, [(name, float(count)) for name, count in zip(names, accumulate(self._counts), strict=True)], self._sum
        )

    def describe(self) -> Iterator[Metric]:
        yield HistogramMetricFamily(self._name, self._text)


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
