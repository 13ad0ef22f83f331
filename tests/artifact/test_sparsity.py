"""Patterns of zeros in the weights of a graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from muntin.artifact.sparsity import sparsity_of


def sparse(shape: tuple[int, ...], n: int, m: int, axis: int, *, low: int = 1, high: int = 8, seed: int = 0) -> np.ndarray:
    """Integers of which n of m along an axis are not zero."""
    rng = np.random.default_rng(seed)
    values = np.moveaxis(rng.integers(low, high, shape) * rng.choice([-1, 1], shape), axis, -1)
    groups = values.reshape(-1, m)
    places = rng.permuted(np.tile(np.arange(m), (len(groups), 1)), axis=1)[:, n:]
    np.put_along_axis(groups, places, 0, 1)
    return np.ascontiguousarray(np.moveaxis(groups.reshape(values.shape), -1, axis)).astype(np.int8)


def graph_of(weight: np.ndarray, kind: str, **options: int) -> onnx.ModelProto:
    """One product with a constant weight, quantised if it is of integers."""
    names, nodes = ["x", "w"], []
    constants = [numpy_helper.from_array(weight, "w")]
    if weight.dtype == np.int8:
        constants += [numpy_helper.from_array(np.float32(1), "s"), numpy_helper.from_array(np.int8(0), "z")]
        nodes.append(helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"]))
        names[1] = "d"
    nodes.append(helper.make_node(kind, names, ["y"], name="layer", **options))
    return helper.make_model(helper.make_graph(nodes, "g", [], [], constants))


@pytest.mark.parametrize(("kind", "axis", "options"), [("Conv", 1, {}), ("MatMul", 0, {}), ("Gemm", 0, {}), ("Gemm", 1, {"transB": 1})])
@pytest.mark.parametrize("dtype", ["int8", "float32"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "8:16"])
def test_pattern_along_the_inputs(kind: str, axis: int, options: dict[str, int], dtype: str, pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    values = sparse((32, 32, 3, 3) if kind == "Conv" else (32, 32), n, m, axis).astype(dtype)
    assert sparsity_of(graph_of(values, kind, **options)) == {"layer": pattern}
    across = np.ascontiguousarray(np.swapaxes(values, 0, 1))
    assert sparsity_of(graph_of(across, kind, **options)) != {"layer": pattern}


def test_patterns_that_do_not_count() -> None:
    rng = np.random.default_rng(0)
    few_bits = rng.integers(-1, 2, (64, 64)).astype(np.int8)  # a third of zeros
    small = sparse((16, 8), 2, 4, 1)
    mild = sparse((64, 64), 3, 4, 1)
    blocks = np.kron(rng.random((8, 8)) < 0.5, np.ones((4, 8))).astype(np.int8)
    for values in (few_bits, small, mild, blocks, np.zeros((64, 64), np.int8)):
        assert not sparsity_of(graph_of(values, "Conv")) and not sparsity_of(graph_of(values.T.copy(), "MatMul"))
    assert not sparsity_of(graph_of(sparse((32, 32, 3, 3), 2, 4, 1), "Conv", group=2))
