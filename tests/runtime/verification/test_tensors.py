"""Verification of artefacts with named tensors: every output of the golden pairs, and rows of a batch."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import muntin
from muntin.artifact import GoldenTolerance, TensorInfo, TensorSignature
from muntin.graph.float_run import FloatRun
from muntin.runtime import SessionOptions
from muntin.runtime.verification.golden import compare_outputs
from tensor_models import SIGNATURE, model, normal, text_inputs, two_heads, write_tensors


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_sound_artifact(tmp_path: Path, engine: str) -> None:
    result = muntin.verify(write_tensors(tmp_path / "artifact").path, SessionOptions(engine=engine))
    assert result.passed, result.problems
    assert [(output.name, output.shape) for output in result.golden] == [
        ("embedding", (2, 24)), ("label", (2,)), ("embedding", (3, 24)), ("label", (3,))
    ]  # fmt: skip
    assert all(output.cosine is None or output.cosine > 0.999 for output in result.golden)


def test_wrong_output_is_named(tmp_path: Path) -> None:
    inputs = text_inputs(2, 9)
    outputs = FloatRun(two_heads())(inputs)
    moved = outputs | {"embedding": outputs["embedding"] + 0.1 * outputs["embedding"].std()}
    relabelled = outputs | {"label": outputs["label"] + np.array([0, 1])}
    for wrong, words in ((moved, r"embedding \(2, 24\): largest error 0.1"), (relabelled, r"label \(2,\): 50.00% of its values are equal")):
        artifact = write_tensors(tmp_path / "artifact", golden=[(inputs, wrong)])
        (problem,) = muntin.verify(artifact.path, SessionOptions(engine="onnxruntime")).problems
        assert re.search(f"^golden pair 0 {words}", problem), problem


def test_rows_that_depend_on_each_other(tmp_path: Path) -> None:
    proto = model("(float[rows, 4] x) => (float[rows, 4] y) { s = Softmax<axis = 0>(x)\n y = MatMul(s, w) }", w=normal(4, 4))
    infos = [TensorInfo(name=name, dtype="float32", shape=("rows", 4)) for name in "xy"]
    for batch, passes in (("rows", False), (None, True)):
        signature = TensorSignature(inputs=(infos[0],), outputs=(infos[1],), batch=batch)
        fields = {"inputs": [{"x": normal(3, 4, seed=1)}], "signature": signature, "example": None}
        result = muntin.verify(write_tensors(tmp_path / "artifact", proto, **fields).path, SessionOptions(precision="f32"))
        assert result.passed == passes
        assert passes or "3 rows in a call give other y than each alone" in result.problems[0]


def test_unrecorded_engine(tmp_path: Path) -> None:
    artifact = write_tensors(tmp_path / "artifact", golden_tolerance={}, signature=SIGNATURE)
    assert (
        "no golden tolerance is recorded for onnxruntime in f32"
        in muntin.verify(artifact.path, SessionOptions(engine="onnxruntime")).problems[0]
    )


def test_errors_of_numbers() -> None:
    limit = GoldenTolerance(max_error=0.01, label_agreement=1)
    number = {"y": np.array([[40.0]], np.float32)}
    (close,) = compare_outputs({"y": np.array([[40.2]], np.float32)}, number, limit)
    (far,) = compare_outputs({"y": np.array([[41.0]], np.float32)}, number, limit)
    (nan,) = compare_outputs({"y": np.array([[np.nan]], np.float32)}, number, limit)
    (shape,) = compare_outputs({"y": np.zeros((2, 1), np.float32)}, number, limit)
    assert [result.passed for result in (close, far, nan, shape)] == [True, False, False, False]
    assert close.max_error == pytest.approx(0.005, rel=1e-4)
    assert close.cosine is None
