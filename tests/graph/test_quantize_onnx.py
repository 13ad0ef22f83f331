"""Quantising ONNX models after training: what is rounded, how much of it, and what engines run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

import muntin
from muntin.errors import ExportError
from muntin.graph.artifacts.compile_errors import products_in_message
from muntin.graph.float_run import FloatRun
from muntin.graph.quantize import QuantizedOnnx, calibrate
from muntin.runtime.engines.onnx_nodes import compute_nodes
from muntin.runtime.engines.openvino.compiled import executed_layers
from muntin.runtime.host.quiet_imports import openvino

Array = NDArray[Any]


def model(text: str, opset: int = 20, **weights: Array) -> onnx.ModelProto:
    """A model from onnx's text form; `weights` are its constants."""
    proto: onnx.ModelProto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> agraph {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.checker.check_model(proto)
    return proto


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def classifier(opset: int = 13) -> onnx.ModelProto:
    """Convolution, batch norm as training leaves it, and a Gemm."""
    return model(
        """(float[B, 3, H, W] x) => (float[B, 5] scores) {
            a = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, first)
            n = BatchNormalization(a, gain, shift, mean, variance)
            r = Relu(n)
            d = Conv<group = 8, pads = [1, 1, 1, 1]>(r, depthwise, bias)
            p = GlobalAveragePool(d)
            f = Flatten(p)
            scores = Gemm<transB = 1>(f, head, offset)
        }""",
        opset,
        first=normal(8, 3, 3, 3),
        gain=normal(8, seed=1) + 2,
        shift=normal(8, seed=2),
        mean=normal(8, seed=3),
        variance=np.abs(normal(8, seed=4)) + 0.5,
        depthwise=normal(8, 1, 3, 3, seed=5),
        bias=normal(8, seed=6),
        head=normal(5, 8, seed=7),
        offset=normal(5, seed=8),
    )


def attention() -> onnx.ModelProto:
    return model(
        """(float[B, N, 16] x) => (float[B, N, 16] y) {
            q = MatMul(x, wq)
            k = MatMul(x, wk)
            v = MatMul(x, wv)
            kt = Transpose<perm = [0, 2, 1]>(k)
            logits = MatMul(q, kt)
            shares = Softmax<axis = -1>(logits)
            mixed = MatMul(shares, v)
            y = MatMul(mixed, wo)
        }""",
        **{name: normal(16, 16, seed=seed, scale=0.4) for seed, name in enumerate(("wq", "wk", "wv", "wo"))},
    )


def decibel(due: Array, came: Array) -> float:
    return float(10 * np.log10(np.square(due).sum() / np.square(due - came).sum()))


def difference(proto: onnx.ModelProto, result: QuantizedOnnx, inputs: dict[str, Array]) -> float:
    """Signal over noise, dB, of the first output."""
    due, came = (next(iter(FloatRun(one, exact=True)(inputs).values())) for one in (proto, result.model))
    return decibel(due, came)


def precisions(result: QuantizedOnnx, shape: tuple[int, ...]) -> dict[str, str]:
    """Precision of each product's kernel in OpenVINO."""
    read = openvino.Core().read_model(model=result.model.SerializeToString(), weights=b"")
    read.reshape(list(shape))
    compiled = openvino.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    layers = executed_layers(compiled.get_runtime_model(), compute_nodes(result.model.SerializeToString()))
    return {layer.name: layer.precision for layer in layers if layer.compute}


def kinds(proto: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in proto.graph.node}


@pytest.mark.usefixtures("dot_products")
def test_classifier() -> None:
    proto = classifier()
    before = proto.SerializeToString()
    result = muntin.quantize_onnx(proto, [normal(4, 3, 24, 32, seed=9), normal(4, 3, 24, 32, seed=10)])
    assert proto.SerializeToString() == before
    assert [record.kind for record in result.products] == ["Conv", "Conv", "MatMul"]
    assert [record.macs for record in result.products] == [8 * 27 * 12 * 16, 8 * 9 * 12 * 16, 40]
    assert (result.coverage, result.notes) == (1.0, ())
    assert not kinds(result.model) & {"BatchNormalization", "Gemm"}
    assert {entry.version for entry in result.model.opset_import} == {20}
    assert difference(proto, result, {"x": normal(2, 3, 40, 24, seed=11)}) > 25
    ran = precisions(result, (1, 3, 24, 32))
    assert ran == dict.fromkeys((record.name for record in result.products), "i8")


@pytest.mark.usefixtures("dot_products")
def test_attention() -> None:
    """Products of two activations too; the softmax is divided by its sum after the product."""
    proto = attention()
    result = muntin.quantize_onnx(proto, [normal(8, 50, 16, seed=5) + 1])
    assert (len(result.products), result.coverage) == (6, 1.0)
    assert "Softmax" not in kinds(result.model)
    for entries in (1, 50, 3000):  # rounded shares would vanish among so many
        assert difference(proto, result, {"x": normal(1, entries, 16, seed=6) + 1}) > 20


def test_token_ids_and_two_inputs() -> None:
    proto = model(
        """(int64[B, N] ids, float[B, N, 8] positions) => (float[B, N, 4] y) {
            e = Gather(table, ids)
            s = Add(e, positions)
            y = MatMul(s, w)
        }""",
        table=normal(100, 8),
        w=normal(8, 4, seed=1),
    )
    batch = {"ids": np.arange(20).reshape(2, 10), "positions": normal(2, 10, 8, seed=2)}
    result = muntin.quantize_onnx(proto, [batch])
    assert result.coverage == 1.0
    assert difference(proto, result, batch) > 30


def test_computed_weights_and_padding() -> None:
    """Standardised weights are computed once, and 'same' padding is merged into the convolution."""
    proto = model(
        """(float[B, 3, 16, 16] x) => (float[B, 4, H, W] y) {
            mean = ReduceMean<keepdims = 1>(weight, axes)
            standard = Sub(weight, mean)
            padded = Pad(x, pads)
            y = Conv<strides = [2, 2]>(padded, standard)
        }""",
        weight=normal(4, 3, 3, 3),
        axes=np.array([1, 2, 3]),
        pads=np.array([0, 0, 0, 0, 0, 0, 1, 1]),
    )
    result = muntin.quantize_onnx(proto, normal(2, 3, 16, 16, seed=1))
    assert kinds(result.model) == {"Conv", "QuantizeLinear", "DequantizeLinear"}
    assert difference(proto, result, {"x": normal(1, 3, 16, 16, seed=2)}) > 25


def test_transposed_and_one_dimensional_convolutions() -> None:
    transposed = model(
        "(float[B, 4, H, W] x) => (float[B, 6, P, Q] y) { y = ConvTranspose<group = 2, strides = [2, 2]>(x, w, b) }",
        w=normal(4, 3, 2, 2),
        b=normal(6, seed=1),
    )
    flat = model("(float[B, 4, N] x) => (float[B, 6, M] y) { y = Conv<pads = [1, 1]>(x, w) }", w=normal(6, 4, 3))
    for proto, shape in ((transposed, (8, 4, 15, 17)), (flat, (8, 4, 90))):
        result = muntin.quantize_onnx(proto, normal(*shape, seed=2))
        assert result.coverage == 1.0
        assert difference(proto, result, {"x": normal(*shape, seed=3)}) > 30


def test_pixels_on_their_own_grid() -> None:
    """The image's bytes are not changed by rounding: only those of the weights differ."""
    proto = model(
        """(uint8[B, H, W, 3] x) => (float[B, 4, P, Q] y) {
            f = Cast<to = 1>(x)
            t = Transpose<perm = [0, 3, 1, 2]>(f)
            c = Sub(t, middle)
            y = Conv(c, w)
        }""",
        middle=np.float32(128).reshape(1, 1, 1, 1),
        w=normal(4, 3, 1, 1),
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 9, 3)).astype(np.uint8)
    result = muntin.quantize_onnx(proto, images)
    scales = {entry.name: numpy_helper.to_array(entry) for entry in result.model.graph.initializer}
    assert scales["c/scale"] == pytest.approx(1, abs=1e-6)


def test_kept_and_weak_products() -> None:
    proto = classifier()
    batch = normal(2, 3, 16, 16)
    every = [record.name for record in muntin.quantize_onnx(proto, batch).products]
    kept = muntin.quantize_onnx(proto, batch, keep=[every[0]])
    assert [record.bits for record in kept.products] == [None, 8, 8]
    assert kept.products[0].reason == "named in keep"
    weak = muntin.quantize_onnx(proto, batch, min_sqnr_db=90)
    assert weak.coverage == 0
    assert "QuantizeLinear" not in kinds(weak.model)
    (note,) = weak.notes
    assert note.startswith(f"0% of the multiply-adds are in integers. In floats: {every[0]} (7")
    assert "dB of signal over noise in its output, less than 90" in note


@pytest.mark.usefixtures("dot_products")
def test_recurrent_layers_are_told() -> None:
    proto = model(
        "(float[N, B, 4] x) => (float[N, 1, B, 3] y) { y = RNN<hidden_size = 3>(x, w, r) }", w=normal(1, 3, 4), r=normal(1, 3, 3, seed=1)
    )
    with pytest.raises(ExportError, match="nothing to quantise"):
        muntin.quantize_onnx(proto, normal(5, 2, 4))
    proto.graph.node.append(onnx.helper.make_node("MatMul", ["x", "m"], ["z"]))
    proto.graph.initializer.append(numpy_helper.from_array(normal(4, 4), "m"))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["N", "B", 4]))
    assert muntin.quantize_onnx(proto, normal(5, 2, 4)).notes == ("RNN: what these compute stays in floats and is not counted",)


@pytest.mark.parametrize(
    ("calibration", "options", "message"),
    [
        ([], {}, "calibration is empty"),
        (normal(2, 3, 8, 8).astype(np.float64), {}, r"'x' is float64 \(2, 3, 8, 8\): the model takes float32 of any x 3 x any x any"),
        (normal(2, 4, 8, 8), {}, r"\(2, 4, 8, 8\): the model takes float32 of any x 3"),
        ([{"pixels": normal(2, 3, 8, 8)}], {}, "calibration names pixels, and the model takes x"),
        (np.full((1, 3, 8, 8), np.nan, np.float32), {}, "tensor 'x' holds NaN or infinity"),
        (normal(2, 3, 8, 8), {"keep": ["head"]}, "keep names head: no node that multiplies"),
    ],
)
def test_refused_calibration(calibration: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        muntin.quantize_onnx(classifier(), calibration, **options)


def test_refused_files(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"none\.onnx cannot be read \(No such file or directory\)"):
        muntin.quantize_onnx(tmp_path / "none.onnx", normal(1))
    (tmp_path / "text.onnx").write_text("a model")
    with pytest.raises(ExportError, match=r"text\.onnx is no valid ONNX model"):
        muntin.quantize_onnx(tmp_path / "text.onnx", normal(1))
    muntin.quantize_onnx(classifier(), normal(1, 3, 8, 8)).save(tmp_path / "int8.onnx")
    with pytest.raises(ExportError, match=r"int8\.onnx is quantised already"):
        muntin.quantize_onnx(tmp_path / "int8.onnx", normal(1, 3, 8, 8))


def test_file_to_file(tmp_path: Path) -> None:
    onnx.save(classifier(), tmp_path / "float.onnx")
    result = muntin.quantize_onnx(tmp_path / "float.onnx", normal(2, 3, 16, 16))
    result.save(tmp_path / "int8.onnx")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["float.onnx", "int8.onnx"]
    onnx.checker.check_model(onnx.load(tmp_path / "int8.onnx"), full_check=True)
    with pytest.raises(ExportError, match="cannot be written"):
        result.save(tmp_path / "nowhere" / "int8.onnx")
    assert repr(result) == "<QuantizedOnnx: 3 products, 100.0% of the multiply-adds in integers>"


def uneven(*, alone: bool) -> onnx.ModelProto:
    """A norm with a channel that is 60 times the others, and two linears; `alone`: nothing else reads the norm."""
    gain = np.ones(16, np.float32)
    gain[3] = 60
    return model(
        f"""(float[B, 16] x) => (float[B, 12] y, float[B, 16] z) {{
            n = LayerNormalization<axis = -1>(x, gain, shift)
            a = MatMul(n, wa)
            b = MatMul(n, wb)
            y = Add(a, b)
            z = {"Identity(x)" if alone else "Relu(n)"}
        }}""",
        gain=gain,
        shift=normal(16),
        wa=normal(16, 12, seed=1) * 0.2 / gain[:, None],
        wb=normal(16, 12, seed=2) * 0.2 / gain[:, None],
    )


@pytest.mark.parametrize("alone", [True, False])
def test_uneven_channels(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    proto, inputs = uneven(alone=alone), {"x": normal(64, 16, seed=5)}
    smoothed = muntin.quantize_onnx(proto, inputs["x"], min_sqnr_db=0)
    assert Counter(node.op_type for node in smoothed.model.graph.node)["Mul"] == (not alone)
    monkeypatch.setattr("muntin.graph.passes.smoothing.UNEVEN", float("inf"))
    as_it_is = muntin.quantize_onnx(proto, inputs["x"], min_sqnr_db=0)
    assert difference(proto, smoothed, inputs) > difference(proto, as_it_is, inputs) + 6


def test_lookup_tables() -> None:
    proto = model(
        "(int64[B, N] ids) => (float[B, N, 8] y) { e = Gather(table, ids)  \n y = MatMul(e, w) }", table=normal(900, 80), w=normal(80, 8)
    )
    ids = np.random.default_rng(0).integers(0, 900, (8, 6))
    plan = calibrate(proto, [{"ids": ids}], half=True).quantized()
    stored = {entry.name: entry.data_type for entry in plan.model.graph.initializer}
    assert stored["table/integers"] == onnx.TensorProto.INT8 and "table" not in stored
    assert difference(proto, plan, {"ids": ids}) > 30


def test_products_that_an_engine_cannot_compile() -> None:
    proto = model(
        """(float[B, 8] x) => (float[B, 2, 2] y) {
            a = MatMul(x, w)
            b = Relu(a)
            c = Gather<axis = 1>(b, places)
            d = MatMul(x, w)
            e = Add(c, c)
            y = Identity(e)
        }""",
        w=normal(8, 4),
        places=np.array([[0, 1], [2, 3]]),
    )
    for node, name in zip(proto.graph.node, ("first", "relu", "gather 1", "second", "add", "end"), strict=True):
        node.name = name.replace(" ", "_")
    message = "[GatherTransformation] END: node: opset8::Gather gather_1 (opset1::Multiply Multiply_17[0]:f32[1,4]) CALLBACK HAS THROWN"
    assert products_in_message(proto, message) == ["first"]
    assert products_in_message(proto, "opset1::Reshape Reshape_3 (opset1::Multiply second/DequantizationMultiply[0]:f32[1])") == ["second"]
    assert products_in_message(proto, "no memory") == []


def test_tensors_with_names_of_our_own() -> None:
    """The shape of a tensor t, named as a rewriting might name it."""
    proto = model("(float[B, 8] t) => (float[B, 4] y) { s = Shape(t)  \n r = Reshape(t, s)  \n y = MatMul(r, w) }", w=normal(8, 4))
    for node in proto.graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = ["t/shape" if name == "s" else name for name in tensors]
    assert muntin.quantize_onnx(proto, normal(4, 8)).coverage == 1.0


LAYERS: dict[str, Callable[[str, str, int], str]] = {
    "conv": lambda x, y, n: f"{y} = Conv<pads = [1, 1, 1, 1]>({x}, w{n})",
    "strided": lambda x, y, n: f"{y} = Conv<pads = [0, 0, 1, 1], strides = [2, 2]>({x}, w{n})",
    "depthwise": lambda x, y, n: f"{y} = Conv<group = 4, pads = [1, 1, 1, 1]>({x}, d{n})",
    "relu": lambda x, y, n: f"{y} = Relu({x})",
    "sigmoid": lambda x, y, n: f"s{n} = Sigmoid({x})\n{y} = Mul({x}, s{n})",
    "residual": lambda x, y, n: f"c{n} = Conv<pads = [1, 1, 1, 1]>({x}, w{n})\n{y} = Add({x}, c{n})",
    "pool": lambda x, y, n: f"{y} = MaxPool<kernel_shape = [2, 2]>({x})",
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=6), st.integers(0, 1000))
def test_random_networks(names: list[str], seed: int) -> None:
    lines = "\n".join(LAYERS[name](f"t{n}", f"t{n + 1}", n) for n, name in enumerate(names))
    weights = {f"w{n}": normal(4, 4, 3, 3, seed=seed + n, scale=0.2) for n in range(len(names))}
    weights |= {f"d{n}": normal(4, 1, 3, 3, seed=seed + n, scale=0.4) for n in range(len(names))}
    text = f"(float[B, 4, H, W] t0) => (float[B, 4, P, Q] y) {{ {lines}\ny = Conv(t{len(names)}, last) }}"
    read = {name: value for name, value in weights.items() if f" {name})" in text}
    proto = model(text, last=normal(4, 4, 1, 1, seed=seed), **read)
    result = muntin.quantize_onnx(proto, normal(2, 4, 33, 47, seed=seed + 1), min_sqnr_db=0)
    assert result.coverage == 1.0
    assert min(record.sqnr_db or 0 for record in result.products) > 25  # each alone; a chain of them on a small map may lose more
    assert difference(proto, result, {"t0": normal(1, 4, 33, 47, seed=seed + 2)}) > 8


def test_local_functions_are_inlined() -> None:
    proto = model("(float[B, 8] x) => (float[B, 4] y) { y = own.Layer(x, w) }".replace("own.Layer", "MatMul"), w=normal(8, 4))
    proto.graph.node[0].domain, proto.graph.node[0].op_type = "own", "Layer"
    proto.opset_import.append(onnx.helper.make_opsetid("own", 1))
    body = [onnx.helper.make_node("MatMul", ["a", "b"], ["product"]), onnx.helper.make_node("Relu", ["product"], ["c"])]
    imports = [onnx.helper.make_opsetid("", 20)]
    proto.functions.append(onnx.helper.make_function("own", "Layer", ["a", "b"], ["c"], body, imports))
    result = muntin.quantize_onnx(proto, [normal(16, 8, seed=3)])
    assert [record.kind for record in result.products] == ["MatMul"] and not result.model.functions


def test_external_data_in_a_function(tmp_path: Path) -> None:
    proto = model("(float[B, 4] x) => (float[B, 4] y) { y = Relu(x) }")
    outside = onnx.TensorProto(name="outside", data_type=onnx.TensorProto.FLOAT, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="secret")
    proto.opset_import.append(onnx.helper.make_opsetid("own", 1))
    constant = onnx.helper.make_node("Constant", [], ["c"])
    constant.attribute.add(name="value", ref_attr_name="value", type=onnx.AttributeProto.TENSOR)
    function = onnx.helper.make_function(
        "own", "Leak", ["a"], ["b"], [constant, onnx.helper.make_node("Add", ["a", "c"], ["b"])], [onnx.helper.make_opsetid("", 20)]
    )
    function.attribute_proto.append(onnx.helper.make_attribute("value", outside))
    proto.functions.append(function)
    proto.graph.node.insert(0, onnx.helper.make_node("Leak", ["x"], ["z"], domain="own"))
    proto.graph.node[1].input[0] = "z"
    (tmp_path / "secret").write_bytes(b"0" * 16)
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="external file"):
        muntin.quantize_onnx(tmp_path / "model.onnx", [normal(2, 4)])
