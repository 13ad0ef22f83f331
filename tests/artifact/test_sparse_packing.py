"""Sparse packing: nothing is lost, the smallest form is taken, nothing malformed passes."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from muntin.artifact import onnx_weights
from muntin.artifact.manifest import SparseStorage, TensorRecord
from muntin.artifact.onnx_weights import join_model, split_model
from muntin.artifact.sparse_packing import check_form, index_bytes, put_values, smallest_form, sparsity_of, stored_size, take_values
from muntin.errors import ArtifactError


def sparse(shape: tuple[int, ...], n: int, m: int, axis: int, *, low: int = 1, high: int = 8, seed: int = 0) -> np.ndarray:
    """Integers of which n of m along an axis are not zero."""
    rng = np.random.default_rng(seed)
    values = np.moveaxis(rng.integers(low, high, shape) * rng.choice([-1, 1], shape), axis, -1)
    groups = values.reshape(-1, m)
    places = rng.permuted(np.tile(np.arange(m), (len(groups), 1)), axis=1)[:, n:]
    np.put_along_axis(groups, places, 0, 1)
    return np.ascontiguousarray(np.moveaxis(groups.reshape(values.shape), -1, axis)).astype(np.int8)


def model_of(values: np.ndarray) -> onnx.ModelProto:
    graph = helper.make_graph([], "g", [], [], [numpy_helper.from_array(values, "w")])
    return helper.make_model(graph)


@given(data=st.data(), m=st.sampled_from([2, 4, 8, 16]), axis=st.integers(0, 1), seed=st.integers(0, 99))
def test_round_trip_of_groups(data: st.DataObject, m: int, axis: int, seed: int) -> None:
    n = data.draw(st.integers(1, m - 1))
    shape = [data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)), *data.draw(st.sampled_from([(), (3, 2)]))]
    shape[axis] *= m
    values = sparse(tuple(shape), n, m, axis, low=0, seed=seed)  # fewer than n at places
    form = SparseStorage(pattern=f"{n}:{m}", axis=axis, values=values.size // m * n)
    index, stored = take_values(values, form)
    assert len(index) == index_bytes(form, values.shape) and len(stored) == form.values
    np.testing.assert_array_equal(put_values(index, stored, form, values.shape), values)


@given(r=st.sampled_from([1, 2, 4]), c=st.sampled_from([1, 3, 4]), taps=st.sampled_from([(), (2, 3)]), seed=st.integers(0, 99))
def test_round_trip_of_blocks(r: int, c: int, taps: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    kept = np.kron(rng.integers(0, 2, (3, 5)), np.ones((r, c), int)).reshape(3 * r, 5 * c, *(1 for _ in taps))
    values = (rng.integers(1, 99, (3 * r, 5 * c, *taps)) * kept).astype(np.float16)
    form = SparseStorage(pattern=f"block:{r}x{c}", axis=0, values=int(np.count_nonzero(values)))
    index, stored = take_values(values, form)
    np.testing.assert_array_equal(put_values(index, stored, form, values.shape), values)


def test_documented_layout() -> None:
    """2:4: three ranks in a byte, the first as the lowest digit to the base 6; ranks in the order 01 02 03 12 13 23."""
    values = np.array([[0, 5, 0, 6, 7, 8, 0, 0, 0, 0, 9, 1]], np.int8)
    form = SparseStorage(pattern="2:4", axis=1, values=6)
    index, stored = take_values(values, form)
    assert index.tolist() == [4 + 6 * 0 + 36 * 5] and stored.tolist() == [5, 6, 7, 8, 9, 1]


@pytest.mark.parametrize(("pattern", "bits"), [("2:4", 8 / 3), ("4:8", 56 / 9), ("1:4", 2)])
def test_bits_of_a_group(pattern: str, bits: float) -> None:
    n, m = map(int, pattern.split(":"))
    values = sparse((72, 16 * m), n, m, 1)
    form = smallest_form(values, 4)
    assert form == SparseStorage(pattern=pattern, axis=1, values=values.size // m * n)
    assert math.isclose(stored_size(form, values.shape, 4) * 8 / (values.size / m), 4 * n + bits, rel_tol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "how"),
    [("int8", 4), ("int8", 8), ("int8", None), ("uint8", 3), ("float32", "f16"), ("float32", None), ("float16", None), ("float64", None)],
)
def test_weights_come_back(dtype: str, how: int | str | None) -> None:
    values = np.abs(sparse((16, 32, 3, 3), 2, 4, 1)).astype(dtype)
    values = -values if dtype.startswith("f") else values
    structure, tensors, records = split_model(model_of(values), {} if how is None else {"w": how})
    assert records["w"].sparsity is not None and records["w"].sparsity.pattern == "2:4"
    dense = values.size * records["w"].bits / 8
    assert tensors["w"].dtype == np.uint8 and tensors["w"].nbytes < (0.8 if records["w"].bits < 8 else 0.6) * dense
    (restored,) = onnx.load_model_from_string(join_model(structure.SerializeToString(), tensors, records)).graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(restored), values)
    assert numpy_helper.to_array(restored).tobytes() == (values + 0).astype(dtype).tobytes()


def test_dense_where_it_is_smaller() -> None:
    rng = np.random.default_rng(0)
    dense = rng.integers(1, 8, (64, 64)).astype(np.int8)
    few_zeros = np.where(rng.random((64, 64)) < 0.15, 0, dense).astype(np.int8)
    small = sparse((8, 8), 2, 4, 1)
    half = np.where(rng.random((64, 64)) < 0.5, 0, dense).astype(np.int8)
    assert [smallest_form(values, 4) for values in (dense, few_zeros, small, dense[0])] == [None] * 4
    assert smallest_form(half, 4) == SparseStorage(pattern="block:1x1", axis=0, values=int(np.count_nonzero(half)))
    _, tensors, records = split_model(model_of(dense), {"w": 4})
    assert records["w"].model_dump() == {"bits": 4, "shape": (64, 64), "packing": "int"} and tensors["w"].nbytes == 2048


@pytest.mark.parametrize(
    "form",
    [
        {"pattern": "3:4"}, {"pattern": "2:8"}, {"pattern": "4:4"}, {"pattern": "2:7"}, {"axis": 2}, {"axis": 0, "pattern": "8:16"},
        {"values": 1024}, {"pattern": "block:5x4"}, {"pattern": "block:4x4"}, {"pattern": "20:40"}, {"pattern": "block:1x1"},
    ],
)  # fmt: skip
def test_malformed_forms(form: dict[str, int | str]) -> None:
    values = sparse((40, 48), 2, 4, 1)
    structure, tensors, records = split_model(model_of(values), {"w": 4})
    assert records["w"].sparsity is not None
    wrong = records["w"].model_copy(update={"sparsity": records["w"].sparsity.model_copy(update=form)})
    with pytest.raises(ArtifactError, match="weight w: "):
        join_model(structure.SerializeToString(), tensors, {"w": wrong})


@pytest.mark.parametrize("pattern", ["2:4", "block:1x1"])
def test_damaged_bytes(pattern: str) -> None:
    values = sparse((40, 48), 2, 4, 1)
    form = SparseStorage(pattern=pattern, axis=1 if pattern == "2:4" else 0, values=960)
    index, stored = take_values(values, form)
    for wrong in (index[:-1], np.full_like(index, 255)):
        with pytest.raises(ArtifactError):
            put_values(wrong, stored, form, values.shape)
    with pytest.raises(ArtifactError, match="values for the pattern"):
        put_values(index, stored[:-1], form, values.shape)
    record = TensorRecord(bits=4, shape=(40, 48), packing="int", sparsity=form)
    for bad in (np.zeros(3, np.uint8), np.zeros(10**4, np.uint8), np.zeros((2, 400), np.uint8), np.zeros(800, np.int8)):
        with pytest.raises(ArtifactError, match="weight w: "):
            join_model(split_model(model_of(values), {"w": 4})[0].SerializeToString(), {"w": bad}, {"w": record})


def test_huge_shape_is_refused() -> None:
    with pytest.raises(ArtifactError, match="cannot have the pattern"):
        check_form(SparseStorage(pattern="2:4", axis=0, values=8), (1 << 40, 1 << 40))


def test_zeros_alone_are_stored_in_a_share_of_their_size() -> None:
    values = np.zeros((1024, 1024), np.int8)
    form = smallest_form(values, 8)
    assert form is not None and values.nbytes <= 128 * stored_size(form, values.shape, 8)


def test_bytes_that_would_expand_without_bound() -> None:
    """A few bytes for 96 MiB: refused before the dense weight is allocated."""
    shape = (96 << 10, 1024)
    form = SparseStorage(pattern="block:32x32", axis=0, values=0)
    record = TensorRecord(bits=8, shape=shape, packing="int", sparsity=form)
    place = onnx.TensorProto(name="w", data_type=onnx.TensorProto.INT8, dims=shape)
    structure = helper.make_model(helper.make_graph([], "g", [], [], [place])).SerializeToString()
    stored = np.zeros(index_bytes(form, shape), np.uint8)
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="128 times smaller"):
        join_model(structure, {"w": stored}, {"w": record})
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_sum_of_expanded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight fits, all together do not."""
    values = sparse((64, 64), 2, 4, 1)
    model = model_of(values)
    model.graph.initializer.add().CopyFrom(numpy_helper.from_array(values, "v"))
    structure, tensors, records = split_model(model, {"w": 4, "v": 4})
    monkeypatch.setattr(onnx_weights, "LARGEST", values.nbytes)
    monkeypatch.setattr(onnx_weights, "_expand", lambda *_: pytest.fail("expanded before the sum was looked at"))
    with pytest.raises(ArtifactError, match="expands to"):
        join_model(structure.SerializeToString(), tensors, records)


@pytest.mark.parametrize(("n", "m"), [(1, 16), (8, 16)])
def test_long_groups(n: int, m: int) -> None:
    values = sparse((32, 64), n, m, 0)
    form = smallest_form(values, 8)
    assert form is not None and form.pattern == f"{n}:{m}" and form.axis == 0


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
    for values in (few_bits, small, mild, np.zeros((64, 64), np.int8)):
        assert not sparsity_of(graph_of(values, "Conv")) and not sparsity_of(graph_of(values.T.copy(), "MatMul"))
    blocks = np.kron(rng.random((8, 8)) < 0.5, np.ones((4, 8))).astype(np.int8)  # outputs, inputs
    assert sparsity_of(graph_of(blocks[..., None, None], "Conv")) == {"layer": "block:4x8"}
    assert sparsity_of(graph_of(blocks.T.copy(), "MatMul")) == {"layer": "block:4x8"}
    assert not sparsity_of(graph_of(sparse((32, 32, 3, 3), 2, 4, 1), "Conv", group=2))
