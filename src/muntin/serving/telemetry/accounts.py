"""What each version was asked, for the statistics extension."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from muntin.serving.protocol.metadata import Statistics
from muntin.serving.telemetry.metrics import Metrics
from muntin.serving.telemetry.statistics import Account
from muntin.serving.versions.slot import Slot

UNLISTED = 16
"""Number of versions that the slot lists no more whose counts are kept; those that were asked first are forgotten first."""


class Accounts:
    """Counts by version, for the event loop only. A server may see thousands of versions, so it forgets old ones."""

    def __init__(self, slot: Slot, metrics: Metrics) -> None:
        self._slot, self._metrics = slot, metrics
        self._accounts: dict[str, Account] = {}

    def __contains__(self, version: str) -> bool:
        return version in self._accounts

    def of(self, version: str) -> Account:
        """The account of a version, opened if it has none."""
        account = self._accounts.get(version)
        if account is None:
            account = self._accounts[version] = Account()
            self.forget()
        return account

    def count_rows(self, version: str, rows: int) -> None:
        """Count computed rows in the metrics."""
        if version not in self._metrics.rows:
            self.forget()
        self._metrics.rows[version] += rows

    def statistics(self, model: str, version: str | None) -> list[Statistics]:
        """Statistics of one version, or of the current one and each that was asked."""
        if version is not None:
            return [self._accounts.get(version, Account()).statistics(model, version)]
        current = self._slot.current
        versions = dict.fromkeys((*self._accounts, *(() if current is None else (current.name,))))
        return [self._accounts.get(name, Account()).statistics(model, name) for name in versions]

    def forget(self) -> None:
        """Drop the counts of versions that the slot lists no more, except the last `UNLISTED`."""
        listed = {entry.version for entry in self._slot.index()}
        counts: tuple[MutableMapping[str, Any], ...] = (self._accounts, self._metrics.rows)
        for by_version in counts:
            for version in [name for name in by_version if name not in listed][:-UNLISTED]:
                del by_version[version]
