"""An ONNX model of any kind as an artefact with named inputs and outputs. Needs no PyTorch.

float ONNX -> (quantise) -> golden pairs of the deployed graph -> OpenVINO, ONNX Runtime -> artefact
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from muntin.artifact import LayerRecord, TensorArtifact, TensorPair, check_target
from muntin.artifact.onnx_weights import MOVED_FROM
from muntin.errors import ExportError
from muntin.graph.artifacts.engine_check import FallbackError, write_checked_tensors
from muntin.graph.artifacts.signature import declared_inputs, golden_pairs, signature_of
from muntin.graph.calibration import Inputs
from muntin.graph.float_run import FloatRun
from muntin.graph.onnx_file import NamedArrays, named_inputs, read_float_model
from muntin.graph.quantize import MIN_SQNR_DB, QuantizedOnnx, keep_floats, quantize
from muntin.runtime import describe_hardware
from muntin.runtime.verification.tensors import compare_outputs

FAR_OFF = 0.25
"""Root mean square error of integers, in standard deviations of an output, from which on a note says so."""


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
) -> TensorArtifact:
    """Write a float ONNX model as an artefact: any named inputs and outputs of any shape. An existing artefact is replaced as a whole.

    `calibration`: batches of typical inputs (arrays by name, or of the only input), with which it is quantised as by `quantize_onnx`, that
    takes `keep` and `min_sqnr_db`, too; None: it stays in floats. `example`: inputs to make the golden pairs of, by default those of
    `calibration`; one of the two is needed. `dims`: sizes of free dimensions that `load` compiles for, by default one row of the example's.
    `measured`: plain figures for the manifest.

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
    floats = FloatRun(proto)
    inputs = declared_inputs(proto, given[0])
    pairs, notes = golden_pairs(inputs, given, floats)
    signature = signature_of(proto, inputs, pairs, floats)
    sizes = {dim: 1 if dim == signature.batch else size for dim, size in _free(signature.inputs, given[0]).items()}
    if dims is not None and (problem := signature.dims_problem(dims)) is not None:
        raise ExportError(f"dims with {problem}")
    content = {"signature": signature, "example": dict(sizes if dims is None else dims)}
    if calibration is None:
        return _write(path, keep_floats(proto, given), pairs, content, measured or {}, notes)
    named = set(keep)
    deployed = quantize(proto, batches, min_sqnr_db=min_sqnr_db, keep=named)
    try:
        return _write(path, deployed, pairs, content, measured or {}, [*notes, *deployed.notes])
    except FallbackError as error:
        named |= set(error.names)
    kept = f"in floats, as OpenVINO would run {'it' if len(named) == len(keep) + 1 else 'them'} so: {', '.join(sorted(named - set(keep)))}"
    deployed = quantize(proto, batches, min_sqnr_db=min_sqnr_db, keep=named)
    return _write(path, deployed, pairs, content, measured or {}, [*notes, *deployed.notes, kept])


def _free(inputs: Sequence[Any], batch: Inputs) -> dict[str, int]:
    return {dim: size for info in inputs for dim, size in zip(info.shape, batch[info.name].shape, strict=True) if isinstance(dim, str)}


def _write(
    path: Path | str,
    deployed: QuantizedOnnx,
    pairs: Sequence[TensorPair],
    content: Mapping[str, Any],
    measured: Mapping[str, Any],
    notes: Sequence[str],
) -> TensorArtifact:
    """Write the artefact of a deployed graph. `pairs`: inputs, and the outputs of the float graph."""
    quantised = any(record.bits for record in deployed.products)
    halves = _halve(deployed.model) if quantised else set()
    run = FloatRun(deployed.model, exact=True)
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
    return write_checked_tensors(
        Path(path),
        {
            "model": deployed.model,
            "packing": dict.fromkeys(_exact_halves(deployed.model), "f16"),
            "golden": golden,
            "layers": [
                LayerRecord(
                    name=record.name,
                    kind=record.kind,
                    weight_bits=record.bits or (16 if record.name in halves else 32),
                    activation_bits=record.bits,
                    parameters=record.parameters,
                    macs=record.macs,
                    note=record.reason,
                )
                for record in deployed.products
            ],
            "measured": {**figures, **measured},
            **content,
        },
        [*notes, *moved],
    )


def rounding(golden: Sequence[TensorPair], floats: Sequence[TensorPair]) -> dict[str, dict[str, float | None]]:
    """Return the largest errors of each output of the deployed graph, compared with the float graph's (`OutputResult`)."""
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


def _halve(model: onnx.ModelProto) -> set[str]:
    """Round the float weights of a quantised model to half precision in place. Return the nodes that read one.

    The relative error of 2**-11 is far below that of 8 bits; embedding tables, which stay floats, take half the bytes. Scales stay.
    """
    scales = {name for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear") for name in node.input[1:]}
    rounded = set()
    for initializer in model.graph.initializer:
        if initializer.data_type != onnx.TensorProto.FLOAT or initializer.name in scales or np.prod(initializer.dims) <= MOVED_FROM:
            continue
        values = onnx.numpy_helper.to_array(initializer)
        if np.abs(values).max() <= np.finfo(np.float16).max:
            halves = values.astype(np.float16).astype(np.float32)
            initializer.CopyFrom(onnx.numpy_helper.from_array(halves, initializer.name))
            rounded.add(initializer.name)
    return {node.name for node in model.graph.node if rounded.intersection(node.input)}


def _exact_halves(model: onnx.ModelProto) -> list[str]:
    """Return the float weights that half precision holds exactly."""
    names = []
    for initializer in model.graph.initializer:
        if initializer.data_type == onnx.TensorProto.FLOAT and np.prod(initializer.dims) > MOVED_FROM:
            values = onnx.numpy_helper.to_array(initializer)
            largest = np.abs(values).max()
            if largest <= np.finfo(np.float16).max and np.array_equal(values, values.astype(np.float16).astype(np.float32)):
                names.append(initializer.name)
    return names
