"""Bias correction on the graph, and smoothing. Axes: N rows, C channels."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from muntin.graph import quantize
from muntin.graph.float_run import FloatRun
from muntin.graph.onnx_graph import Graph
from muntin.graph.passes.smoothing import smooth

Floats = NDArray[np.float32]


def model_of(nodes: list[onnx.NodeProto], constants: dict[str, Floats], shape: list[int | str]) -> onnx.ModelProto:
    """A model from "x" of a shape to "y"."""
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)]
    outputs = [helper.make_empty_tensor_value_info("y")]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "model", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def convolutions(depth: int) -> onnx.ModelProto:
    """3x3 convolutions with ReLU, every second one with a bias. One weight of each output is large: the others are coarse in 8 bits."""
    rng = np.random.default_rng(0)
    nodes, constants = [], {}
    for index in range(depth):
        constants[f"w{index}"] = rng.normal(0, (2 / 72) ** 0.5, (8, 8, 3, 3)).astype(np.float32)
        constants[f"w{index}"][:, 0, 1, 1] = 3
        names = [f"t{index}" if index else "x", f"w{index}"]
        if index % 2:
            constants[f"b{index}"] = rng.normal(0, 0.1, 8).astype(np.float32)
            names.append(f"b{index}")
        last = index == depth - 1
        nodes.append(helper.make_node("Conv", names, ["y" if last else f"c{index}"], name=f"conv{index}", pads=[1, 1, 1, 1]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"c{index}"], [f"t{index + 1}"]))
    return model_of(nodes, constants, ["n", 8, "h", "w"])


def test_mean_errors_are_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = convolutions(8), np.random.default_rng(1)
    calibration = [{"x": rng.normal(5, 1, size=(4, 8, 12, 12)).astype(np.float32)} for _ in range(4)]
    other = {"x": rng.normal(5, 1, size=(16, 8, 12, 12)).astype(np.float32)}
    exact = FloatRun(model)(other)["y"]

    def errors() -> tuple[float, float]:
        result = quantize.calibrate(model, calibration, min_sqnr_db=0).quantized()
        error_NCHW = FloatRun(result.model, exact=True)(other)["y"] - exact
        return float(np.abs(error_NCHW.mean((0, 2, 3))).mean()), float(np.square(error_NCHW).mean())

    corrected = errors()
    monkeypatch.setattr(quantize, "correct_biases", lambda *_, **__: None)
    plain = errors()
    assert corrected[0] < 0.3 * plain[0] and corrected[1] < plain[1]


def linear(*, uneven: float) -> tuple[onnx.ModelProto, list[dict[str, Floats]]]:
    """A Linear whose first input channel is `uneven` times as large as the others, and inputs."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="linear")]
    size_C = np.r_[uneven, np.ones(31)].astype(np.float32)
    inputs = [{"x": (rng.normal(size=(64, 32)) * size_C).astype(np.float32)} for _ in range(2)]
    return model_of(nodes, {"w": rng.normal(size=(32, 16)).astype(np.float32)}, ["n", 32]), inputs


@pytest.mark.parametrize(("uneven", "nodes"), [(50.0, 2), (1.0, 1)])
def test_uneven_channels_are_smoothed(uneven: float, nodes: int) -> None:
    model, inputs = linear(uneven=uneven)
    graph = Graph(model)
    smooth(graph, inputs)
    assert len(graph.nodes) == nodes  # another one has the factors
    before, after = (FloatRun(one)(inputs[0])["y"] for one in (model, graph.proto()))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    smooth(kept := Graph(model), inputs, rounded=["linear"])
    assert len(kept.nodes) == 1


def test_products_left_in_floats_keep_their_biases() -> None:
    """Without any quantised product, as where no engine has a kernel, the graph computes what it did."""
    model, x = convolutions(4), np.random.default_rng(1).normal(5, 1, size=(4, 8, 12, 12)).astype(np.float32)
    whole = quantize.calibrate(model, [{"x": x}], min_sqnr_db=0)
    floats = whole.without(dict.fromkeys(whole.grids, "no kernel")).quantized().model
    np.testing.assert_allclose(FloatRun(floats)({"x": x})["y"], FloatRun(model)({"x": x})["y"], rtol=1e-4)


def test_sequence_between_products() -> None:
    """A sequence of tensors that a later product depends on."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("SplitToSequence", ["c"], ["parts"], axis=1, keepdims=1),
        helper.make_node("MatMul", ["c", "w"], ["d"], name="second"),
        helper.make_node("Add", ["d", "b"], ["e"]),
        helper.make_node("ConcatFromSequence", ["parts"], ["f"], axis=1),
        helper.make_node("MatMul", ["f", "w"], ["g"], name="third"),
        helper.make_node("Add", ["g", "b"], ["h"]),
        helper.make_node("Add", ["e", "h"], ["y"]),
    ]
    constants = {"w": rng.normal(size=(8, 8)).astype(np.float32), "b": rng.normal(size=8).astype(np.float32)}
    result = quantize.calibrate(model_of(nodes, constants, ["n", 8]), [{"x": rng.normal(size=(16, 8)).astype(np.float32)}]).quantized()
    assert [record.bits for record in result.products] == [8, 8, 8]
