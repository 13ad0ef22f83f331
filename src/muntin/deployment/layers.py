"""What a report says of every layer: what was asked, what ran, what rounding costs, and the inputs of the worst ones.

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
from muntin.runtime import Session

WORST = 6
"""Layers whose inputs are drawn."""
HISTOGRAM_BINS = 64


def layer_rows(
    artifact: Artifact, session: Session, model: nn.Module, changes: Iterable[Change], batches: Sequence[Tensor], *, macs: Mapping[str, int]
) -> list[dict[str, Any]]:
    """A row a layer of an artefact. `model`: its PyTorch form; `batches`: calibration images, for the distribution of what comes in.
    `macs`: multiply-adds by layer, of a picture of the report's size.

    Costs two forward passes over the batches.
    """
    executed: dict[str, str] = {layer.name: layer.precision for layer in session.layers() if layer.compute}
    sqnr = {c.layer: c.sqnr_db for c in changes if c.pass_ == "quantize" and c.sqnr_db is not None and np.isfinite(c.sqnr_db)}
    layers: dict[str, nn.Module] = dict(named(model, QuantizedLinear, QuantizedConv2d))
    seen = {name: first for name, (first, _) in observe(model, layers, batches).items()} if layers else {}
    worst = sorted((name for name in sqnr if name in seen), key=lambda name: sqnr[name])[:WORST]
    rows = []
    for record in artifact.manifest.layers:
        row: dict[str, Any] = {
            **record.model_dump(include={"name", "kind", "weight_bits", "activation_bits", "parameters", "note"}),
            "macs": macs.get(record.name),
            "executed": executed.get(record.name),
            "sqnr_db": sqnr.get(record.name),
        }
        if record.name in seen:
            row["clipped"], histogram = _clipping(seen[record.name], layers[record.name].get_submodule("input"))
            if record.name in worst and histogram is not None:
                row["histogram"] = histogram
        rows.append(row)
    return rows


def _clipping(observer: Observer, grid: nn.Module) -> tuple[float | None, dict[str, Any] | None]:
    """The share of values outside a grid, and their histogram; None where there is nothing to tell."""
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
    """A row a Linear and Conv2d of the model as it was trained: its ranks after the low-rank pass, or why it stayed dense.

    `widths`: of units whose closed channels were cut out before that pass (`widths_of`).
    """
    cut = copy.deepcopy(model)
    apply_widths(cut, widths)
    done = {change.layer: change for change in changes if change.pass_ == "low_rank"}
    rows = []
    layers: dict[str, nn.Linear | nn.Conv2d] = dict(named(model, nn.Linear, nn.Conv2d))
    for name, layer in layers.items():
        dense = sum(parameter.numel() for parameter in layer.parameters())
        left = cut.get_submodule(name)
        assert isinstance(left, nn.Linear | nn.Conv2d)
        change = done.get(name)
        kept = change is None or change.kept
        ranks = () if change is None or kept else change.ranks
        rows.append(
            {
                "name": name,
                "kind": type(layer).__name__,
                "full": list(full_ranks(left)),
                "ranks": list(ranks),
                "parameters_before": dense,
                "parameters_after": factored_parameters(left, ranks) if ranks else sum(p.numel() for p in left.parameters()),
                "reason": "" if change is None else change.reason,
            }
        )
    return rows
