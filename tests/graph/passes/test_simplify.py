"""Rewritten graphs compute what they did before."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from muntin.graph.onnx_graph import Graph
from muntin.graph.passes.simplify import LARGEST_GROWTH, flat_gathers, fold_constants


@settings(max_examples=30, deadline=None)
@given(axis=st.integers(-3, 2), rows=st.lists(st.integers(1, 3), min_size=0, max_size=3), computed=st.booleans(), seed=st.integers(0, 99))
def test_flat_gathers(axis: int, rows: list[int], computed: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    table = rng.integers(0, x.shape[axis], rows, np.int64)
    gather = helper.make_node("Gather", ["x", "table"], ["y"], axis=axis, name="gather")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 3, "N"])]
    inputs += [helper.make_tensor_value_info("table", TensorProto.INT64, rows)] if computed else []
    constants = [] if computed else [numpy_helper.from_array(table, "table")]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * (2 + len(rows)))]
    model = helper.make_model(helper.make_graph([gather], "g", inputs, outputs, constants), opset_imports=[helper.make_opsetid("", 20)])
    graph = Graph(model)
    flat_gathers(graph)
    assert (len(graph.nodes) > 1) == (computed or len(rows) > 1)
    rewritten = graph.proto()
    onnx.checker.check_model(rewritten)
    given_inputs = {"x": x, "table": table} if computed else {"x": x}
    (result,) = ReferenceEvaluator(rewritten).run(None, given_inputs)
    assert result.shape == np.take(x, table, axis).shape
    assert result == pytest.approx(np.take(x, table, axis))


def test_large_constant_node() -> None:
    """The weights of models that hold them in Constant nodes become constants, too."""
    weight = np.ones((4, LARGEST_GROWTH), np.float32)
    nodes = [helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight)), helper.make_node("MatMul", ["x", "w"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", side]) for name, side in (("x", 4), ("y", LARGEST_GROWTH))]
    graph = Graph(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 20)]))
    fold_constants(graph)
    assert [node.op_type for node in graph.nodes] == ["MatMul"] and graph.constants["w"].shape == weight.shape
