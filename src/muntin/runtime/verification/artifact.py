"""Verification of an artefact on this machine.

Checks the files' digests; golden inputs against golden scores, within the tolerance recorded for the engine's real precision; that layers
recorded with integer activations run on integer kernels; that recorded patterns of zeros are there; optionally each of these layers alone,
and accuracy on the caller's data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import onnx

from muntin.artifact import Artifact, LayerRecord, open_artifact, sparsity_of
from muntin.errors import DependencyError
from muntin.progress import OnStage, status
from muntin.runtime.engines.onnx_nodes import is_node_of
from muntin.runtime.engines.registry import open_session
from muntin.runtime.options import DEFAULT_ENGINE, DEFAULT_OPTIONS, SessionOptions
from muntin.runtime.session import ExecutedLayer, Session
from muntin.runtime.verification.golden import GoldenResult, batch_problems, replay
from muntin.runtime.verification.layerwise import TOLERANCE, LayerCheck, verify_layers


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """Result of a verification. `problems`: a line each; empty if it passed.

    `golden`: of each output of each golden pair. `digests`: the compared files and their sha256 (an altered file raises before anything
    runs). `layers`: every operation with its precision. `fallbacks`: layers
    that the manifest records with 8-bit activations (or fewer) and that did not run on integer kernels;
    problems unless allowed. `evaluation`: the value of `evaluate`. `checks`: each quantised layer against plain float arithmetic, if
    requested; a recorded layer without a check is a problem. `sparsity`: the pattern of zeros of each layer that records one, as found in
    the weights that the engine and `write_standalone` get; another pattern than recorded is a problem.
    """

    path: Path
    engine: str
    precision: str
    threads: int
    digests: dict[str, str] = field(repr=False)
    golden: tuple[GoldenResult, ...]
    layers: tuple[ExecutedLayer, ...] = field(repr=False)
    fallbacks: tuple[str, ...]
    evaluation: float | None
    checks: tuple[LayerCheck, ...] = field(repr=False)
    sparsity: Mapping[str, str] = field(repr=False)
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.problems


def verify(
    path: str | Path,
    options: SessionOptions = DEFAULT_OPTIONS,
    *,
    evaluate: Callable[[Any], float] | None = None,
    allow_fallbacks: bool | None = None,
    layers: bool = False,
    progress: bool | OnStage = True,
) -> VerifyResult:
    """Checks an artefact in an engine: digests, golden pairs, independence of the images (or rows) in a batch, integer kernels, and
    `evaluate(session)` if it is given.

    `options`: engine, precision and threads. `allow_fallbacks`: whether a layer recorded as 8-bit may run in float; None: only in engines
    other than the default one, for which the graph is written. `layers`: also checks every quantised layer alone in OpenVINO
    (`verification.layerwise`). Costs opening twice, a compilation for each golden size and two more, and the call of `evaluate`.
    `progress`: True shows the stages on a terminal, and elsewhere a line every half minute; False shows nothing; a function is called with
    the name of each stage instead.

    Raises the errors of `load` (ArtifactError for an altered file); a failed check is in the result.
    """
    if allow_fallbacks is None:
        allow_fallbacks = options.engine != DEFAULT_ENGINE
    with status("verifying", progress) as stage:
        stage("opening")
        artifact = open_artifact(path)
        session = open_session(artifact, replace(options, shapes=(), dims=()))
        return verify_session(session, artifact, evaluate=evaluate, allow_fallbacks=allow_fallbacks, layers=layers, stage=stage)


def verify_session(
    session: Session,
    artifact: Artifact,
    *,
    evaluate: Callable[[Any], float] | None = None,
    allow_fallbacks: bool = False,
    layers: bool = False,
    stage: OnStage = lambda name: None,
) -> VerifyResult:
    """Check a session of an artefact as `verify` does. `stage`: called with the name of each stage."""
    stage("replaying reference inputs")
    manifest = artifact.manifest
    tolerance = manifest.tolerance(session.engine, session.precision)
    recorded = ", ".join(f"{engine} in {name}" for engine, tolerances in manifest.golden_tolerance.items() for name in tolerances)
    problems = []
    if tolerance is None:
        problems.append(
            f"no golden tolerance is recorded for {session.engine} in {session.precision} (there is: {recorded or 'none'}): "
            "verify in a recorded precision, or export again"
        )
    golden: list[GoldenResult] = []
    for index, pair in enumerate(artifact.golden()):
        results = replay(session, pair, tolerance)
        problems += [f"golden pair {index} {result.problem}" for result in results if tolerance and not result.passed]
        golden += results
    problems += batch_problems(session, artifact, tolerance) if tolerance else []
    ran = tuple(session.layers())
    fallbacks, reasons = find_fallbacks(manifest.layers, ran)
    if fallbacks and not ran:
        fallbacks, reasons = (), (f"{session.engine} does not say what its layers ran in",)
    if not allow_fallbacks:
        problems += [f"{reason}: export for this engine and CPU, or allow fallbacks" for reason in reasons]
    if layers:
        stage("checking layers one by one")
    checks = _checked_layers(artifact, session.threads) if layers else ()
    problems += _layer_problems(checks, find_unchecked(manifest.layers, checks) if layers else ())
    sparsity, changed = find_patterns(artifact)
    problems += changed
    if evaluate is not None:
        stage("evaluating")
    evaluation = None if evaluate is None else float(evaluate(session))
    if evaluation is not None and not isfinite(evaluation):
        problems.append(f"evaluate returned {evaluation}: it must return a finite number, higher is better")
    return VerifyResult(
        path=artifact.path,
        engine=session.engine,
        precision=session.precision,
        threads=session.threads,
        digests={"manifest.json": manifest.sha256, **{str(name): digest for name, digest in manifest.files.items()}},
        golden=tuple(golden),
        layers=ran,
        fallbacks=fallbacks,
        evaluation=evaluation,
        checks=checks,
        sparsity=sparsity,
        problems=tuple(problems),
    )


def find_patterns(artifact: Artifact) -> tuple[dict[str, str], list[str]]:
    """The patterns of zeros of the recorded sparse layers, read from the weights of the whole model, and a line for each that differs."""
    recorded = {layer.name: layer.sparsity for layer in artifact.manifest.layers if layer.sparsity}
    found = sparsity_of(onnx.load_model_from_string(artifact.model_bytes())) if recorded else {}
    lines = [
        f"layer {name}, recorded with zeros in the pattern {pattern}, has {found.get(name) or 'none'}: export again"
        for name, pattern in recorded.items()
        if found.get(name) != pattern
    ]
    return {name: found[name] for name in recorded if name in found}, lines


def _layer_problems(checks: Sequence[LayerCheck], unchecked: Sequence[str]) -> Iterator[str]:
    for check in checks:
        if not check.passed:
            yield (
                f"layer {check.name}: OpenVINO's result is {check.error:.3g} quantisation steps from the result of its integers "
                f"(allowed: {TOLERANCE:g}): report it with the CPU and OpenVINO's version"
            )
    for name in unchecked:
        reason = "multiplies nothing quantised in the graph, so it is not checked: export again"
        yield f"layer {name}, recorded with 8-bit activations, {reason}"


def _checked_layers(artifact: Artifact, threads: int) -> tuple[LayerCheck, ...]:
    try:
        return verify_layers(artifact, [inputs for inputs, _ in artifact.golden()], threads=threads)
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"layers=True compares OpenVINO with ONNX Runtime, and there is no {error.name}: pip install {error.name}, or leave it out"
        ) from error


def find_fallbacks(records: Sequence[LayerRecord], layers: Sequence[ExecutedLayer]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The recorded layers with integer activations that did not run on integer kernels, and a line about each.

    A layer's compute nodes have its name, or its name and a "/" before more. It fell back if one of them is not "i8", or none ran.
    """
    names, reasons = [], []
    for record in (record for record in records if record.integer_activations):
        ran = [layer for layer in layers if layer.compute and is_node_of(layer.name, record)]
        if ran and all(layer.precision == "i8" for layer in ran):
            continue
        names.append(record.name)
        floats = ", ".join(f"{layer.kind} in {layer.precision}" for layer in ran if layer.precision != "i8")
        reasons.append(
            f"layer {record.name}, recorded with {record.activation_bits}-bit activations, ran as {floats or 'no node of its name'}"
        )
    return tuple(names), tuple(reasons)


def find_unchecked(records: Sequence[LayerRecord], checks: Sequence[LayerCheck]) -> tuple[str, ...]:
    """The recorded layers with integer activations without a check: the graph has no product of their quantised values."""
    integers = (record for record in records if record.integer_activations)
    return tuple(record.name for record in integers if not any(is_node_of(check.name, record) for check in checks))
