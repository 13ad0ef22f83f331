"""Tracing an engine's kernels back to the graph's nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from muntin.runtime.engines.onnx_nodes import ComputeNodes, Weight, compute_nodes

NODES = ComputeNodes(names=frozenset({"conv1", "block/qkv", "head"}), outputs={"scores": "head"})


def test_names_that_engines_make() -> None:
    for reported, node in [
        (["conv1/WithoutBiases", "Multiply_12", "conv1", "block/qkv/quantize"], "conv1"),
        (["block/qkv/DequantizationMultiply"], "block/qkv"),
        (["conv1_token_0"], "conv1"),
        (["fused head"], "head"),
        (["scores_original", "scores"], "head"),
    ]:
        assert NODES.find(reported, derived=True) == node


def test_fused_quantiser() -> None:
    assert NODES.find(["conv1", "block/qkv/quantize"], derived=True) == "conv1"
    assert NODES.find(["add", "block/qkv/quantize"], derived=False) is None


def test_strangers() -> None:
    assert NODES.find(["conv10", "other/conv1", ""], derived=True) is None
    assert NODES.find([], derived=True) is None


def graph_of(nodes: list[onnx.NodeProto], values: dict[str, Any]) -> bytes:
    """A model of these nodes from "x" to "scores"."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 4, "H", "W"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", 4, "H", "W"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


def residual() -> bytes:
    """Two convolutions into one sum and a ReLU, of which one goes through a scale first; then a third."""
    node = helper.make_node
    weight = np.ones((4, 4, 1, 1), np.float32)
    nodes = [
        node("Conv", ["x", "model.left.weight"], ["left_out"], name="left_norm"),
        node("Mul", ["left_out", "scale"], ["left_scaled"], name="scaled"),
        node("Conv", ["x", "model.right.weight"], ["right_out"], name="right"),
        node("Add", ["left_scaled", "right_out"], ["sum"], name="add"),
        node("Relu", ["sum"], ["active"], name="relu"),
        node("Conv", ["active", "model.depthwise.weight"], ["scores"], name="last", group=4),
    ]
    values = {"model.left.weight": weight, "model.right.weight": weight, "model.depthwise.weight": weight[:, :1]}
    return graph_of(nodes, values | {"scale": np.float32(2)})


def test_kernel_named_by_a_fused_node() -> None:
    nodes = compute_nodes(residual())
    for reported, node in [("left_out_nchwc", "left_norm"), ("left_scaled_nchwc_token_3", "left_norm"), ("scores_nchwc", "last")]:
        assert nodes.find([reported], derived=True) == node
    assert nodes.find(["active"], derived=False) is None


def test_fused_sum_of_two_products() -> None:
    nodes = compute_nodes(residual())
    for reported in ("sum_nchwc", "active_nchwc"):
        assert nodes.find([reported], derived=True) is None
        assert nodes.find([reported], derived=True, taken={"right"}) == "left_norm"
        assert nodes.find([reported], derived=True, taken={"left_norm"}) == "right"


def test_weights_of_compute_nodes() -> None:
    weights = compute_nodes(residual()).weights
    assert weights["left_norm"] == Weight(name="model.left.weight", shape=(4, 4, 1, 1))
    assert weights["last"] == Weight(name="model.depthwise.weight", shape=(4, 1, 1, 1), groups=4)
