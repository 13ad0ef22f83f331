"""Sums over the requests to each version, for the statistics extension."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import MutableMapping
from typing import Any

from muntin.serving.inference.metrics import Metrics
from muntin.serving.protocol.metadata import BatchStatistics, Duration, Statistics
from muntin.serving.versions.slot import Slot

UNLISTED = 16
"""Number of versions that the slot lists no more whose counts are kept; the oldest ones are forgotten first."""
_OF_A_BATCH = ("compute_input", "compute_infer", "compute_output")


class Account:
    """Sums of one version. A request of several rows counts once; a batch counts by each request's share of it."""

    def __init__(self) -> None:
        self._last_ms = self._rows = 0
        self._batches = 0.0
        self._counts, self._seconds = Counter[str](), defaultdict[str, float](float)
        self._by_size: defaultdict[int, list[float]] = defaultdict(lambda: [0.0] * 4)
        """Batches, and seconds of reading, computing and encoding, by rows of a batch."""

    def answered(self, *, rows: int, batch_rows: int, total: float, read: float, queued: float, computed: float) -> None:
        """Count an answered request of `rows` of the `batch_rows` that were computed together. Times are seconds.

        Encoding the answer took the rest of `total`.
        """
        encoded = max(total - read - queued - computed, 0.0)
        share = rows / batch_rows if batch_rows else 1.0
        self._rows += rows
        self._batches += share
        parts = {"success": total, "queue": queued, "compute_input": read, "compute_infer": computed, "compute_output": encoded}
        for name, seconds in parts.items():
            self._add(name, seconds)
        sums = self._by_size[batch_rows]
        for index, amount in enumerate((share, read, computed * share, encoded)):
            sums[index] += amount

    def failed(self, total: float) -> None:
        """Count a request that was not answered, after `total` seconds."""
        self._add("fail", total)

    def _add(self, name: str, seconds: float) -> None:
        self._last_ms = time.time_ns() // 1_000_000
        self._counts[name] += 1
        self._seconds[name] += max(seconds, 0.0)

    def statistics(self, name: str, version: str) -> Statistics:
        """The sums as the protocol's statistics of a model and version."""
        return Statistics(
            name=name,
            version=version,
            last_inference_ms=self._last_ms,
            inference_count=self._rows,
            execution_count=round(self._batches),
            batches=tuple(
                BatchStatistics(
                    batch_size=size,
                    **{name: _duration(count, seconds) for name, seconds in zip(_OF_A_BATCH, parts, strict=True)},
                )
                for size, (count, *parts) in sorted(self._by_size.items())
            ),
            **{part: _duration(count, self._seconds[part]) for part, count in self._counts.items()},
        )


def _duration(count: float, seconds: float) -> Duration:
    return Duration(count=round(count), ns=round(seconds * 1e9))


class Accounts:
    """Counts by version, for the event loop only. A server may see thousands of versions, so it forgets old ones."""

    def __init__(self, slot: Slot, metrics: Metrics) -> None:
        self._slot, self._metrics = slot, metrics
        self._accounts: dict[str, Account] = {}

    def __contains__(self, version: str) -> bool:
        return version in self._accounts

    def of(self, version: str) -> Account:
        """The account of a version, opened if it has none."""
        if version not in self._accounts:
            self._accounts[version] = Account()
            self._forget()
        return self._accounts[version]

    def count_rows(self, version: str, rows: int) -> None:
        """Count computed rows in the metrics."""
        if version not in self._metrics.rows:
            self._forget()
        self._metrics.rows[version] += rows

    def statistics(self, model: str, version: str | None) -> list[Statistics]:
        """Statistics of one version, or of the current one and each that answered or failed a request."""
        current = self._slot.current
        versions = (version,) if version else dict.fromkeys((*self._accounts, *(() if current is None else (current.name,))))
        return [self._accounts.get(name, Account()).statistics(model, name) for name in versions]

    def _forget(self) -> None:
        """Drop the counts of versions that the slot lists no more, except the last `UNLISTED`."""
        listed = {entry.version for entry in self._slot.index()}
        counts: tuple[MutableMapping[str, Any], ...] = (self._accounts, self._metrics.rows)
        for by_version in counts:
            for version in [name for name in by_version if name not in listed][:-UNLISTED]:
                del by_version[version]
