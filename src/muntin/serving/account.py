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
class Account:
    """Sums over the requests to one version. A request of several rows is one; a batch counts by its share of it that each request had."""

    last_ms: int = 0
    rows: int = 0
    batches: float = 0.0
    success: _Sum = field(default_factory=_Sum)
    fail: _Sum = field(default_factory=_Sum)
    queue: _Sum = field(default_factory=_Sum)
    compute: _Sum = field(default_factory=_Sum)
    by_size: dict[int, tuple[list[float], _Sum]] = field(default_factory=dict)

    def answered(self, *, rows: int, batch_rows: int, total: float, queued: float, computed: float) -> None:
        """A request that was answered, in seconds; it was `rows` of the `batch_rows` that were computed together."""
        self.last_ms = time.time_ns() // 1_000_000
        self.rows += rows
        self.success.add(total)
        self.queue.add(queued)
        self.compute.add(computed)
        share = rows / batch_rows if batch_rows else 1.0
        self.batches += share
        shares, seconds = self.by_size.setdefault(batch_rows, ([0.0], _Sum()))
        shares[0] += share
        seconds.seconds += computed * share

    def failed(self, total: float) -> None:
        """A request that was not answered."""
        self.last_ms = time.time_ns() // 1_000_000
        self.fail.add(total)

    def statistics(self, name: str, version: str) -> Statistics:
        """As the protocol has it."""
        none = Duration(count=self.success.count)
        return Statistics(
            name=name,
            version=version,
            last_inference_ms=self.last_ms,
            inference_count=self.rows,
            execution_count=round(self.batches),
            success=self.success.duration,
            fail=self.fail.duration,
            queue=self.queue.duration,
            compute_input=none,
            compute_infer=self.compute.duration,
            compute_output=none,
            batches=tuple(
                BatchStatistics(
                    batch_size=size,
                    compute_input=Duration(count=round(shares[0])),
                    compute_infer=Duration(count=round(shares[0]), ns=round(seconds.seconds * 1e9)),
                    compute_output=Duration(count=round(shares[0])),
                )
                for size, (shares, seconds) in sorted(self.by_size.items())
            ),
        )
