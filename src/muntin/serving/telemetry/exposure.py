"""Metrics that are read from other parts of the server when Prometheus asks."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

from muntin.runtime.host.memory import resident_of
from muntin.serving.batching.workers import Runner
from muntin.serving.inference.metrics import Metrics
from muntin.serving.inference.service import Service
from muntin.serving.memory_budget import MemoryBudget
from muntin.serving.telemetry.access_log import AccessLog
from muntin.serving.telemetry.samples import SampleKeeper
from muntin.serving.versions.slot import Slot
from muntin.serving.worker.liveness import liveness_of
from muntin.serving.worker.opening import NotReadyError


def expose(
    metrics: Metrics, service: Service, runner: Runner, budget: MemoryBudget, log: AccessLog | None, samples: SampleKeeper | None = None
) -> None:
    """Add the series of the service, the runner, the memory budget, the access log and the kept samples."""
    slot, recoveries = service.slot, service.executor.recoveries
    metrics.gauge("muntin_ready", "Whether a request would be admitted.", lambda: service.ready)
    metrics.gauge("muntin_body_bytes", "Bytes held by request bodies, and by large answers being sent.", lambda: budget.held)
    metrics.gauge("muntin_waiting_rows", "Rows (images) that wait for their batch.", lambda: runner.snapshot().waiting_rows)
    metrics.gauge("muntin_backlog_seconds", "Computation that waits.", lambda: runner.snapshot().backlog_s)
    metrics.gauge("muntin_hanging", "Threads that wait for an engine that does not answer.", lambda: runner.hanging)
    if log is not None:
        metrics.count("muntin_access_log_lost", "Lines of the access log that could not be written.", lambda: log.lost)
    count, read = metrics.count, metrics.read
    if samples is not None:
        count("muntin_samples_kept", "Pictures that were kept as files.", lambda: samples.kept)
        metrics.gauge("muntin_samples_bytes", "Size of the kept files.", lambda: samples.bytes)
        dropped = samples.dropped
        read(
            "counter", "muntin_samples_dropped", "Pictures that were drawn and not kept, by reason.", ("reason",),
            lambda: [((reason,), number) for reason, number in dropped.items()],
        )  # fmt: skip
    count("muntin_admitted", "Requests, and tiles of pictures, that were admitted.", lambda: runner.snapshot().admitted)
    count("muntin_dropped", "Admitted requests whose time passed, or that were waiting at shutdown.", lambda: runner.snapshot().dropped)
    count("muntin_cancelled", "Admitted requests that were cancelled before they were computed.", lambda: runner.snapshot().cancelled)
    count("muntin_rows_one_by_one", "Batches computed row by row for want of memory.", lambda: recoveries.rows)
    count("muntin_images_in_tiles", "Images computed in tiles for want of memory.", lambda: recoveries.tiles)
    read(
        "counter", "muntin_refused", "Requests refused before admission, by reason.", ("reason",),
        lambda: [
            *(((kind,), count) for kind, count in runner.snapshot().refused.items()),
            *(((reason,), metrics.refused[reason]) for reason in ("no version", "large answers", "pictures")),
        ],
    )  # fmt: skip
    read(
        "gauge", "muntin_version_ready", "Versions that can answer.", ("version",),
        lambda: [((entry.version,), 1) for entry in slot.index() if entry.state == "READY"],
    )  # fmt: skip
    read(
        "counter", "muntin_engine_deaths", "Processes of a version's engine that ended, or were ended because they hung.", ("version",),
        lambda: [((version,), count) for version, count in slot.deaths().items()],
    )  # fmt: skip
    read(
        "gauge", "muntin_engine_resident_memory_bytes", "Memory of the process of a version's engine.", ("version",),
        lambda: [((version,), size) for version, size in _memory_by_version(slot).items()],
    )  # fmt: skip
    read(
        "counter", "muntin_connections_refused", "Requests refused before their body was complete, by status.", ("status",),
        lambda: [((str(status),), count) for status, count in budget.refused.items()],
    )  # fmt: skip


def _memory_by_version(slot: Slot) -> Counter[str]:
    """Return the bytes of the engines' processes by version name: an artefact that is loaded again keeps its name."""
    memory: Counter[str] = Counter()
    for version in slot.open:
        with suppress(NotReadyError):  # unloaded meanwhile
            memory[version.name] += sum(resident_of(process) or 0 for process in liveness_of(version.session).process_ids)
    return memory
