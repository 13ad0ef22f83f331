"""Metrics that are read from other parts of the server when Prometheus asks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from muntin.runtime.host.memory import resident_of
from muntin.runtime.session import Session
from muntin.serving.batching.workers import Runner
from muntin.serving.inference.service import Service
from muntin.serving.memory_budget import MemoryBudget
from muntin.serving.telemetry.access_log import AccessLog
from muntin.serving.telemetry.metrics import Metrics
from muntin.serving.versions.slot import Slot
from muntin.serving.worker.liveness import liveness_of
from muntin.serving.worker.opening import NotReadyError


def expose(metrics: Metrics, service: Service, runner: Runner, budget: MemoryBudget, log: AccessLog | None) -> None:
    """Add the series of the service, the runner, the memory budget and the access log."""
    if log is not None:
        metrics.count("muntin_access_log_lost", "Lines of the access log that could not be written.", lambda: log.lost)
    metrics.gauge("muntin_ready", "Whether a request would be admitted.", lambda: float(service.ready))
    metrics.gauge("muntin_body_bytes", "Bytes held by request bodies, and by large answers being sent.", lambda: float(budget.held))
    metrics.gauge("muntin_waiting_rows", "Images that wait for their batch.", lambda: float(runner.snapshot().waiting_rows))
    metrics.gauge("muntin_backlog_seconds", "Computation that waits.", lambda: runner.snapshot().backlog_s)
    metrics.gauge("muntin_hanging", "Threads that wait for an engine that does not answer.", lambda: float(runner.hanging))
    counters: dict[str, tuple[str, Callable[[], int]]] = {
        "admitted": ("Requests, and tiles of pictures, that were admitted.", lambda: runner.snapshot().admitted),
        "dropped": ("Admitted requests whose time passed, or that were waiting at shutdown.", lambda: runner.snapshot().dropped),
        "cancelled": ("Admitted requests that were cancelled before they were computed.", lambda: runner.snapshot().cancelled),
        "rows_one_by_one": ("Batches computed row by row for want of memory.", lambda: service.executor.recoveries.rows),
        "images_in_tiles": ("Images computed in tiles for want of memory.", lambda: service.executor.recoveries.tiles),
    }
    for name, (text, count) in counters.items():
        metrics.count(f"muntin_{name}", text, count)
    metrics.read(
        "counter", "muntin_refused", "Requests refused before admission, by reason.", ("reason",),
        lambda: [
            *(((kind,), float(count)) for kind, count in runner.snapshot().refused.items()),
            *(((reason,), float(metrics.refused[reason])) for reason in ("no version", "large answers", "pictures")),
        ],
    )  # fmt: skip
    metrics.read(
        "gauge", "muntin_version_ready", "Versions that can answer.", ("version",),
        lambda: [((entry.version,), 1.0) for entry in service.slot.index() if entry.state == "READY"],
    )  # fmt: skip
    metrics.read(
        "counter", "muntin_engine_deaths", "Processes of a version's engine that ended, or were ended because they hung.", ("version",),
        lambda: [((version,), float(count)) for version, count in service.slot.deaths().items()],
    )  # fmt: skip
    metrics.read(
        "gauge", "muntin_engine_resident_memory_bytes", "Memory of the process of a version's engine.", ("version",),
        lambda: _by_version(service.slot, _memory_of),
    )  # fmt: skip
    metrics.read(
        "counter", "muntin_connections_refused", "Requests refused before their body was complete, by status.", ("status",),
        lambda: [((str(status),), float(count)) for status, count in budget.refused.items()],
    )  # fmt: skip


def _by_version(slot: Slot, figure: Callable[[Session], float]) -> list[tuple[tuple[str], float]]:
    """Sum a figure of the open versions by name: an artefact that is loaded again keeps its name."""
    figures: dict[str, float] = {}
    for version in slot.open:
        with suppress(NotReadyError):  # unloaded meanwhile
            figures[version.name] = figures.get(version.name, 0.0) + figure(version.session)
    return [((name,), value) for name, value in figures.items()]


def _memory_of(session: Session) -> float:
    return float(sum(resident_of(process) or 0 for process in liveness_of(session).process_ids))
