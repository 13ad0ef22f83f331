"""Calibration inputs in NumPy files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from muntin.errors import DataError
from muntin.graph.calibration_file import read_calibration


def model(*rows: int | str) -> onnx.ModelProto:
    """A model with an input for each number of rows: a, b, ..."""
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [first, 2]) for name, first in zip("abc", rows, strict=False)
    ]
    return onnx.helper.make_model(onnx.helper.make_graph([], "empty", inputs, []))


def test_batches(tmp_path: Path) -> None:
    array = np.arange(14, dtype=np.float32).reshape(7, 2)
    np.save(tmp_path / "one.npy", array)
    batches = read_calibration(tmp_path / "one.npy", model("B"), 3)
    assert [batch["a"].shape[0] for batch in batches] == [3, 3, 1]
    assert (np.concatenate([batch["a"] for batch in batches]) == array).all()
    assert [batch["a"].shape[0] for batch in read_calibration(tmp_path / "one.npy", model(2), 8)] == [2, 2, 2]
    np.savez(tmp_path / "two.npz", a=array, b=array + 1)
    assert [sorted(batch) for batch in read_calibration(tmp_path / "two.npz", model("B", "B"), 4)] == [["a", "b"]] * 2


@pytest.mark.parametrize(
    ("arrays", "rows", "message"),
    [
        (np.zeros((2, 2)), ("B", "B"), "holds one array, and the model takes a, b"),
        ({"a": np.zeros((2, 2)), "b": np.zeros((3, 2))}, ("B", "B"), r"different numbers of rows \(a 2, b 3\)"),
        ({}, ("B",), r"different numbers of rows \(none\)"),
        (np.zeros((3, 2)), (4,), "3 rows, and the model takes 4 at a time"),
        (np.array([{}]), ("B",), "no NumPy file of numbers"),
    ],
)
def test_refused_files(arrays: Any, rows: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    file = tmp_path / ("many.npz" if isinstance(arrays, dict) else "one.npy")
    if isinstance(arrays, dict):
        np.savez(file, **arrays)
    else:
        np.save(file, arrays, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        read_calibration(file, model(*rows), 8)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.npz cannot be read \(No such file or directory\)"):
        read_calibration(tmp_path / "none.npz", model("B"), 8)
