"""Manifest entries of what quantisation did with each product, and the reasons why training left layers in floats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from muntin.compression import Change
from muntin.graph.records import ProductRecord


def quantization_changes(products: Iterable[ProductRecord]) -> list[Change]:
    """Return the manifest's entry of each product that calibration quantised or left in floats."""
    return [
        Change(
            layer=record.name,
            pass_="quantize",
            done="kept" if record.bits is None else f"W{record.weight_bits}A8" if record.parameters else "A8",
            reason=record.reason,
            sqnr_db=record.sqnr_db,
        )
        for record in products
    ]


def reasons_of(changes: Iterable[Change]) -> Mapping[str, str]:
    """Return why layers stayed in floats, by name: the first of several passes on a layer decided."""
    reasons: dict[str, str] = {}
    for change in changes:
        if change.pass_ in ("qat", "mix", "quantize") and change.reason:
            reasons.setdefault(change.layer, change.reason)
    return reasons


def kept_layers(changes: Iterable[Change]) -> Mapping[str, str]:
    """Return why layers are to stay in floats, by name: those that the last pass of integers kept."""
    last = {change.layer: change for change in changes if change.pass_ in ("qat", "quantize")}
    return {name: change.reason for name, change in last.items() if change.kept}


def pass_entry(change: Change) -> dict[str, Any]:
    """Return the manifest's entry of a change."""
    sqnr_db = change.sqnr_db if change.sqnr_db is not None and math.isfinite(change.sqnr_db) else None
    return {"pass": change.pass_, "layer": change.layer, "done": change.done, "reason": change.reason, "sqnr_db": sqnr_db}
