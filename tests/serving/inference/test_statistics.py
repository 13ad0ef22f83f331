"""Sums for the statistics extension."""

from __future__ import annotations

from muntin.serving.inference.statistics import Account
from muntin.serving.protocol.metadata import Duration


def test_requests_of_one_batch() -> None:
    account = Account()
    for rows in (1, 3):
        account.answered(rows=rows, batch_rows=4, total=0.02, read=0.001, queued=0.004, computed=0.01)
    account.answered(rows=2, batch_rows=2, total=0.01, read=0.002, queued=0.0, computed=0.005)
    account.failed(0.5)
    statistics = account.statistics("m", "7")
    assert (statistics.name, statistics.version, statistics.inference_count, statistics.execution_count) == ("m", "7", 6, 2)
    assert statistics.success == Duration(count=3, ns=50_000_000)
    assert statistics.fail == Duration(count=1, ns=500_000_000)
    assert statistics.queue == Duration(count=3, ns=8_000_000)
    assert statistics.compute_input == Duration(count=3, ns=4_000_000)
    assert statistics.compute_infer == Duration(count=3, ns=25_000_000)
    assert statistics.compute_output == Duration(count=3, ns=13_000_000)
    parts = (statistics.queue, statistics.compute_input, statistics.compute_infer, statistics.compute_output)
    assert sum(part.ns for part in parts) == statistics.success.ns
    assert [(batch.batch_size, batch.compute_input.ns, batch.compute_infer, batch.compute_output.ns) for batch in statistics.batches] == [
        (2, 2_000_000, Duration(count=1, ns=5_000_000), 3_000_000),
        (4, 2_000_000, Duration(count=1, ns=10_000_000), 10_000_000),
    ]
    assert statistics.last_inference_ms > 1_700_000_000_000


def test_version_without_requests() -> None:
    statistics = Account().statistics("m", "1")
    assert (statistics.last_inference_ms, statistics.inference_count, statistics.batches) == (0, 0, ())
