"""Check of an image model in the engines: scores at several sizes, and exact tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muntin.artifact import Artifact, GoldenTolerance
from muntin.deployment.capture.graph_check import sensitivity
from muntin.deployment.capture.model_contract import Pairs, SizeError
from muntin.deployment.tile_plan import plan_fault, plan_of
from muntin.graph.artifacts.engine_check import (
    FLOAT_LIMITS,
    INTEGER_LIMITS,
    EngineCheck,
    EngineMismatchError,
    PrecisionLimits,
    write_checked,
)
from muntin.runtime.exact_tiles.tiles import NO_PLAN

TWICE = 2
"""Allowed difference of an engine, in units of what one grey level of noise changes, where that is more than the limits."""


def write_checked_images(path: Path, content: dict[str, Any], others: Pairs, notes: list[str]) -> Artifact:
    """Write an image model's artefact as `write_checked` does, with a plan for exact tiles where these equal one call.

    `others`: pairs of further sizes. Raises `SizeError` where fewer sizes may help.
    """
    limits, note = _limits(content)
    content["tile_plan"] = plan_of(content)

    def try_plan(draft: Path) -> None:
        if content["tile_plan"] is not None and (fault := plan_fault(draft, content["tile_plan"], content["golden"][0][0][0])) is not None:
            content["tile_plan"] = None
            content["measured"][NO_PLAN] = fault

    further = [({"images": images}, {"scores": scores}) for images, scores in others]
    check = EngineCheck(limits=limits, further=further, batches=False, needs_openvino=True)
    try:
        return write_checked(path, content, [*notes, *note], check, try_plan)
    except EngineMismatchError as error:
        raise SizeError(str(error)) from error


def _limits(content: dict[str, Any]) -> tuple[PrecisionLimits, list[str]]:
    """Return the tolerances of a graph, wider for one that answers noise of one grey level by more, and a note about that."""
    limits = INTEGER_LIMITS if any(record.activation_bits for record in content["layers"]) else FLOAT_LIMITS
    error, labels = sensitivity(content["model"], content["golden"])
    wider = {
        name: GoldenTolerance(
            max_error=max(limit.max_error, TWICE * error), label_agreement=max(0.0, min(limit.label_agreement, 1 - TWICE * (1 - labels)))
        )
        if limit.max_error >= INTEGER_LIMITS["f32"].max_error
        else limit
        for name, limit in limits.items()
    }
    if wider == limits:
        return limits, []
    return wider, [
        f"one grey level of noise moves an answer by up to {error:.2g} standard deviations"
        + (f" and changes {1 - labels:.0%} of the labels" if content["signature"].answer.argmax else "")
        + f", as in a network with little training; so engines may differ by {wider['bf16'].max_error:.2g}, less after more training"
    ]
