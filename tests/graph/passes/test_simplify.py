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
from muntin.graph.passes.simplify import flat_gathers, shared_factors


def test_shared_factors() -> None:
    """Of four products of x, two have equal factors; one of these is an output too."""
    factors = {"a": [1.5, 2.0], "b": [1.5, 2.0], "c": [1.5, 3.0], "d": [1.5, 2.0]}
    nodes = [helper.make_node("Mul", ["x", name] if name != "b" else [name, "x"], [f"x{name}"]) for name in factors]
    nodes += [helper.make_node("Relu", [f"x{name}"], [f"y{name}"]) for name in factors]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 2]) for name in ("ya", "yb", "yc", "yd", "xd")]
    constants = [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in factors.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 2])]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, constants), opset_imports=[helper.make_opsetid("", 20)])
    graph, x = Graph(model), np.array([[1.0, -2.0]], np.float32)
    shared_factors(graph)
    assert [node.op_type for node in graph.nodes].count("Mul") == 3
    for one, other in zip(*(ReferenceEvaluator(proto).run(None, {"x": x}) for proto in (model, graph.proto())), strict=True):
        assert np.array_equal(one, other)


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
