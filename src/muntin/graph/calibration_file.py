"""Calibration inputs of an ONNX model in a NumPy file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.lib.npyio import NpzFile

from muntin.errors import DataError
from muntin.graph.calibration import Inputs


def read_calibration(file: Path, model: onnx.ModelProto, rows: int) -> list[Inputs]:
    """Return the batches in a `.npz` file with an array for each input by its name, or in a `.npy` file with the array of the only input.

    `rows`: of a batch, along the first axis; a model of a fixed number takes that instead, and rows that fill no batch are left out.
    Raises DataError: unreadable, Python objects, arrays of different lengths, or fewer rows than a fixed batch.
    """
    constants = {entry.name for entry in model.graph.initializer}
    inputs = [entry for entry in model.graph.input if entry.name not in constants]
    try:
        loaded = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no NumPy file of numbers"
        raise DataError(f"{file} cannot be read ({reason}): give a .npz file with an array for each input") from error
    if isinstance(loaded, NpzFile):
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    elif len(inputs) == 1:
        arrays = {inputs[0].name: loaded}
    else:
        names = ", ".join(entry.name for entry in inputs)
        raise DataError(f"{file} holds one array, and the model takes {names}: give a .npz file with an array for each input")
    lengths = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        text = ", ".join(f"{name} {length}" for name, length in lengths.items()) or "none"
        raise DataError(f"{file}: the arrays have different numbers of rows ({text}): give the same number of each input")
    fixed = {entry.name: side.dim_value for entry in inputs for side in list(entry.type.tensor_type.shape.dim)[:1] if side.dim_value}
    rows = min(fixed.values(), default=rows)
    length = next(iter(lengths.values()))
    last = length - length % rows if fixed else length
    if not last:
        raise DataError(f"{file}: {length} rows, and the model takes {rows} at a time: give at least so many")
    return [{name: array[first : first + rows] for name, array in arrays.items()} for first in range(0, last, rows)]
