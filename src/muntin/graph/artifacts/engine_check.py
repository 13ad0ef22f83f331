"""Comparison of a draft artefact with its own graph, computed exactly, in each engine; and the precision that is recorded.

The golden outputs are those of the deployed graph without any fusion, so a difference is the engine's. What integers change in the outputs
of the float graph is measured apart (`export.rounding`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from muntin.artifact import Artifact, GoldenTolerance, TensorPair, open_artifact, write_artifact
from muntin.artifact.atomic_directory import scratch_directory
from muntin.artifact.manifest import EngineFamily, FloatPrecision
from muntin.errors import ArtifactError, ExportError
from muntin.graph.artifacts.compile_errors import products_in_message
from muntin.graph.quantize import GraphQuantization
from muntin.graph.records import QuantizedOnnx
from muntin.runtime.engines.registry import open_session
from muntin.runtime.inputs import check_inputs
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import Session
from muntin.runtime.verification.artifact import find_fallbacks
from muntin.runtime.verification.golden import LARGE, batch_problems, replay

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
FAR_OFF = 0.25
"""Root mean square error of integers, in standard deviations of an output, that is far: a note or an error says so. At further sizes it
comes from another branch of the graph; rounding reaches 0.08 in a model with little training."""
WIDEST = 2.0
"""Standard deviations that an engine may differ by at most, where integers themselves move an output as far."""


class EngineMismatchError(ExportError):
    """An engine that is needed cannot run the model, or does not compute what its graph says."""


class FallbackError(ExportError):
    """Products that are to run in integers run in floats. `reasons`: why, by the product's name."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(f"{len(reasons)} products run in floats: {next(iter(reasons.values()))}; nothing was written")
        self.reasons = reasons


@dataclass(frozen=True, kw_only=True)
class EngineCheck:
    """Requirements on the engines: pairs of inputs and outputs, and how closely they are reproduced.

    `further`: pairs beside the golden ones, of other sizes: there integers may round otherwise, so only an error above `FAR_OFF` counts,
    except in f32 where no product is quantised. `batches`: rows of a batch are compared with each alone. `needs_openvino`: False if ONNX
    Runtime alone is enough.
    """

    limits: PrecisionLimits
    further: Sequence[TensorPair] = ()
    batches: bool = True
    needs_openvino: bool = False

    def problems(self, session: Session, artifact: Artifact, further: Sequence[TensorPair] = (), *, closely: bool = False) -> list[str]:
        """Return a line for each output that a session computes otherwise. `closely`: within the limits at further sizes, too."""
        tolerance = self.limits[precision_of(session)]
        pairs = [*artifact.golden(), *(further if closely else ())]
        results = [result for pair in pairs for result in replay(session, pair, tolerance)]
        lines = [f"{session.precision} gives other {result.problem}" for result in results if not result.passed]
        if not lines and self.batches:
            lines = list(batch_problems(session, artifact, tolerance))
        return lines or ([] if closely else far_off(session, further))


def write_checked(
    path: Path,
    content: dict[str, Any],
    notes: Sequence[str],
    check: EngineCheck,
    draft_check: Callable[[Path], None] = lambda draft: None,
) -> Artifact:
    """Write a draft elsewhere, compare it in the engines, and write the artefact at `path` with the measured precision and tolerances.

    OpenVINO must compute what the graph says; where it cannot run the model at all and `check` allows it, ONNX Runtime's tolerance alone is
    recorded, with a note. Where ONNX Runtime differs, its tolerance is left out, with a note. `draft_check`: called with the draft; it may
    change `content`. Raises FallbackError for quantised products that OpenVINO runs in floats, EngineMismatchError otherwise; nothing is
    written then.
    """
    with scratch_directory() as scratch:
        draft = scratch / "draft"
        write_artifact(draft, **content, golden_tolerance={"openvino": check.limits}, precision="bf16")
        draft_check(draft)
        precision, engines, engine_notes = _compare_engines(open_artifact(draft), content["model"], check)
    measured = content["measured"] | {"notes": [*notes, *engine_notes]}
    tolerances = dict.fromkeys(engines, check.limits)
    return write_artifact(path, **content | {"measured": measured}, golden_tolerance=tolerances, precision=precision)


def write_with_fallbacks(quantization: GraphQuantization, write: Callable[[QuantizedOnnx], Artifact]) -> Artifact:
    """Return what `write` makes of a quantised graph. Where that raises FallbackError, its products stay in floats in a further attempt."""
    while True:
        try:
            return write(quantization.quantized())
        except FallbackError as error:
            if not set(quantization.grids).intersection(error.reasons):
                raise
            quantization = quantization.without(error.reasons)


def _compare_engines(
    artifact: Artifact, model: onnx.ModelProto, check: EngineCheck
) -> tuple[FloatPrecision, list[EngineFamily], list[str]]:
    """Return the precision of the float layers, the engines that compute the model, and notes."""
    engines: list[EngineFamily] = []
    precision: FloatPrecision = "f32"
    notes: list[str] = []
    refusal = ""
    try:
        precision, notes = _check_openvino(artifact, check)
        engines.append("openvino")
    except ArtifactError as error:
        if artifact.manifest.integers and (named := products_in_message(model, str(error))):
            raise FallbackError(dict.fromkeys(named, "OpenVINO cannot compile it in integers here")) from error
        refusal = str(error).partition(": ")[2] or str(error)  # its message begins with the draft's path, which says nothing to a user
        if check.needs_openvino:
            wraps = "padding that wraps around ('circular') has no form in engines: join rows and columns by torch.cat instead; "
            advice = wraps if "[wrap]" in refusal else ""
            raise EngineMismatchError(f"{advice}an engine cannot run what was made of the model: {refusal}; nothing was written") from error
        notes.append(f'to be opened with engine="onnxruntime": {refusal}')
    try:
        problems = check.problems(_opened(artifact, "onnxruntime", "f32"), artifact)
    except ArtifactError as error:
        problems = [str(error).partition(": ")[2] or str(error)]
    if problems:
        notes.append(f"onnxruntime is not checked against: in it, {problems[0]}")
    else:
        engines.append("onnxruntime")
    if not engines:
        raise EngineMismatchError(f"no engine runs the model: openvino: {refusal}; onnxruntime: {problems[0]}; nothing was written")
    return precision, engines, notes


def _check_openvino(artifact: Artifact, check: EngineCheck) -> tuple[FloatPrecision, list[str]]:
    """Return the precision of the float layers, and notes. Raises ArtifactError where OpenVINO cannot run the model."""
    integers, example = artifact.manifest.integers, artifact.manifest.example
    largest = max([*check.further, *artifact.golden()], key=_values)

    def problems(session: Session, further: Sequence[TensorPair], *, closely: bool = False) -> list[str]:
        return check.problems(session, artifact, further, closely=closely)

    def free_problems(precision: str) -> list[str]:
        """Return the problems of the model of free sizes, which sessions with `dynamic` use."""
        if -1 not in artifact.manifest.signature.row.values():
            return []
        lines = problems(_opened(artifact, "openvino", precision, dynamic=True), [largest] if check.further else [])
        return [f"with free sizes {line}" for line in lines]

    def require(lines: Sequence[str]) -> None:
        if lines:
            kept = "; products that are named in keep stay in floats" if integers and not check.needs_openvino else ""
            raise EngineMismatchError(f"openvino does not compute what the graph says: {lines[0]}; nothing was written{kept}")

    exact, recorded = (_opened(artifact, "openvino", name) for name in ("f32", "recorded"))
    # Integers at further sizes may round otherwise; another result comes from a kernel that depends on the size.
    require(problems(exact, check.further, closely=not integers))
    names, reasons = find_fallbacks(artifact.manifest.layers, exact.layers())
    if names:
        raise FallbackError({name: f"openvino: {line}" for name, line in zip(names, reasons, strict=True)})
    notes: list[str] = []
    precision = precision_of(recorded)
    if precision != "f32":
        # The error of 16 bits may grow with the map, and kernels depend on the size: compare a large call and one of the example's size.
        of_example = [pair for pair in check.further if pair is not largest and _size(pair, artifact) == _size(example, artifact)]
        chosen = [largest, *of_example[:1]] if check.further else []
        if lines := problems(recorded, chosen) or free_problems(precision):
            notes, precision = [f"recorded in f32, for {line}" for line in lines], "f32"
    if precision == "f32":
        require(free_problems("f32"))
    if example is not None:
        (exact if precision == "f32" else recorded).warm_up([example])
    return precision, notes


def _opened(artifact: Artifact, engine: str, precision: str, *, dynamic: bool = False) -> Session:
    return open_session(artifact, SessionOptions(engine=engine, precision=precision, shapes=(), dims=(), dynamic=dynamic, cache=False))


def precision_of(session: Session) -> FloatPrecision:
    """Return the precision of a session's float layers."""
    return next(name for name in INTEGER_LIMITS if name == session.precision)


def far_off(session: Session, pairs: Sequence[TensorPair]) -> list[str]:
    """Return a line for each output of a session with a root mean square error above `FAR_OFF`."""
    results = [result for pair in pairs for result in replay(session, pair, None)]
    return [
        f"it gives other {result.name} {result.shape}: {result.rms_error:.2g} standard deviations in the mean (allowed: {FAR_OFF:g})"
        for result in results
        if result.rms_error is not None and not result.rms_error <= FAR_OFF
    ]


def _size(given: TensorPair | Mapping[str, int] | None, artifact: Artifact) -> dict[str, int]:
    """Return the sizes of free dimensions other than the batch."""
    signature = artifact.manifest.signature
    sizes = dict(check_inputs(given[0], signature)[1]) if isinstance(given, tuple) else given or {}
    return {name: size for name, size in sizes.items() if name != signature.tensors.batch}


def _values(pair: TensorPair) -> int:
    return sum(tensor.size for tensor in pair[0].values())


def widened_limits(content: Mapping[str, Any]) -> tuple[PrecisionLimits, list[str]]:
    """Return the limits for a graph of integers, and a note if they are wider than usual: only where all outputs have many values."""
    rounding: Mapping[str, Mapping[str, float | None]] = content["measured"].get("rounding", {})
    if any(tensor.size < LARGE for _, outputs in content["golden"] for tensor in outputs.values()):
        return INTEGER_LIMITS, []
    moved = min(WIDEST, max((change["max_error"] or 0.0 for change in rounding.values()), default=0.0))
    if moved <= INTEGER_LIMITS["f32"].max_error:
        return INTEGER_LIMITS, []
    limits = {name: limit.model_copy(update={"max_error": max(limit.max_error, moved)}) for name, limit in INTEGER_LIMITS.items()}
    return limits, [f"integers move single values of an output by up to {moved:.2g} standard deviations; so engines may differ by as much"]
