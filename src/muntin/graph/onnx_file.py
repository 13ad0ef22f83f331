"""Quantise an ONNX file after training: a float model with any named inputs in, an ONNX file in static INT8 out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from muntin.artifact.onnx_checks import check_data, check_operators
from muntin.errors import ArtifactError, ExportError
from muntin.graph.calibration import Inputs
from muntin.graph.onnx_graph import without_functions
from muntin.graph.quantize import MIN_SQNR_DB, calibrate
from muntin.graph.records import QuantizedOnnx

NamedArrays = Mapping[str, NDArray[Any]] | NDArray[Any]
"""The inputs by name, or the only input."""


def quantize_onnx(
    model: onnx.ModelProto | Path | str,
    calibration: Iterable[NamedArrays],
    *,
    keep: Collection[str] = (),
    min_sqnr_db: float = MIN_SQNR_DB,
) -> QuantizedOnnx:
    """Return a float ONNX model in static INT8: 8-bit activations and weights (a scale for each output channel) around every product.

    `calibration`: batches of typical inputs: arrays by input name, or the array of the only input. `keep`: names of nodes that stay in
    floats, or of modules around them. `min_sqnr_db`: a product whose own rounding leaves less signal over noise stays in floats.

    The result is of opset 20 or later, with QuantizeLinear and DequantizeLinear nodes, for OpenVINO, ONNX Runtime and TensorRT. Batch norms
    are folded, constants computed. Takes seconds, and memory for the operands of one batch, half a GiB at a time.

    Raises ExportError: a model that is quantised already, holds nothing to multiply or that ONNX Runtime cannot run; inputs of other
    names, types or shapes; a name in `keep` that is no product.
    """
    proto = read_float_model(model)
    batches = [named_inputs(batch, proto) for batch in ([calibration] if isinstance(calibration, np.ndarray) else calibration)]
    if not batches:
        raise ExportError("calibration is empty: give batches of typical inputs")
    return calibrate(proto, batches, min_sqnr_db=min_sqnr_db, keep=keep).quantized()


def read_float_model(model: onnx.ModelProto | Path | str) -> onnx.ModelProto:
    """Return a checked float model without local functions. Raises ExportError, for data outside of its folder, too."""
    where = "the model" if isinstance(model, onnx.ModelProto) else str(model)
    try:
        proto = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
        onnx.checker.check_model(proto)
        check_data(proto)
        proto = without_functions(proto)
        check_operators(proto)
    except OSError as error:
        raise ExportError(f"{where} cannot be read ({error.strerror or error}): name an ONNX file") from error
    except ArtifactError as error:
        raise ExportError(f"{where}: {error}") from error
    except Exception as error:  # protobuf's and onnx's errors have no common class
        raise ExportError(f"{where} is no valid ONNX model: {' '.join(str(error).split())[:300] or type(error).__name__}") from error
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in proto.graph.node):
        raise ExportError(f"{where} is quantised already: give the float model that it was made from")
    return proto


def named_inputs(batch: NamedArrays, proto: onnx.ModelProto, called: str = "calibration") -> Inputs:
    """Return a batch as arrays by name. Raises ExportError for inputs other than the model's. `called`: its name in errors."""
    constants = {entry.name for entry in proto.graph.initializer}
    inputs = {entry.name: entry for entry in proto.graph.input if entry.name not in constants}
    if isinstance(batch, np.ndarray):
        if len(inputs) != 1:
            raise ExportError(f"{called} is an array, and the model takes {', '.join(inputs)}: give a dictionary of arrays by name")
        batch = {next(iter(inputs)): batch}
    if batch.keys() != inputs.keys():
        raise ExportError(f"{called} names {', '.join(batch) or 'nothing'}, and the model takes {', '.join(inputs)}")
    for name, value in batch.items():
        tensor = inputs[name].type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        sides = [side.dim_value or None for side in tensor.shape.dim]
        fits = len(sides) == value.ndim and all(side in (None, given) for side, given in zip(sides, value.shape, strict=True))
        if value.dtype != dtype or not fits or 0 in value.shape:
            allowed = " x ".join("any" if side is None else str(side) for side in sides)
            raise ExportError(f"{called} of '{name}' is {value.dtype} {value.shape}: the model takes {dtype} of {allowed}")
    return dict(batch)
