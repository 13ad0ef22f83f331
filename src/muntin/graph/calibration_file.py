"""Calibration inputs of an ONNX model in a NumPy file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.lib.npyio import NpzFile

from muntin.errors import DataError
from muntin.graph.calibration import Inputs
from muntin.graph.onnx_graph import Array


def read_calibration(file: Path, model: onnx.ModelProto, rows: int) -> list[Inputs]:
    """Return the batches in a `.npz` file with an array for each input by its name, or in a `.npy` file with the array of the only input.

    `rows`: of a batch, along the first axis; a model of a fixed number takes that instead, and rows that fill no batch are left out.
    Raises DataError as `read_arrays` does, and for fewer rows than a fixed batch.
    """
    constants = {entry.name for entry in model.graph.initializer}
    inputs = [entry for entry in model.graph.input if entry.name not in constants]
    arrays = read_arrays(file, [entry.name for entry in inputs])
    fixed = {entry.name: side.dim_value for entry in inputs for side in list(entry.type.tensor_type.shape.dim)[:1] if side.dim_value}
    return in_batches(file, arrays, min(fixed.values(), default=rows), whole=bool(fixed))


def read_arrays(file: Path, names: Sequence[str]) -> dict[str, Array]:
    """Return the arrays in a `.npz` file, or that in a `.npy` file under the only one of `names`, the model's inputs.

    Raises DataError: unreadable, Python objects, several inputs and one array, arrays of different lengths.
    """
    try:
        loaded = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no NumPy file of numbers"
        raise DataError(f"{file} cannot be read ({reason}): give a .npz file with an array for each input") from error
    if isinstance(loaded, NpzFile):
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    elif len(names) == 1:
        arrays = {names[0]: loaded}
    else:
        raise DataError(f"{file} holds one array, and the model takes {', '.join(names)}: give a .npz file with an array for each input")
    lengths = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        text = ", ".join(f"{name} {length}" for name, length in lengths.items()) or "none"
        raise DataError(f"{file}: the arrays have different numbers of rows ({text}): give the same number of each input")
    return arrays


def in_batches(file: Path, arrays: Inputs, rows: int, *, whole: bool) -> list[Inputs]:
    """Return arrays in batches of `rows`. `whole`: rows that fill no batch are left out. Raises DataError for too few of them."""
    length = next(iter(arrays.values())).shape[0]
    last = length - length % rows if whole else length
    if not last:
        raise DataError(f"{file}: {length} rows, and the model takes {rows} at a time: give at least so many")
    return [{name: array[first : first + rows] for name, array in arrays.items()} for first in range(0, last, rows)]
