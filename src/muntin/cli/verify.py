"""`muntin verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from muntin.cli.console import finite, out, print_json, print_notes, status
from muntin.cli.options import ArtifactArgument, EngineOption, JsonOption, PrecisionOption, ThreadsOption
from muntin.errors import VerificationError

if TYPE_CHECKING:
    from muntin.runtime import VerifyResult

GOLDEN = ("name", "shape", "max_error", "rms_error", "cosine", "equal", "label_agreement", "passed")
"""Fields of a `GoldenResult` in the JSON document."""


def verify_command(
    artifact: ArtifactArgument,
    engine: EngineOption = "openvino",
    precision: PrecisionOption = "recorded",
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Check an artefact: digests, golden scores or outputs, patterns of zeros, integer execution and the result of each quantised layer.

    Layers are checked one by one in OpenVINO only; with another --engine that check is left out, and a note says so.
    """
    from muntin.runtime import verify
    from muntin.runtime.options import DEFAULT_ENGINE, SessionOptions

    check_layers = engine == DEFAULT_ENGINE
    with status("verifying"):
        result = verify(artifact, SessionOptions(engine=engine, precision=precision, threads=threads), layers=check_layers)
    note = f"the layers were not checked one by one, which is done in {DEFAULT_ENGINE} only: leave out --engine for it"
    notes = [] if check_layers else [note]
    integers = [layer.name for layer in result.layers if layer.compute and layer.precision == "i8"]
    if json:
        document = {
            "artifact": artifact, "passed": result.passed, "engine": result.engine, "precision": result.precision, "files": result.digests,
            "golden": [{key: getattr(golden, key) for key in GOLDEN} for golden in result.golden],
            "integer_layers": integers if result.layers else None, "fallbacks": result.fallbacks, "problems": result.problems,
            "layers": [{"name": check.name, "error": check.error, "passed": check.passed} for check in result.checks],
            "sparsity": dict(result.sparsity), "notes": notes,
        }  # fmt: skip
        print_json(finite(document))
    else:
        _print(result, integers)
        print_notes(notes)
    if not result.passed:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        raise VerificationError(f"{artifact}: {result.problems[0]}{more}")


def _print(result: VerifyResult, integers: Sequence[str]) -> None:
    out.print(f"files     {len(result.digests)} digests agree")
    for golden in result.golden:
        out.print(f"golden    {golden.name} {golden.shape}: {golden.errors}")
    ran = f"{len(integers)} layers run on INT8 kernels of {result.engine}, the others in {result.precision}"
    out.print(f"integers  {ran if result.layers else f'unknown: {result.engine} does not say what its layers run in'}")
    if result.checks:
        worst = max(result.checks, key=lambda check: check.error)
        error = f"at most {worst.error:.2g} quantisation steps off ({worst.name})" if worst.error else "exact"
        out.print(f"layers    {len(result.checks)} checked one by one: {error}")
    for pattern in sorted(set(result.sparsity.values())):
        count = sum(one == pattern for one in result.sparsity.values())
        out.print(f"zeros     {count} layers have the pattern {pattern} along their inputs, in a standalone ONNX file too")
    if result.fallbacks and result.passed:
        names = ", ".join(result.fallbacks[:3]) + (", ..." if len(result.fallbacks) > 3 else "")
        out.print(f"note      {len(result.fallbacks)} INT8 layers run in float in {result.engine}: {names}")
