"""What Prometheus reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from muntin.serving.metrics import SECONDS, Metrics


def test_what_is_counted_is_read() -> None:
    metrics = Metrics()
    metrics.requests["http", "answered"] += 1
    metrics.queue.observe(0.003)
    metrics.gauge("muntin_ready", "Ready.", lambda: 1.0)
    metrics.read("gauge", "muntin_version_ready", "Versions.", ("version",), lambda: [(("3",), 1.0)])
    metrics.read("counter", "muntin_refused", "Refused.", ("status",), lambda: [(("413",), 2.0), (("431",), 1.0)])
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    assert families["muntin_requests"].samples[0].labels == {"face": "http", "outcome": "answered"}
    assert families["muntin_ready"].samples[0].value == 1
    assert families["muntin_version_ready"].samples[0].labels == {"version": "3"}
    assert {sample.labels["status"]: sample.value for sample in families["muntin_refused"].samples} == {"413": 2, "431": 1}
    buckets = {sample.labels["le"]: sample.value for sample in families["muntin_queue_seconds"].samples if "le" in sample.labels}
    assert (buckets["0.002"], buckets["0.005"], buckets["+Inf"]) == (0, 1, 1)


def test_a_histogram_is_the_librarys_own() -> None:
    registry, metrics = CollectorRegistry(), Metrics()
    theirs = Histogram("muntin_queue_seconds", "From a request's admission to the start of its batch.", buckets=SECONDS, registry=registry)
    for value in (0.0, 0.0005, 0.0006, 0.3, 10.0, 11.0, -1e-9):
        theirs.observe(value)
        metrics.queue.observe(value)

    def samples(text: bytes) -> list[tuple[str, dict[str, str], float]]:
        families = {family.name: family for family in text_string_to_metric_families(text.decode())}
        return [(s.name, s.labels, s.value) for s in families["muntin_queue_seconds"].samples if not s.name.endswith("_created")]

    assert sorted(map(str, samples(metrics.render()))) == sorted(map(str, samples(generate_latest(registry))))


def test_two_servers_in_a_process_count_apart() -> None:
    one, two = Metrics(), Metrics()
    one.late.inc()
    assert b"muntin_objective_missed_total 1.0" in one.render()
    assert b"muntin_objective_missed_total 0.0" in two.render()
