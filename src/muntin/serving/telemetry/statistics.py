"""Sums over the requests to one version, for the statistics extension."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

from muntin.serving.protocol.metadata import BatchStatistics, Duration, Statistics


@dataclass
class _Sum:
    count: float = 0.0
    seconds: float = 0.0

    def add(self, seconds: float, count: float = 1.0) -> None:
        self.count += count
        self.seconds += max(seconds, 0.0)

    @property
    def duration(self) -> Duration:
        return Duration(count=round(self.count), ns=round(self.seconds * 1e9))


class Account:
    """Sums by the names of the protocol. A request of several rows counts once; a batch counts by each request's share of it."""

    def __init__(self) -> None:
        self._last_ms = self._rows = 0
        self._batches = 0.0
        self._sums: defaultdict[str, _Sum] = defaultdict(_Sum)
        self._by_size: defaultdict[int, defaultdict[str, _Sum]] = defaultdict(lambda: defaultdict(_Sum))

    def answered(self, *, rows: int, batch_rows: int, total: float, read: float, queued: float, computed: float) -> None:
        """Count an answered request of `rows` of the `batch_rows` that were computed together. Times are seconds.

        What reading, waiting and computing leave of `total` is the time that encoding the answer took.
        """
        encoded = max(total - read - queued - computed, 0.0)
        share = rows / batch_rows if batch_rows else 1.0
        self._last_ms = time.time_ns() // 1_000_000
        self._rows += rows
        self._batches += share
        parts = {"success": total, "queue": queued, "compute_input": read, "compute_infer": computed, "compute_output": encoded}
        for name, seconds in parts.items():
            self._sums[name].add(seconds)
        for name, seconds in (("compute_input", read), ("compute_infer", computed * share), ("compute_output", encoded)):
            self._by_size[batch_rows][name].add(seconds, share)

    def failed(self, total: float) -> None:
        """Count a request that was not answered, after `total` seconds."""
        self._last_ms = time.time_ns() // 1_000_000
        self._sums["fail"].add(total)

    def statistics(self, name: str, version: str) -> Statistics:
        """The sums as the protocol's statistics of a model and version."""
        return Statistics(
            name=name,
            version=version,
            last_inference_ms=self._last_ms,
            inference_count=self._rows,
            execution_count=round(self._batches),
            batches=tuple(
                BatchStatistics(batch_size=size, **{part: total.duration for part, total in parts.items()})
                for size, parts in sorted(self._by_size.items())
            ),
            **{part: total.duration for part, total in self._sums.items()},
        )
