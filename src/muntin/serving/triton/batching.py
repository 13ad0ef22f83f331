"""How a Triton batches a model, derived from an objective and the artefact's measured latencies.

Let t(n) be the median time of a batch of n rows and T the objective. A request may wait for one batch that runs, and is then computed:

    largest batch m           the largest measured n with 2 t(n) <= T; 1 if there is none
    delay for others to join  min(t(1) - t(m) / m, T - 2 t(m)), at least 0

A row that waits gains at most t(1) - t(m) / m by being computed in a batch, so waiting longer costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from muntin.artifact import Artifact, Manifest, Signature
from muntin.errors import DataError
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.inputs import LABELS, SCORES
from muntin.runtime.profiling.timing import interleaved_latency
from muntin.runtime.session import Session
from muntin.serving.triton.options import TritonOptions
from muntin.serving.worker.calls import Call, starting_calls
from muntin.serving.worker.opening import open_version

ROUNDS = 15
"""Timed calls of each size of batch."""


@dataclass(frozen=True, kw_only=True)
class TritonBatching:
    """Triton's queue of a model. `_us`: microseconds.

    `delay_us`: time that a request waits for others. `preferred_rows`: rows that are computed without further waiting; None: as many as
    fit. `latency_ms`: measured time by rows.
    """

    delay_us: int = 0
    preferred_rows: int | None = None
    latency_ms: Mapping[int, float] = field(default_factory=dict)


def batching_for(objective_ms: float, latency_ms: Mapping[int, float]) -> TritonBatching:
    """Return the batching for an objective and the times of batches by rows, one row among them."""
    fitting = [rows for rows, ms in latency_ms.items() if 2 * ms <= objective_ms]
    rows = max(fitting, default=1)
    one, batch = latency_ms[1], latency_ms[rows]
    delay = max(0.0, min(one - batch / rows, objective_ms - 2 * batch))
    return TritonBatching(
        delay_us=int(1000 * delay),
        preferred_rows=rows if rows < max(latency_ms) else None,
        latency_ms=dict(latency_ms),
    )


def measured_batching(artifact: Artifact, options: TritonOptions) -> TritonBatching:
    """Measure batches of the exported size on this machine, in sizes of powers of two, and return the batching for the objective.

    Without an objective nothing is measured, and requests wait for no others. Segmentations and classifiers are measured for labels. Raises
    DataError for an artefact without an exported size and without `sizes` or `dims`, and for one whose requests are not joined; and the
    errors of `open_version`.
    """
    if options.objective_ms is None:
        return TritonBatching()
    if (artifact.manifest.named is not None) and artifact.manifest.signature.tensors.batch is None:
        raise DataError(f"--objective-ms: {artifact.path} has no rows that could be joined, so nothing is batched: leave it out")
    calls: dict[int, Call] = {}
    for call in _first_size(artifact.manifest, options):  # those for labels come first
        rows = call.order[0]
        if rows.bit_count() == 1:
            calls.setdefault(rows, call)
    session = open_version(artifact.path, options.session(physical_cores()), calls.values()).session
    latency_ms = {}
    for rows, call in calls.items():
        compute, batch = _computation(session, call)
        latency_ms[rows] = interleaved_latency({"": compute}, batch, rounds=ROUNDS)[""].median_ms
    return batching_for(options.objective_ms, latency_ms)


def _first_size(manifest: Manifest, options: TritonOptions) -> list[Call]:
    calls = starting_calls(manifest, options.max_batch, options.sizes, options.dims)
    if not calls:
        raise DataError("--objective-ms: the artefact names no size to measure: give one by --sizes, or of named tensors by --dims")
    return [call for call in calls if call.size == calls[0].size]


def _computation(session: Session, call: Call) -> tuple[Any, Any]:
    """Return the function that computes a call, and its input: zeros, or images of noise."""
    outputs = call.outputs or tuple(spec.name for spec in session.tensors.outputs)
    inputs = session.tensors.zeros(dict(call.dims))
    if isinstance(session.signature, Signature):
        outputs = LABELS if session.signature.answer.argmax else SCORES
        inputs = {"images": np.random.default_rng(0).integers(0, 256, inputs["images"].shape, np.uint8)}
    return partial(session.infer, dims=call.dims, outputs=outputs), inputs
