"""Rows of a report for each layer: requested and executed precision, rounding error, and input histograms of the worst layers.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from muntin.artifact import Artifact
from muntin.compression import Change, QuantizedConv2d, QuantizedLinear
from muntin.compression.calibration import observe
from muntin.compression.channels.slimming import apply_widths
from muntin.compression.low_rank.factored_layers import factored_parameters, full_ranks
from muntin.compression.quantization.observer import Observer
from muntin.compression.quantization.quantized_layers import InputGrid
from muntin.compression.rewrite import named
from muntin.deployment.counting import parameter_count
from muntin.runtime import Session

WORST = 6
"""Number of layers with a histogram of their inputs."""
HISTOGRAM_BINS = 64


def layer_rows(
    artifact: Artifact, session: Session, model: nn.Module, changes: Iterable[Change], batches: Sequence[Tensor], *, macs: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return a row for each layer of an artefact. Costs two forward passes over the batches.

    `model`: its PyTorch form. `batches`: calibration images, for the distribution of inputs. `macs`: multiply-adds by layer, for the
    report's size.
    """
    executed: dict[str, str] = {layer.name: layer.precision for layer in session.layers() if layer.compute}
    sqnr = {c.layer: c.sqnr_db for c in changes if c.pass_ == "quantize" and c.sqnr_db is not None and np.isfinite(c.sqnr_db)}
    layers: dict[str, nn.Module] = dict(named(model, QuantizedLinear, QuantizedConv2d))
    observers = {name: first for name, (first, _) in observe(model, layers, batches).items()} if layers else {}
    worst = sorted((name for name in sqnr if name in observers), key=lambda name: sqnr[name])[:WORST]
    rows = []
    for record in artifact.manifest.layers:
        row: dict[str, Any] = {
            **record.model_dump(include={"name", "kind", "weight_bits", "activation_bits", "parameters", "note"}),
            "macs": macs.get(record.name),
            "executed": executed.get(record.name),
            "sqnr_db": sqnr.get(record.name),
        }
        if record.name in observers:
            row["clipped"], histogram = _clipping(observers[record.name], layers[record.name].get_submodule("input"))
            if record.name in worst and histogram is not None:
                row["histogram"] = histogram
        rows.append(row)
    return rows


def _clipping(observer: Observer, grid: nn.Module) -> tuple[float | None, dict[str, Any] | None]:
    """Return the share of values outside a grid and their histogram, or None for values that were not observed or are all equal."""
    assert isinstance(grid, InputGrid)
    if not observer.high > observer.low:
        return (0.0 if observer.seen else None), None
    low, high = grid.ends()
    counts = observer.histogram.numpy()
    step = (observer.high - observer.low) / len(counts)
    centres = observer.low + (np.arange(len(counts)) + 0.5) * step
    half = float(grid.scale) / 2
    clipped = float(counts[(centres < low - half) | (centres > high + half)].sum() / max(1.0, counts.sum()))
    coarse = counts.reshape(HISTOGRAM_BINS, -1).sum(1)
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
