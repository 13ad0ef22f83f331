"""Comparison of a draft artefact with its PyTorch model in each engine, and the choice of the recorded precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from muntin.artifact import Artifact, GoldenTolerance, LayerRecord, write_artifact
from muntin.artifact.atomic_directory import scratch_directory
from muntin.artifact.manifest import EngineFamily, FloatPrecision
from muntin.deployment.model_contract import FAR_OFF, Pairs, SizeError
from muntin.errors import ArtifactError, ExportError
from muntin.runtime import Session, load
from muntin.runtime.options import Precision
from muntin.runtime.verification.artifact import find_fallbacks, replay

Tolerances = Mapping[FloatPrecision, GoldenTolerance]
LIMITS: Tolerances = {
    "f32": GoldenTolerance(max_error=0.5, label_agreement=0.95),
    "bf16": GoldenTolerance(max_error=0.75, label_agreement=0.9),
    "f16": GoldenTolerance(max_error=0.5, label_agreement=0.93),
}
"""Allowed difference of a deployed model from its PyTorch form, by the precision of its float layers (see `GoldenTolerance`)."""
FLOAT_LIMITS: Tolerances = {**LIMITS, "f32": GoldenTolerance(max_error=0.01, label_agreement=0.99)}
"""Limits for a model without quantised layers: in f32 only the order of sums differs."""


def write_checked(path: Path, content: dict[str, Any], others: Pairs, notes: list[str]) -> Artifact:
    """Write a draft elsewhere, compare it in the engines, and write the artefact at `path` with the measured precision and tolerances.

    OpenVINO must compute what PyTorch does. Where ONNX Runtime differs, its tolerance is left out and a note added. `others`: pairs of
    further sizes, compared in one engine only, because an error that depends on the size is one of the graph.
    """
    limits = LIMITS if any(record.activation_bits for record in content["layers"]) else FLOAT_LIMITS
    with scratch_directory() as scratch:
        draft = scratch / "draft"
        write_artifact(draft, **content, golden_tolerance={"openvino": limits}, precision="bf16")
        try:
            precision, tolerances, engine_notes = _compare_engines(draft, content, limits, others)
        except ArtifactError as error:  # its message begins with the draft's path, which says nothing to a user
            wraps = "padding that wraps around ('circular') has no form in engines: join rows and columns by torch.cat instead; "
            advice = wraps if "[wrap]" in str(error) else ""
            raise SizeError(f"{advice}an engine cannot run what was made of the model: {str(error).partition(': ')[2] or error}") from error
    content["measured"]["notes"] = [*notes, *engine_notes]
    return write_artifact(path, **content, golden_tolerance=tolerances, precision=precision)


def _compare_engines(
    draft: Path, content: dict[str, Any], limits: Tolerances, others: Pairs
) -> tuple[FloatPrecision, dict[EngineFamily, Tolerances], list[str]]:
    """Return the precision of the float layers, the tolerances by engine, and notes.

    Raises `SizeError` where OpenVINO, or both engines alike, do not compute what PyTorch does, `ExportError` where integers run in floats.
    """
    golden, example = content["golden"], tuple(content["example"])
    exact, recorded = (load(draft, precision=name, shapes=(), cache=False) for name in ("f32", "recorded"))
    portable = load(draft, engine="onnxruntime", shapes=(), cache=False)
    problems, portable_problems = (deviations(session, golden, limits) for session in (exact, portable))
    if not problems or (portable_problems and limits is FLOAT_LIMITS):  # where both engines differ, the graph is wrong
        elsewhere = exact if portable_problems else portable
        _check_traced(problems or (far_off(elsewhere, others) if limits is LIMITS else deviations(elsewhere, others, limits)))
    ending = "; nothing was written" + ("; layers that are named in quantization.keep stay in floats" if limits is LIMITS else "")
    if problems:
        raise SizeError(f"{exact.engine} does not compute what PyTorch does: {problems[0]}{ending}")
    if fallbacks := _float_fallbacks(exact, content["layers"]):
        raise ExportError(f"{exact.engine} does not compute what PyTorch does: {fallbacks[0]}{ending}")
    largest = max(others, key=lambda pair: pair[0].size)

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
        raise SizeError(f"{exact.engine} does not compute what PyTorch does: {problems[0]}; nothing was written")
    precision = _precision_of(exact if reasons else recorded)
    recorded.warm_up([example])
    notes = [f"recorded in {precision}, for {reason}" for reason in reasons]
    notes += [f"{portable.engine} is not checked against: in it, {line}" for line in portable_problems]
    return precision, {"openvino": limits} if portable_problems else {"openvino": limits, "onnxruntime": limits}, notes


def _check_traced(problems: list[str]) -> None:
    if problems:
        raise SizeError(
            f"what was traced does not compute what PyTorch does: {problems[0]}; it holds one branch of each condition on the size and no "
            "random numbers: leave them out, or write all branches in one (torch.where); nothing was written"
        )


def _precision_of(session: Session) -> FloatPrecision:
    return next(name for name in LIMITS if name == session.precision)


def deviations(session: Session, pairs: Pairs, limits: Tolerances) -> list[str]:
    """Return a line for each pair whose scores from a session differ by more than `limits`."""
    tolerance = limits[_precision_of(session)]
    lines = []
    for images, scores in pairs:
        result = replay(session, images, scores, tolerance, classes=session.signature.task != "restore")
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


def _float_fallbacks(session: Session, layers: Iterable[LayerRecord]) -> list[str]:
    _, reasons = find_fallbacks(tuple(layers), tuple(session.layers()))
    advice = "name it in quantization.keep (`muntin export --set`; of a compressed model in compression.keep, `muntin compress --set`)"
    return [f"{len(reasons)} of the quantised layers not on integers: {reasons[0]}: {advice}"] if reasons else []
