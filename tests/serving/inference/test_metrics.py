"""The metrics, as Prometheus reads them."""

from __future__ import annotations

import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from muntin.serving.inference.metrics import Metrics, row_bounds


def test_render() -> None:
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


def test_batch_size_bounds() -> None:
    assert row_bounds(1) == (1,)
    assert row_bounds(8) == (1, 2, 4, 8)
    assert row_bounds(12) == (1, 2, 4, 8, 12)
    assert row_bounds(1024)[-2:] == (512, 1024)
    metrics = Metrics(max_rows=1024)
    metrics.batch.observe(1000)
    assert b'muntin_batch_rows_bucket{le="1024.0"} 1.0' in metrics.render()
    assert b'muntin_batch_rows_bucket{le="512.0"} 0.0' in metrics.render()


def test_counter_without_labels() -> None:
    metrics = Metrics()
    metrics.count("muntin_dropped", "Dropped.", lambda: 3)
    assert b"# TYPE muntin_dropped_total counter\nmuntin_dropped_total 3.0" in metrics.render()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_process_metrics() -> None:
    text = Metrics().render()
    for name in (b"process_resident_memory_bytes", b"process_cpu_seconds_total", b"process_open_fds", b"process_start_time_seconds"):
        assert b"\n" + name in text


def test_two_servers_in_one_process() -> None:
    one, two = Metrics(), Metrics()
    one.late.inc()
    assert b"muntin_objective_missed_total 1.0" in one.render()
    assert b"muntin_objective_missed_total 0.0" in two.render()
