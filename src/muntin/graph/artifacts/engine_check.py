"""Comparison of a draft artefact with its own graph, computed exactly, in each engine; and the precision that is recorded.

The golden outputs are those of the deployed graph without any fusion, so a difference is the engine's. What integers change in the outputs
of the float graph is measured apart (`export.rounding`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from muntin.artifact import Artifact, GoldenTolerance, open_artifact, write_artifact
from muntin.artifact.atomic_directory import scratch_directory
from muntin.artifact.manifest import EngineFamily, FloatPrecision
from muntin.errors import ArtifactError, ExportError
from muntin.graph.artifacts.compile_errors import products_in_message
from muntin.runtime.engines.registry import open_any_session
from muntin.runtime.options import SessionOptions
from muntin.runtime.tensors import TensorSession
from muntin.runtime.verification.artifact import find_fallbacks
from muntin.runtime.verification.tensors import LARGE, batch_problems, replay_tensors

PrecisionLimits = Mapping[FloatPrecision, GoldenTolerance]
INTEGER_LIMITS: PrecisionLimits = {
    "f32": GoldenTolerance(max_error=0.5, label_agreement=0.95),
    "bf16": GoldenTolerance(max_error=0.75, label_agreement=0.9),
    "f16": GoldenTolerance(max_error=0.5, label_agreement=0.93),
}
"""Allowed difference of an engine from the graph itself, by the precision of its float layers, for a graph with quantised products: a
value between two levels is rounded either way."""
FLOAT_LIMITS: PrecisionLimits = {**INTEGER_LIMITS, "f32": GoldenTolerance(max_error=0.01, label_agreement=0.99)}
"""Limits for a graph without quantised products: in f32 only the order of sums differs."""
WIDEST = 2.0
"""Standard deviations that an engine may differ by at most, where integers themselves move an output as far."""


class FallbackError(ExportError):
    """Products that are to run in integers run in floats. `reasons`: why, by the product's name."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(f"{len(reasons)} products run in floats: {next(iter(reasons.values()))}; nothing was written")
        self.reasons = reasons


def write_checked_tensors(path: Path, content: dict[str, Any], notes: Sequence[str]) -> Artifact:
    """Write a draft elsewhere, compare it in the engines, and write the artefact at `path` with the measured precision and tolerances.

    OpenVINO must compute what the graph says; where it cannot run the model at all, ONNX Runtime's tolerance alone is recorded, with a
    note. An engine may differ from the graph as far as integers move outputs of many values (`measured["rounding"]`): at the edge of a
    letter, which way a value between two levels is rounded decides. Raises FallbackError for quantised products that it runs in floats,
    ExportError otherwise; nothing is written then.
    """
    integers = any(record.activation_bits for record in content["layers"])
    limits, widened = _widened(content) if integers else (FLOAT_LIMITS, [])
    with scratch_directory() as scratch:
        draft = scratch / "draft"
        write_artifact(draft, **content, golden_tolerance={"openvino": limits}, precision="bf16")
        artifact = open_artifact(draft)
        assert artifact.manifest.named is not None
        tolerances: dict[EngineFamily, PrecisionLimits] = {}
        precision: FloatPrecision = "f32"
        engine_notes: list[str] = []
        refusal = ""
        try:
            precision, engine_notes = _check_openvino(artifact, limits, integers)
            tolerances["openvino"] = limits
        except ArtifactError as error:
            if integers and (named := products_in_message(content["model"], str(error))):
                raise FallbackError(dict.fromkeys(named, "OpenVINO cannot compile it in integers here")) from error
            refusal = str(error).removeprefix(f"{draft}: ")
            engine_notes.append(f'to be opened with engine="onnxruntime": {refusal}')
        try:
            portable = _opened(artifact, "onnxruntime", "f32")
            problems = _problems(portable, artifact, limits["f32"])
        except ArtifactError as error:
            problems = [str(error).removeprefix(f"{draft}: ")]
        if problems:
            engine_notes.append(f"onnxruntime is not checked against: in it, {problems[0]}")
        else:
            tolerances["onnxruntime"] = limits
    if not tolerances:
        raise ExportError(f"no engine runs the model: openvino: {refusal}; onnxruntime: {problems[0]}; nothing was written")
    measured = content["measured"] | {"notes": [*notes, *widened, *engine_notes]}
    return write_artifact(path, **content | {"measured": measured}, golden_tolerance=tolerances, precision=precision)


def _widened(content: Mapping[str, Any]) -> tuple[PrecisionLimits, list[str]]:
    """Return the limits for a graph of integers, and a note if they are wider than usual: only where all outputs have many values."""
    rounding: Mapping[str, Mapping[str, float | None]] = content["measured"].get("rounding", {})
    if any(tensor.size < LARGE for _, outputs in content["golden"] for tensor in outputs.values()):
        return INTEGER_LIMITS, []
    moved = min(WIDEST, max((change["max_error"] or 0.0 for change in rounding.values()), default=0.0))
    if moved <= INTEGER_LIMITS["f32"].max_error:
        return INTEGER_LIMITS, []
    limits = {name: limit.model_copy(update={"max_error": max(limit.max_error, moved)}) for name, limit in INTEGER_LIMITS.items()}
    return limits, [f"integers move single values of an output by up to {moved:.2g} standard deviations; so engines may differ by as much"]


def _check_openvino(artifact: Artifact, limits: PrecisionLimits, integers: bool) -> tuple[FloatPrecision, list[str]]:
    """Return the precision of the float layers, and notes. Raises ArtifactError where OpenVINO cannot run the model."""
    exact = _opened(artifact, "openvino", "f32")
    ending = "; nothing was written" + ("; products that are named in keep stay in floats" if integers else "")
    if problems := _problems(exact, artifact, limits["f32"]):
        raise ExportError(f"openvino does not compute what the graph says: {problems[0]}{ending}")
    names, reasons = find_fallbacks(artifact.manifest.layers, exact.layers())
    if names:
        raise FallbackError({name: f"openvino: {line}" for name, line in zip(names, reasons, strict=True)})
    notes: list[str] = []
    recorded = _opened(artifact, "openvino", "recorded")
    precision: FloatPrecision = "f32"
    if recorded.precision != "f32":
        precision = next(name for name in limits if name == recorded.precision)
        reasons_16 = _problems(recorded, artifact, limits[precision]) or _free_problems(artifact, precision, limits)
        if reasons_16:
            notes, precision = [f"recorded in f32, for {reason}" for reason in reasons_16[:1]], "f32"
    if precision == "f32" and (problems := _free_problems(artifact, "f32", limits)):
        raise ExportError(f"openvino does not compute what the graph says: {problems[0]}{ending}")
    return precision, notes


def _free_problems(artifact: Artifact, precision: FloatPrecision, limits: PrecisionLimits) -> list[str]:
    """Return the problems of the model of free sizes, which sessions with `dynamic` use."""
    if not artifact.manifest.signature.tensors.dims:
        return []
    lines = _problems(_opened(artifact, "openvino", precision, dynamic=True), artifact, limits[precision])
    return [f"with free sizes {line}" for line in lines]


def _opened(artifact: Artifact, engine: str, precision: str, *, dynamic: bool = False) -> TensorSession:
    options = SessionOptions(engine=engine, precision=precision, dims=(), dynamic=dynamic, cache=False)
    session = open_any_session(artifact, options)
    assert isinstance(session, TensorSession)
    return session


def _problems(session: TensorSession, artifact: Artifact, tolerance: GoldenTolerance) -> list[str]:
    pairs = artifact.golden()
    results = [result for pair in pairs for result in replay_tensors(session, pair, tolerance)]
    lines = [f"{session.precision} gives another {result.problem}" for result in results if not result.passed]
    return lines or list(batch_problems(session, pairs, tolerance))
