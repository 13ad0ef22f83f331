"""Sessions of models with named inputs and outputs, in both engines."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import muntin
from muntin.artifact import Artifact, TensorInfo, TensorSignature
from muntin.errors import ArtifactError, DataError
from muntin.graph.float_run import FloatRun
from muntin.runtime.engines.openvino.compiled import CompiledForm
from muntin.runtime.session import STATIC_SHAPES
from tensor_models import SIGNATURE, Array, model, text_inputs, two_heads, write_tensors

TYPES = {
    "bool": "bool", "int8": "int8", "int16": "int16", "int32": "int32", "int64": "int64", "uint8": "uint8", "uint16": "uint16",
    "uint32": "uint32", "uint64": "uint64", "float16": "float16", "float32": "float", "float64": "double",
}  # fmt: skip


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_tensors(tmp_path_factory.mktemp("tensors") / "artifact")


@pytest.fixture(scope="module")
def expected() -> FloatRun:
    return FloatRun(two_heads(), exact=True)


def assert_same(answer: dict[str, Array], due: dict[str, Array]) -> None:
    assert list(answer) == list(due)
    for name, value in due.items():
        assert answer[name].dtype == value.dtype
        np.testing.assert_allclose(answer[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_answers_of_every_size(artifact: Artifact, expected: FloatRun, engine: str, dynamic: bool) -> None:
    session = muntin.load(artifact.path, engine=engine, precision="f32", dynamic=dynamic)
    for batch, tokens in [(1, 8), (3, 5), (4, 1), (3, 5), (2, 30)]:
        inputs = text_inputs(batch, tokens)
        answer = session(inputs)
        assert_same(answer, expected(inputs))
    session(text_inputs(2, 30, seed=9))
    assert_same(answer, expected(inputs))  # a later call leaves it as it is
    assert list(session(inputs, ["label"])) == ["label"]
    assert list(session(inputs, outputs=("label", "embedding", "label"))) == ["label", "embedding"]


def test_compiled_forms_of_openvino(artifact: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MUNTIN_CACHE", str(tmp_path))
    example, warm = (("batch", 1), ("tokens", 8)), (("batch", 2), ("tokens", 7))
    session = muntin.load(artifact.path, dims=[{"tokens": 7, "batch": 2}])
    assert [form.dims for form in session._compiled] == [warm]
    for tokens in range(1, STATIC_SHAPES + 3):
        session(text_inputs(1, tokens))
    assert len(session._compiled) == 1 + STATIC_SHAPES
    assert CompiledForm(warm) in session._compiled
    free = muntin.load(artifact.path, dynamic=True)
    free(text_inputs(3, 5))
    assert [form.dims for form in free._compiled] == [example, None]
    again = muntin.load(artifact.path, dims=[dict(warm)])
    assert again.from_cache
    assert [layer.name for layer in again.layers() if layer.compute] == ["hidden", "embedding"]


def test_calls_from_several_threads(artifact: Artifact, expected: FloatRun) -> None:
    batches = [text_inputs(1 + number % 3, 4 + number % 2, seed=number) for number in range(24)]
    session = muntin.load(artifact.path, precision="f32", threads=2, streams=2)
    with ThreadPoolExecutor(4) as pool:
        for inputs, answer in zip(batches, pool.map(session, batches), strict=True):
            assert_same(answer, expected(inputs))
    for inputs, answer in zip(batches, session.map(batches), strict=True):
        assert_same(answer, expected(inputs))


def passing(dtype: str) -> TensorSignature:
    """A tensor through a product with a number, a tensor without a change, and an input that nothing reads."""
    inputs = [("x", dtype, ("rows", 3)), ("factor", "float32", ()), ("unread", dtype, (2, "others"))]
    outputs = [("same", dtype, ("rows", 3)), ("product", "float32", ("rows", 3))]
    specs = [tuple(TensorInfo(name=n, dtype=d, shape=s) for n, d, s in group) for group in (inputs, outputs)]  # type: ignore[arg-type]
    return TensorSignature(inputs=specs[0], outputs=specs[1])


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dtype=st.sampled_from(sorted(TYPES)), rows=st.integers(1, 4), others=st.integers(1, 3), data=st.data())
def test_element_types(tmp_path: Path, dtype: str, rows: int, others: int, data: st.DataObject) -> None:
    kind = TYPES[dtype]
    proto = model(
        f"""({kind}[rows, 3] x, float factor, {kind}[2, others] unread) => ({kind}[rows, 3] same, float[rows, 3] product) {{
            same = Identity(x)
            number = Cast<to = 1>(x)
            product = Mul(number, factor)
        }}"""
    )
    numbers = st.booleans() if dtype == "bool" else st.integers(0 if dtype.startswith("u") else -100, 100)
    x = np.array(data.draw(st.lists(numbers, min_size=3 * rows, max_size=3 * rows))).astype(dtype).reshape(rows, 3)
    inputs = {"x": x, "factor": np.array(0.5, np.float32), "unread": np.zeros((2, others), dtype)}
    artifact = write_tensors(tmp_path / "artifact", proto, inputs=[inputs], signature=passing(dtype), example=None)
    for engine in ("openvino", "onnxruntime"):
        answer = muntin.load(artifact.path, engine=engine, cache=False)(inputs | {"factor": np.float32(0.5)})
        assert answer["same"].dtype == x.dtype
        assert np.array_equal(answer["same"], x)
        np.testing.assert_array_equal(answer["product"], x.astype(np.float32) / 2)
        assert muntin.verify(artifact.path, muntin.SessionOptions(engine=engine, cache=False)).passed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask": None}, "no input mask: give ids int64"),
        ({"more": np.zeros(1)}, "more, which is no input"),
        ({"ids": [[1]]}, "'ids' is of type list"),
        ({"ids": np.zeros((2, 5), np.int32)}, r"'ids' is int32: int64 \(batch, tokens\) is needed"),
        ({"ids": np.zeros(5, np.int64)}, r"'ids' has the shape \(5,\)"),
        ({"ids": np.zeros((2, 0), np.int64)}, "no dimension of 0"),
        ({"ids": np.zeros((2, 6), np.int64)}, "dimension 1 has to be 6: tokens is 6 in another"),
        ({"ids": np.full((2, 5), 1 << 40)}, "holds 1099511627776: OpenVINO computes integers in 32 bits"),
    ],
)
def test_inputs_that_are_refused(artifact: Artifact, change: dict[str, Any], words: str) -> None:
    session = muntin.load(artifact.path)
    inputs = {name: value for name, value in (text_inputs(2, 5) | change).items() if value is not None}
    with pytest.raises(DataError, match=words):
        session(inputs)


def test_options_that_are_refused(artifact: Artifact) -> None:
    session = muntin.load(artifact.path, engine="onnxruntime")
    for inputs in (np.zeros((2, 5)), [1]):
        with pytest.raises(DataError, match="give a dictionary of numpy arrays by name: ids int64"):
            session(inputs)
    for outputs in ([], "label", ["labels"]):
        with pytest.raises(DataError, match="give a list of some of embedding, label"):
            session(text_inputs(1, 2), outputs)
    for dims in ({"batch": 1}, ["batch"], [{"batch": 1}], [{"batch": 1, "tokens": 0}], [{"batch": 1, "tokens": 2.0}]):
        with pytest.raises(DataError, match="dims"):
            muntin.load(artifact.path, dims=dims)
    with pytest.raises(DataError, match=r"takes named tensors: give dims, sizes of its dimensions \(batch, tokens\)"):
        muntin.load(artifact.path, shapes=[(1, 8, 8)])


def test_outputs_that_differ_from_the_signature(tmp_path: Path) -> None:
    fixed = TensorInfo(name="embedding", dtype="float32", shape=("batch", 9))
    signature = SIGNATURE.model_copy(update={"outputs": (fixed, SIGNATURE.outputs[1])})
    run = FloatRun(two_heads())(text_inputs(1, 8))
    golden = [(text_inputs(1, 8), run | {"embedding": np.zeros((1, 9), np.float32)})]
    artifact = write_tensors(tmp_path / "artifact", signature=signature, golden=golden, example=None)
    for engine in ("openvino", "onnxruntime"):
        with pytest.raises(ArtifactError, match=r"(has the shape|gives) \(1, 24\)"):
            muntin.load(artifact.path, engine=engine)(text_inputs(1, 8))


def test_only_input_as_an_array(tmp_path: Path) -> None:
    proto = model("(float[rows, 4] x) => (float[rows, 4] y) { y = Relu(x) }")
    infos = (TensorInfo(name=name, dtype="float32", shape=("rows", 4)) for name in "xy")
    signature = TensorSignature(inputs=(next(infos),), outputs=(next(infos),), batch="rows")
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    artifact = write_tensors(tmp_path / "artifact", proto, inputs=[{"x": x}], signature=signature, example={"rows": 1})
    assert np.array_equal(muntin.load(artifact.path)(x)["y"], np.maximum(x, 0))


def test_pictures_are_refused(artifact: Artifact) -> None:
    session = muntin.load(artifact.path, engine="onnxruntime")
    picture = np.zeros((8, 8, 3), np.uint8)
    for call in (lambda: muntin.predict(session, picture), lambda: muntin.evaluate(session, [], tile=8)):
        with pytest.raises(DataError, match=r"this one takes named tensors \(ids int64"):
            call()
