"""JSON documents of a model and of the server, for the page."""

from __future__ import annotations

from typing import Any

from muntin.artifact import Signature
from muntin.serving.http.image_route import refusal
from muntin.serving.inference.service import Service
from muntin.serving.protocol.metadata import VERSION


def model_document(service: Service, version: str) -> dict[str, Any]:
    """Describe a version in service. `refusal`: why it takes no picture files, or "". Raises ProtocolError as `Service.lease` does."""
    with service.lease(service.name, version, canary=False) as lease:
        signature = lease.version.signature
    document = {"task": signature.task, "refusal": refusal(signature), "classes": [], "scale": 1}
    if isinstance(signature, Signature):
        document |= {"classes": [{"name": entry.name, "color": entry.color} for entry in signature.classes], "scale": signature.scale}
    return document


def status_document(service: Service) -> dict[str, Any]:
    """Describe the server at this moment.

    `current`: the version that answers, or None. `versions`: those that the repository's index lists; `digest`: of its artefact, "" out of
    service; `rows`: computed since the start, images and tiles. `sums`: (number, sum) of each histogram since the start, seconds and rows.
    """
    slot, snapshot = service.slot, service.runner.snapshot()
    digests = {version.name: version.digest for version in slot.open}
    current = slot.current
    versions = [
        {
            "version": entry.version,
            "state": entry.state,
            "reason": entry.reason,
            "digest": digests.get(entry.version, ""),
            "rows": service.metrics.rows[entry.version],
        }
        for entry in slot.index()
    ]
    return {
        "muntin": VERSION,
        "model": service.name,
        "ready": service.ready,
        "current": None if current is None else current.name,
        "versions": versions,
        "canary": slot.rollout.canary,
        "shadow": slot.rollout.shadow,
        "waiting": snapshot.waiting_rows,
        "running": snapshot.running_rows,
        "max_batch": service.max_rows,
        "objective": service.objective,
        "refused": sum(snapshot.refused.values()) + sum(service.metrics.refused.values()),
        "sums": service.metrics.sums("queue", "compute", "batch"),
    }
