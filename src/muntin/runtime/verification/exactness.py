"""Checks that an engine's integer kernels add up integers correctly on this CPU.

Small layers in QDQ form, as in artefacts, are compared with numpy's 64-bit integers. Scales are powers of two and sums stay below 2**24, so
float32 is exact and any difference is an error. Inputs and weights contain the extreme values, at which kernels fail:

    without VNNI, x86 adds pairs of uint8 * int8 products in 16 bits: 2 * 255 * 127 does not fit, and the sum saturates

Some layers fill the CPU's vectors and some do not. Takes a fraction of a second for each engine.

Axis letters: N rows or images, C inputs, K outputs, H and W rows and columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from muntin.errors import DependencyError

Run = Callable[[bytes, NDArray[np.float32]], tuple[NDArray[np.float32], bool]]
"""(serialised ONNX model, input) -> output, and True if its product ran on integers."""

SCALE, ZERO = 2.0**-6, 128  # of the uint8 inputs
_STEP = 2.0**15  # of a requantised output, in units of the integer sum: the largest sums just fit in 8 bits


@dataclass(frozen=True, kw_only=True)
class IntegerCheck:
    """Result of one layer in one engine: `wrong` of `outputs` differ from integer arithmetic, by at most `error` units of the integer sum.
    `integer`: True if it ran on integer kernels; float is exact, too, but slow."""

    layer: str
    outputs: int
    wrong: int
    error: float
    integer: bool


@dataclass(frozen=True, kw_only=True)
class _TestLayer:
    """`requantised`: the output is rounded to 8 bits, as between the layers of a model. `input`: its shape."""

    name: str
    kind: Literal["MatMul", "Conv"]
    input: tuple[int, ...]
    outputs: int
    requantised: bool


_LAYERS = (
    _TestLayer(name="matrix product", kind="MatMul", input=(64, 128), outputs=64, requantised=False),
    _TestLayer(name="matrix product of odd sizes", kind="MatMul", input=(33, 67), outputs=41, requantised=False),
    _TestLayer(name="3 x 3 convolution", kind="Conv", input=(1, 32, 14, 14), outputs=32, requantised=True),
    _TestLayer(name="3 x 3 convolution of odd sizes", kind="Conv", input=(1, 19, 9, 13), outputs=21, requantised=True),
)


def check_integers(run: Run) -> tuple[IntegerCheck, ...]:
    """Runs every layer with `run`, for example one of `RUNNERS`."""
    return tuple(_check(layer, run) for layer in _LAYERS)


@functools.cache
def sums_saturate() -> bool:
    """Return True if OpenVINO's sums of 8-bit products saturate here. Weights within ±63 are exact then: 2 * 255 * 63 fits in 16 bits.

    Runs the layers once in a process, a third of a second. `ONEDNN_MAX_CPU_ISA=AVX512_CORE` switches VNNI off.
    """
    return any(check.wrong for check in check_integers(run_openvino))


def _check(layer: _TestLayer, run: Run) -> IntegerCheck:
    generator = np.random.default_rng(0)
    weight_shape = (layer.input[1], layer.outputs) if layer.kind == "MatMul" else (layer.outputs, layer.input[1], 3, 3)
    x, weight = generator.integers(0, 256, layer.input), generator.integers(-127, 128, weight_shape)
    x.reshape(-1)[: x.size // 4] = 255
    outputs = weight if layer.kind == "MatMul" else weight.T
    outputs[..., 0], outputs[..., 1] = 127, -127
    sums = _sums(layer.kind, x, weight)
    result, integer = run(_graph(layer, weight.astype(np.int8)), ((x - ZERO) * SCALE).astype(np.float32))
    unit = SCALE * _weight_scales(layer.outputs)
    if layer.kind == "Conv":
        unit = unit[:, None, None]
    expected = sums * unit
    if layer.requantised:
        step = _STEP * unit.max()
        expected = (np.clip(np.rint(expected / step) + ZERO, 0, 255) - ZERO) * step
    difference = np.abs(result.astype(np.float64) - expected)
    return IntegerCheck(
        layer=layer.name,
        outputs=expected.size,
        wrong=int((difference != 0).sum()),
        error=float((difference / unit).max()) if np.isfinite(result).all() else float("inf"),
        integer=integer,
    )


def _sums(kind: str, x: NDArray[np.int64], weight: NDArray[np.int64]) -> NDArray[np.int64]:
    values = x - ZERO
    if kind == "MatMul":
        return values @ weight
    padded_NCHW = np.pad(values, ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches_NCHWhw = np.lib.stride_tricks.sliding_window_view(padded_NCHW, (3, 3), axis=(2, 3))
    sums: NDArray[np.int64] = np.einsum("nchwij,kcij->nkhw", patches_NCHWhw, weight)
    return sums


def _weight_scales(outputs: int) -> NDArray[np.float32]:
    return np.exp2(-6 - np.arange(outputs) % 2).astype(np.float32)


def _graph(layer: _TestLayer, weight: NDArray[np.int8]) -> bytes:
    axis = 1 if layer.kind == "MatMul" else 0
    constants: dict[str, NDArray[Any]] = {
        "weight": weight,
        "weight_scale": _weight_scales(layer.outputs),
        "weight_zero": np.zeros(layer.outputs, np.int8),
        "scale": np.array(SCALE, np.float32),
        "zero": np.array(ZERO, np.uint8),
    }
    pads = {"pads": [1, 1, 1, 1]} if layer.kind == "Conv" else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "scale", "zero"], ["x_dq"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["weight_dq"], axis=axis),
        helper.make_node(layer.kind, ["x_dq", "weight_dq"], ["y"], name="product", **pads),
    ]
    if layer.requantised:
        constants["y_scale"] = np.array(_STEP * SCALE * constants["weight_scale"].max(), np.float32)
        nodes.append(helper.make_node("QuantizeLinear", ["y", "y_scale", "zero"], ["y_q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["y_q", "y_scale", "zero"], ["y_dq"]))
    return serialised(nodes, constants, layer.input, (layer.input[0], layer.outputs, *layer.input[2:]))


def serialised(nodes: list[onnx.NodeProto], constants: dict[str, NDArray[Any]], given: tuple[int, ...], result: tuple[int, ...]) -> bytes:
    """An ONNX model of these nodes, from "x" of the shape `given` to the last node's output of the shape `result`, both float32."""
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, given)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, result)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


# An engine's library is imported when it is used: a machine needs only the engine that it serves with.
def run_openvino(model: bytes, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], bool]:
    """In OpenVINO's CPU plugin. Raises DependencyError where it cannot run it."""
    from muntin.runtime.engines.openvino.compiled import executed_products
    from muntin.runtime.host.quiet_imports import openvino
    from muntin.runtime.host.signal_stack import signal_stack_kept

    try:
        with signal_stack_kept():
            core = openvino.Core()
            compiled = core.compile_model(core.read_model(model=model, weights=b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            result = np.array(compiled(x)[0])
    except RuntimeError as error:
        raise _cannot("OpenVINO", openvino.__version__, error) from error
    return result, {"u8", "i8"}.issuperset(executed_products(compiled.get_runtime_model()).values())


def run_onnxruntime(model: bytes, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], bool]:
    """In ONNX Runtime's CPU provider. Raises DependencyError where it cannot run it."""
    from muntin.runtime.engines.onnxruntime import FAILURES, INTEGER, MULTIPLY, optimized_model, session_options
    from muntin.runtime.host.quiet_imports import onnxruntime

    def open_(options: Any) -> Any:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    try:
        session, optimized = open_(session_options(0)), optimized_model(open_, session_options(0))
        result = session.run(None, {session.get_inputs()[0].name: x})[0]
    except FAILURES as error:
        raise _cannot("ONNX Runtime", onnxruntime.__version__, error) from error
    return result, (MULTIPLY - INTEGER).isdisjoint(node.op_type for node in optimized.graph.node)


def _cannot(engine: str, version: str, error: Exception) -> DependencyError:
    text = " ".join(str(error).split())[:300]
    return DependencyError(f"{engine} {version} cannot run a small INT8 layer: install it again, or another version: {text}")


def provider_starts(provider: str) -> bool:
    """Returns True if a provider of ONNX Runtime starts here; otherwise the CPU takes over, which is only logged."""
    from muntin.runtime.host.quiet_imports import onnxruntime

    layer = _LAYERS[0]
    model = _graph(layer, np.zeros((layer.input[1], layer.outputs), np.int8))
    return bool(onnxruntime.InferenceSession(model, providers=[provider]).get_providers()[0] == provider)


RUNNERS: dict[str, Run] = {"openvino": run_openvino, "onnxruntime": run_onnxruntime}
