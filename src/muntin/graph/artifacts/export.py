"""An ONNX model of any kind as an artefact with named inputs and outputs. Needs no PyTorch.

float ONNX -> (quantise) -> golden pairs of the deployed graph -> OpenVINO, ONNX Runtime -> artefact
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from muntin.artifact import Artifact, TensorPair, check_target
from muntin.errors import ExportError
from muntin.graph.artifacts.engine_check import FAR_OFF, FLOAT_LIMITS, EngineCheck, widened_limits, write_checked, write_with_fallbacks
from muntin.graph.artifacts.manifest_entries import layer_records, packing_of
from muntin.graph.artifacts.signature import declared_inputs, golden_pairs, signature_of
from muntin.graph.calibration import Inputs
from muntin.graph.float_run import FloatRun
from muntin.graph.onnx_file import NamedArrays, named_inputs, read_float_model
from muntin.graph.onnx_graph import Array
from muntin.graph.quantize import MIN_SQNR_DB, GraphQuantization, calibrate, first_row, with_grids
from muntin.graph.records import QuantizedOnnx
from muntin.runtime import describe_hardware
from muntin.runtime.verification.golden import compare_outputs


def export_onnx(
    model: onnx.ModelProto | Path | str,
    path: Path | str,
    *,
    calibration: Iterable[NamedArrays] | None = None,
    example: NamedArrays | None = None,
    keep: Collection[str] = (),
    min_sqnr_db: float = MIN_SQNR_DB,
    dims: Mapping[str, int] | None = None,
    measured: Mapping[str, Any] | None = None,
    passes: Iterable[Mapping[str, Any]] = (),
) -> Artifact:
    """Write a float ONNX model as an artefact: any named inputs and outputs of any shape. An existing artefact is replaced as a whole.

    `calibration`: batches of typical inputs (arrays by name, or of the only input), with which it is quantised as by `quantize_onnx`, that
    takes `keep` and `min_sqnr_db`, too; None: it stays in floats. `example`: inputs to make the golden pairs of, by default those of
    `calibration`; one of the two is needed. `dims`: sizes of free dimensions that `load` compiles for, by default one row of the example's.
    `measured`, `passes`: plain figures, and entries of earlier changes of layers, for the manifest.

    Free dimensions keep their names. Quantised products that OpenVINO would run in floats stay floats. The manifest's `measured` has
    `integer_coverage` (share of multiply-adds in integers), `rounding` (what integers change in the golden outputs) and `notes`.

    Raises ExportError as `quantize_onnx` does, and for a model that engines do not compute as its graph says; nothing is written then.
    """
    check_target(path)
    proto = onnx.shape_inference.infer_shapes(read_float_model(model))  # some outputs have no declared shape
    batches = [named_inputs(batch, proto) for batch in ([calibration] if isinstance(calibration, np.ndarray) else calibration or ())]
    given = batches if example is None else [named_inputs(example, proto, "example")]
    if calibration is not None and not batches:
        raise ExportError("calibration is empty: give batches of typical inputs, or None to stay in floats")
    if keep and calibration is None:
        raise ExportError(f"keep names {', '.join(sorted(keep))}, and without calibration everything stays in floats: give it, or no keep")
    if not given:
        raise ExportError("no inputs: give calibration (batches of typical inputs), or example (one batch) to stay in floats")

    def quantize(rows: Inputs) -> GraphQuantization:
        if calibration is None:
            return with_grids(proto, {}, {}, example=rows, half=False)
        return calibrate(proto, batches, min_sqnr_db=min_sqnr_db, keep=keep, example=rows, half=True)

    content = {"measured": measured or {}, "passes": passes}
    return write_graph(proto, path, quantize, given, content, dims=dims, integers=calibration is not None)


def write_graph(
    proto: onnx.ModelProto,
    path: Path | str,
    quantize: Callable[[Inputs], GraphQuantization],
    given: Sequence[Inputs],
    content: Mapping[str, Any],
    *,
    integers: bool,
    dims: Mapping[str, int] | None = None,
    due: TensorPair | None = None,
) -> Artifact:
    """Write a float graph, quantised, as an artefact; see `export_onnx`.

    `quantize`: returns the quantised graph; gets the inputs for which multiply-adds are counted. `given`: batches of inputs, of which
    the golden pairs are made. `content`: `measured` and `passes` for the manifest. `integers`: True if products are to be quantised. `due`:
    inputs and the outputs that the quantised graph is to give for them.
    """
    floats = FloatRun(proto)
    inputs = declared_inputs(proto, given[0])
    pairs, notes = golden_pairs(inputs, given, floats)
    signature = signature_of(proto, inputs, pairs, floats)
    sizes = {dim: 1 if dim == signature.batch else size for dim, size in _free(signature.inputs, given[0]).items()}
    if dims is not None and (problem := signature.dims_problem(dims)) is not None:
        raise ExportError(f"dims with {problem}")
    content = {**content, "signature": signature, "example": dict(sizes if dims is None else dims)}

    def write(deployed: QuantizedOnnx) -> Artifact:
        return _write(path, deployed, pairs, content, due, [*notes, *(deployed.notes if integers else ())])

    return write_with_fallbacks(quantize(first_row(given[-1])), write)


def _free(inputs: Sequence[Any], batch: Inputs) -> dict[str, int]:
    return {dim: size for info in inputs for dim, size in zip(info.shape, batch[info.name].shape, strict=True) if isinstance(dim, str)}


def _write(
    path: Path | str,
    deployed: QuantizedOnnx,
    pairs: Sequence[TensorPair],
    content: Mapping[str, Any],
    due: TensorPair | None,
    notes: Sequence[str],
) -> Artifact:
    """Write the artefact of a deployed graph. `pairs`: inputs, and the outputs of the float graph. `due`: see `write_graph`."""
    quantised = any(record.bits for record in deployed.products)
    run = FloatRun(deployed.model, exact=True)
    if due is not None:
        _check_integers(run, *due)
    golden = [(inputs, run(inputs)) for inputs, _ in pairs]
    for _, outputs in golden:
        if wrong := [name for name, tensor in outputs.items() if tensor.dtype.kind == "f" and not np.isfinite(tensor).all()]:
            raise ExportError(
                f"in integers output '{wrong[0]}' holds NaN or infinity: calibrate with more inputs, or name products in keep"
            )
    changes = rounding(golden, pairs) if quantised else {}
    worst = {name: change["rms_error"] for name, change in changes.items() if (change["rms_error"] or 0) > FAR_OFF}
    moved = [
        f"integers move output {name} by {error:.2g} standard deviations in the mean: measure what that costs, calibrate with more inputs, "
        "or keep products in floats"
        for name, error in worst.items()
    ]
    figures: dict[str, Any] = {"hardware": describe_hardware(), "integer_coverage": deployed.coverage if quantised else 0.0}
    if changes:
        figures["rounding"] = changes
    content = {
        "model": deployed.model,
        "packing": packing_of(deployed.model),
        "golden": golden,
        "layers": layer_records(deployed.products),
        **content,
        "measured": {**figures, **content["measured"]},
    }
    limits, widened = widened_limits(content) if quantised else (FLOAT_LIMITS, [])
    return write_checked(Path(path), content, [*notes, *moved, *widened], EngineCheck(limits=limits))


def _check_integers(run: FloatRun, inputs: Inputs, due: dict[str, Array]) -> None:
    """Raise ExportError where a quantised graph computes otherwise than the quantised model that it was made of."""
    for result in compare_outputs(run(inputs), due, None):
        if result.rms_error is not None and not result.rms_error <= FAR_OFF:
            raise ExportError(
                f"the graph does not compute what the quantised model does: {result.name} {result.shape}: {result.errors} (allowed: "
                f"{FAR_OFF:g} in the mean); nothing was written"
            )


def rounding(golden: Sequence[TensorPair], floats: Sequence[TensorPair]) -> dict[str, dict[str, float | None]]:
    """Return the largest errors of each output of the deployed graph, compared with the float graph's (`GoldenResult`)."""
    changes: dict[str, dict[str, float | None]] = {}
    for (_, deployed), (_, due) in zip(golden, floats, strict=True):
        for result in compare_outputs(deployed, due, None):
            errors = {"max_error": result.max_error, "rms_error": result.rms_error, "cosine": result.cosine, "equal": result.equal}
            earlier = changes.get(result.name, errors)
            worse = {"max_error": max, "rms_error": max, "cosine": min, "equal": min}
            changes[result.name] = {
                key: value if (other := earlier[key]) is None or value is None else worse[key](other, value)
                for key, value in errors.items()
            }
    return changes
