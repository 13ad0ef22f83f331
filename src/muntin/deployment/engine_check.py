"""Comparison of a draft artefact with its graph's exact scores in each engine, and the choice of the recorded precision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muntin.artifact import Artifact, GoldenTolerance, write_artifact
from muntin.artifact.atomic_directory import scratch_directory
from muntin.artifact.manifest import EngineFamily, FloatPrecision
from muntin.deployment.capture.graph_check import sensitivity
from muntin.deployment.capture.model_contract import FAR_OFF, Pairs, SizeError
from muntin.deployment.tile_plan import plan_fault, plan_of
from muntin.errors import ArtifactError
from muntin.graph.artifacts.compile_errors import products_in_message
from muntin.graph.artifacts.engine_check import FLOAT_LIMITS, FallbackError
from muntin.graph.artifacts.engine_check import INTEGER_LIMITS as LIMITS
from muntin.runtime import Session, load
from muntin.runtime.exact_tiles.tiles import NO_PLAN
from muntin.runtime.options import Precision
from muntin.runtime.verification.artifact import find_fallbacks, replay

Tolerances = Mapping[FloatPrecision, GoldenTolerance]
TWICE = 2
"""Allowed difference of an engine, in units of what one grey level of noise changes, where that is more than the limits."""


def write_checked(path: Path, content: dict[str, Any], others: Pairs, notes: list[str]) -> Artifact:
    """Write a draft elsewhere, compare it in the engines, and write the artefact at `path` with the measured precision and tolerances.

    OpenVINO must compute the golden scores. Where ONNX Runtime differs, its tolerance is left out and a note added. `others`: pairs of
    further sizes. Raises `FallbackError` for products that OpenVINO does not run in integers, and `SizeError` where fewer sizes may help.
    """
    integers = any(record.activation_bits for record in content["layers"])
    limits, note = _limits(content, integers=integers)
    content["plan"] = plan_of(content)
    with scratch_directory() as scratch:
        draft = scratch / "draft"
        write_artifact(draft, **content, golden_tolerance={"openvino": limits}, precision="bf16")
        if content["plan"] is not None and (fault := plan_fault(draft, content["plan"], content["golden"][0][0][0])) is not None:
            content["plan"] = None
            content["measured"][NO_PLAN] = fault
        try:
            precision, tolerances, engine_notes = _compare_engines(draft, content, limits, others)
        except ArtifactError as error:  # its message begins with the draft's path, which says nothing to a user
            if integers and (names := products_in_message(content["model"], str(error))):
                raise FallbackError(dict.fromkeys(names, "OpenVINO cannot compile it in integers here")) from error
            wraps = "padding that wraps around ('circular') has no form in engines: join rows and columns by torch.cat instead; "
            advice = wraps if "[wrap]" in str(error) else ""
            raise SizeError(f"{advice}an engine cannot run what was made of the model: {str(error).partition(': ')[2] or error}") from error
    content["measured"]["notes"] = [*notes, *note, *engine_notes]
    return write_artifact(path, **content, golden_tolerance=tolerances, precision=precision)


def _limits(content: dict[str, Any], *, integers: bool) -> tuple[Tolerances, list[str]]:
    """Return the tolerances of a graph, wider for one that answers noise of one grey level by more, and a note about that."""
    limits = LIMITS if integers else FLOAT_LIMITS
    error, labels = sensitivity(content["model"], content["golden"])
    wider = {
        name: GoldenTolerance(
            max_error=max(limit.max_error, TWICE * error), label_agreement=max(0.0, min(limit.label_agreement, 1 - TWICE * (1 - labels)))
        )
        if limit.max_error >= LIMITS["f32"].max_error
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


def _compare_engines(
    draft: Path, content: dict[str, Any], limits: Tolerances, others: Pairs
) -> tuple[FloatPrecision, dict[EngineFamily, Tolerances], list[str]]:
    """Return the precision of the float layers, the tolerances by engine, and notes.

    Raises `SizeError` where OpenVINO does not compute the graph, `FallbackError` where integers run in floats.
    """
    golden, example = content["golden"], tuple(content["example"])
    exact, recorded = (load(draft, precision=name, shapes=(), cache=False) for name in ("f32", "recorded"))
    portable = load(draft, engine="onnxruntime", shapes=(), cache=False)
    integers = any(record.activation_bits for record in content["layers"])
    # Integers at further sizes may round otherwise; another result comes from a kernel that depends on the size.
    if problems := deviations(exact, golden, limits) or (far_off(exact, others) if integers else deviations(exact, others, limits)):
        raise SizeError(f"{exact.engine} does not compute what the captured graph does: {problems[0]}; nothing was written")
    names, lines = find_fallbacks(content["layers"], tuple(exact.layers()))
    if names:
        raise FallbackError({name: f"{exact.engine}: {line}" for name, line in zip(names, lines, strict=True)})
    portable_problems = deviations(portable, golden, limits)
    largest = max(others, key=lambda pair: pair[0].size, default=max(golden, key=lambda pair: pair[0].size))

    def dynamic_problems(precision: Precision) -> list[str]:
        if content["signature"].sizes.fixed:
            return []
        session = load(draft, precision=precision, shapes=(), dynamic=True, cache=False)
        lines = deviations(session, golden, limits) or far_off(session, [largest])
        return [f"where sizes are free {line}" for line in lines]

    reasons: list[str] = []  # why 16 bits are not recorded
    if recorded.precision != exact.precision:
        # The error of 16 bits may grow with the map, and kernels depend on the size: compare a large image and one of the example's size.
        pairs = {pair[0].shape[1:3]: pair for pair in (largest, *(pair for pair in others if pair[0].shape[1:3] == example[1:]))}
        reasons = deviations(recorded, golden, limits) or far_off(recorded, list(pairs.values())) or dynamic_problems("recorded")
    if (reasons or recorded.precision == exact.precision) and (problems := dynamic_problems("f32")):
        raise SizeError(f"{exact.engine} does not compute what the captured graph does: {problems[0]}; nothing was written")
    precision = _precision_of(exact if reasons else recorded)
    recorded.warm_up([example])
    notes = [f"recorded in {precision}, for {reason}" for reason in reasons]
    notes += [f"{portable.engine} is not checked against: in it, {line}" for line in portable_problems]
    return precision, {"openvino": limits} if portable_problems else {"openvino": limits, "onnxruntime": limits}, notes


def _precision_of(session: Session) -> FloatPrecision:
    return next(name for name in LIMITS if name == session.precision)


def deviations(session: Session, pairs: Pairs, limits: Tolerances) -> list[str]:
    """Return a line for each pair whose scores from a session differ by more than `limits`."""
    tolerance = limits[_precision_of(session)]
    lines = []
    for images, scores in pairs:
        result = replay(session, images, scores, tolerance, classes=session.signature.answer.argmax)
        if not result.passed:
            agreement = "" if result.label_agreement is None else f", label agreement {result.label_agreement:.4f}"
            size = " x ".join(map(str, images.shape[1:3]))
            lines.append(
                f"{session.precision} gives a largest error of {result.max_error:.4g} standard deviations, root mean square "
                f"{result.rms_error:.4g}{agreement} on an image of {size} (allowed: {result.allowed})"
            )
    return lines


def far_off(session: Session, pairs: Pairs) -> list[str]:
    """Return a line for each pair whose scores from a session have a root mean square error above `FAR_OFF`."""
    lines = []
    for images, scores in pairs:
        error = replay(session, images, scores, None, classes=False).rms_error
        if not error <= FAR_OFF:
            size = " x ".join(map(str, images.shape[1:3]))
            lines.append(f"it gives an error of {error:.2g} standard deviations in the mean on an image of {size} (allowed: {FAR_OFF:g})")
    return lines
