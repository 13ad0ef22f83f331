"""The surroundings that a part of a graph depends on, against the arithmetic of receptive fields."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from muntin.artifact.tile_plan import MapTensor
from muntin.graph.tiling.reach import EndlessReachError, halo


def stack(*layers: tuple[int, int, int]) -> tuple[onnx.ModelProto, int]:
    """Convolutions of (kernel, stride, dilation) on one channel, and the product of the strides."""
    nodes, weights, name, total = [], [], "x", 1
    for number, (kernel, stride, dilation) in enumerate(layers):
        weights.append(numpy_helper.from_array(np.zeros((1, 1, kernel, kernel), np.float32), f"w{number}"))
        pad = dilation * (kernel // 2)
        nodes.append(
            helper.make_node("Conv", [name, f"w{number}"], [f"y{number}"], pads=[pad] * 4, strides=[stride] * 2, dilations=[dilation] * 2)
        )
        name, total = f"y{number}", total * stride
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 1, "h", "w"])
    graph = helper.make_graph(nodes, "stack", [value], [helper.make_empty_tensor_value_info(name)], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), total


def tensor(name: str, stride: int) -> MapTensor:
    return MapTensor(name=name, dtype="float32", channels=1, stride=stride, layout="channels first")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([(3, 1, 1)], (1, 1)),
        ([(3, 1, 1), (5, 1, 2)], (5, 5)),
        ([(3, 2, 1)], (2, 0)),
        ([(3, 2, 1), (3, 2, 1), (3, 1, 1)], (8, 4)),
        ([(1, 1, 1)], (0, 0)),
        ([(7, 1, 40)], (120, 120)),
        ([(7, 1, 200)], (600, 600)),
    ],
)
def test_convolutions(layers: list[tuple[int, int, int]], expected: tuple[int, int]) -> None:
    model, stride = stack(*layers)

    def cut(size: tuple[int, int]) -> onnx.ModelProto:
        part = onnx.ModelProto()
        part.CopyFrom(model)
        for dim, side in zip(part.graph.input[0].type.tensor_type.shape.dim[2:], size, strict=True):
            dim.dim_value = side
        return part

    assert halo(cut, [tensor("x", 1)], [tensor(f"y{len(layers) - 1}", stride)], stride) == expected


def test_whole_map() -> None:
    model, _ = stack((3, 1, 1))
    model.graph.node.append(helper.make_node("ReduceMax", ["y0"], ["mean"], keepdims=1))
    model.graph.node.append(helper.make_node("Add", ["y0", "mean"], ["z"]))
    del model.graph.output[:]
    model.graph.output.append(helper.make_empty_tensor_value_info("z"))

    def cut(size: tuple[int, int]) -> onnx.ModelProto:
        for dim, side in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], size, strict=True):
            dim.dim_value = side
        return model

    with pytest.raises(EndlessReachError, match="depend on more than 2048 pixels around"):
        halo(cut, [tensor("x", 1)], [tensor("z", 1)], 512)
