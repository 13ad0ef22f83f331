"""What one version was asked and what became of it, in the sums that the statistics extension wants."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from muntin.serving.description import BatchStatistics, Duration, Statistics


@dataclass(kw_only=True)
class _Sum:
    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += max(seconds, 0.0)

    @property
    def duration(self) -> Duration:
        return Duration(count=self.count, ns=round(self.seconds * 1e9))


@dataclass(kw_only=True)
class _Batches:
    """Of one size. A batch's requests are read one after the other, and so are their answers put into form."""

    count: float = 0.0
    read: float = 0.0
    computed: float = 0.0
    formed: float = 0.0

    def part(self, seconds: float) -> Duration:
        return Duration(count=round(self.count), ns=round(seconds * 1e9))


@dataclass(kw_only=True)
class Account:
    """Sums over the requests to one version. A request of several rows is one; a batch counts by its share of it that each request had."""

    last_ms: int = 0
    rows: int = 0
    batches: float = 0.0
    success: _Sum = field(default_factory=_Sum)
    fail: _Sum = field(default_factory=_Sum)
    queue: _Sum = field(default_factory=_Sum)
    read: _Sum = field(default_factory=_Sum)
    compute: _Sum = field(default_factory=_Sum)
    formed: _Sum = field(default_factory=_Sum)
    by_size: dict[int, _Batches] = field(default_factory=dict)

    def answered(self, *, rows: int, batch_rows: int, total: float, read: float, queued: float, computed: float) -> None:
        """A request that was answered, in seconds; it was `rows` of the `batch_rows` that were computed together. What reading, waiting and
        computing leave of `total` went into its answer's form."""
        formed = max(total - read - queued - computed, 0.0)
        self.last_ms = time.time_ns() // 1_000_000
        self.rows += rows
        self.success.add(total)
        self.queue.add(queued)
        self.read.add(read)
        self.compute.add(computed)
        self.formed.add(formed)
        share = rows / batch_rows if batch_rows else 1.0
        self.batches += share
        batches = self.by_size.setdefault(batch_rows, _Batches())
        batches.count += share
        batches.read += read
        batches.computed += computed * share
        batches.formed += formed

    def failed(self, total: float) -> None:
        """A request that was not answered."""
        self.last_ms = time.time_ns() // 1_000_000
        self.fail.add(total)

    def statistics(self, name: str, version: str) -> Statistics:
        """As the protocol has it."""
        return Statistics(
            name=name,
            version=version,
            last_inference_ms=self.last_ms,
            inference_count=self.rows,
            execution_count=round(self.batches),
            success=self.success.duration,
            fail=self.fail.duration,
            queue=self.queue.duration,
            compute_input=self.read.duration,
            compute_infer=self.compute.duration,
            compute_output=self.formed.duration,
            batches=tuple(
                BatchStatistics(
                    batch_size=size,
                    compute_input=batches.part(batches.read),
                    compute_infer=batches.part(batches.computed),
                    compute_output=batches.part(batches.formed),
                )
                for size, batches in sorted(self.by_size.items())
            ),
        )
