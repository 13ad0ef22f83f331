"""Rows of a report for each layer: requested and executed precision, rounding error, and input histograms of the worst layers.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from torch import Tensor, nn

from muntin.artifact import Artifact
from muntin.compression import Change
from muntin.compression.channels.slimming import apply_widths
from muntin.compression.low_rank.factored_layers import factored_parameters, full_ranks
from muntin.compression.rewrite import named
from muntin.deployment.capture.model_contract import as_bytes
from muntin.deployment.counting import parameter_count
from muntin.graph.deployed_inputs import quantized_inputs
from muntin.graph.grids import ByteGrid, RangeObserver
from muntin.graph.onnx_graph import Graph
from muntin.runtime import Session

WORST = 6
"""Number of layers with a histogram of their inputs."""
HISTOGRAM_BINS = 64


def layer_rows(artifact: Artifact, session: Session, batches: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Return a row for each layer of an artefact. `batches`: calibration images, whose values are observed in the deployed graph."""
    executed = {layer.name: layer.precision for layer in session.layers() if layer.compute}
    sqnr = {str(entry["layer"]): entry.get("sqnr_db") for entry in artifact.manifest.passes if entry.get("pass") == "quantize"}
    inputs = quantized_inputs(artifact.model_bytes(), [{"images": as_bytes(batch)} for batch in batches])
    measured = {name: value for name, value in sqnr.items() if isinstance(value, float) and name in inputs}
    worst = sorted(measured, key=measured.__getitem__)[:WORST]
    rows = []
    for record in artifact.manifest.layers:
        row: dict[str, Any] = {
            **record.model_dump(include={"name", "kind", "weight_bits", "activation_bits", "parameters", "macs", "note"}),
            "executed": executed.get(record.name),
            "sqnr_db": sqnr.get(record.name),
        }
        if record.name in inputs:
            row["clipped"], histogram = _clipping(*inputs[record.name])
            if record.name in worst and histogram is not None:
                row["histogram"] = histogram
        rows.append(row)
    return rows


def deployed_sizes(artifact: Artifact) -> dict[str, Any]:
    """Return parameters, bytes of the weights and in all, and multiply-adds of an image of the artefact's size in 10^9."""
    layers, packed = artifact.manifest.layers, artifact.manifest.tensors
    constants = Graph(onnx.load_model_from_string(artifact.model_bytes())).constants
    numbers = {name: value for name, value in constants.items() if value.dtype.kind == "f" or value.itemsize == 1}  # others are shapes
    bits = {name: packed[name].bits if name in packed else 8 * value.itemsize for name, value in numbers.items()}
    return {
        "params": sum(layer.parameters for layer in layers),
        "weights": sum((value.size * bits[name] + 7) // 8 for name, value in numbers.items()),
        "bytes": artifact.bytes,
        "gmacs": sum(layer.macs or 0 for layer in layers) / 1e9,
    }


def _clipping(observer: RangeObserver, grid: ByteGrid) -> tuple[float | None, dict[str, Any] | None]:
    """Return the share of values outside a grid and their histogram, or None for values that are all equal."""
    if observer.histogram is None or not observer.high > observer.low:
        return 0.0, None
    low, high = grid.ends
    step = (observer.high - observer.low) / len(observer.histogram)
    centres = observer.low + (np.arange(len(observer.histogram)) + 0.5) * step
    outside = (centres < low - grid.scale / 2) | (centres > high + grid.scale / 2)
    clipped = float(observer.histogram[outside].sum() / max(1.0, observer.histogram.sum()))
    coarse = observer.histogram.reshape(HISTOGRAM_BINS, -1).sum(1)
    return clipped, {
        "low": observer.low,
        "high": observer.high,
        "counts": [int(count) for count in coarse],
        "grid_low": low,
        "grid_high": high,
    }


def rank_rows(model: nn.Module, changes: Iterable[Change], widths: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return a row for each Linear and Conv2d of the trained model: its ranks after the low-rank pass, or why it stayed dense.

    `widths`: those of units whose closed channels were removed before that pass (`widths_of`).
    """
    narrowed = copy.deepcopy(model)
    apply_widths(narrowed, widths)
    done = {change.layer: change for change in changes if change.pass_ == "low_rank"}
    rows = []
    layers: dict[str, nn.Linear | nn.Conv2d] = dict(named(model, nn.Linear, nn.Conv2d))
    for name, layer in layers.items():
        narrow = narrowed.get_submodule(name)
        assert isinstance(narrow, nn.Linear | nn.Conv2d)
        change = done.get(name)
        kept = change is None or change.kept
        ranks = () if change is None or kept else change.ranks
        rows.append(
            {
                "name": name,
                "kind": type(layer).__name__,
                "full": list(full_ranks(narrow)),
                "ranks": list(ranks),
                "parameters_before": parameter_count(layer),
                "parameters_after": factored_parameters(narrow, ranks) if ranks else parameter_count(narrow),
                "reason": "" if change is None else change.reason,
            }
        )
    return rows
