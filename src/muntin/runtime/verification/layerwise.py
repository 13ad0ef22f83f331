"""Checks each quantised layer of an artefact alone: the engine's result against plain float arithmetic.

    graph with extra outputs in the engine (f32 hint) -> each layer's real input and output
    the same layer alone, in plain float              -> the expected output for that input

Each layer gets the values that its predecessors gave in the engine, so errors do not add up. The extra outputs change the engine's fusions,
and in 16 bits also the numbers: this checks layers, in f32; `verify`'s golden pairs check the unchanged model from end to end.

Plain float is ONNX Runtime without optimisation, on the layer's nodes in the artefact: quantiser, dequantiser, product. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from muntin.artifact import Artifact
from muntin.runtime.engines.onnx_nodes import COMPUTE
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.host.signal_stack import signal_stack_kept
from muntin.runtime.inputs import Named

TOLERANCE = 1.0
"""Largest error of a layer, in steps: a value between two levels may be rounded either way, which moves one input by one step."""
NUDGE = 1e-4
"""Steps. A picture has few distinct values; where one lies between two levels, the engine may round all its pixels the other way. So an
output is compared with the results of its inputs as they are, and of all inputs raised and lowered by this."""
FLOAT_ERROR = 1e-5
"""Error from the order of a sum, relative to the layer's largest output."""


@dataclass(frozen=True, kw_only=True)
class LayerCheck:
    """Check of one product with quantised operands. `error`: largest difference of one output, less `FLOAT_ERROR`, in units of the change
    by one step of one input through the layer's largest weight."""

    name: str
    error: float

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE


@dataclass(frozen=True)
class _QuantisedProduct:
    """A product and the nodes from its unrounded inputs to its output."""

    name: str
    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    """Unrounded operands."""
    operands: tuple[str, str]
    """Rounded operands of the product."""
    scales: tuple[float, ...]
    output: str


def verify_layers(
    artifact: Artifact, batches: Sequence[NDArray[np.uint8] | Named], *, threads: int | None = None
) -> tuple[LayerCheck, ...]:
    """Checks every quantised layer of an artefact on some images (B, H, W, C) or named inputs; empty where nothing is quantised.

    Costs a compilation for each size, and memory for every layer's inputs and outputs: small inputs suffice. `threads` None: the usable
    physical cores.
    """
    model = onnx.load_model_from_string(artifact.model_bytes())
    layers = _quantised_layers(model)
    if not layers:
        return ()
    threads = threads or physical_cores()
    alone = _alone(model, layers, threads)
    worst: dict[str, float] = {layer.name: 0.0 for layer in layers}
    for batch in batches:
        taps = _run_tapped(model, layers, batch if isinstance(batch, dict) else {model.graph.input[0].name: batch}, threads)
        answers = [_answers(alone, layers, taps, nudge) for nudge in (0.0, NUDGE, -NUDGE)]
        for layer in layers:
            worst[layer.name] = max(worst[layer.name], _error(layer, answers, taps[layer.output]))
    return tuple(LayerCheck(name=name, error=error) for name, error in worst.items())


def _answers(alone: Any, layers: Sequence[_QuantisedProduct], taps: dict[str, NDArray[Any]], nudge: float) -> dict[str, NDArray[Any]]:
    """Every layer's expected output and operands with its unrounded inputs raised by `nudge` steps."""
    fed: dict[str, NDArray[Any]] = {}
    for layer in layers:
        for name, scale in zip(layer.inputs, layer.scales, strict=True):
            fed[_fed(name)] = (taps[name] + np.float32(nudge * scale)).astype(np.float32)
    return dict(zip([output.name for output in alone.get_outputs()], alone.run(None, fed), strict=True))


def _error(layer: _QuantisedProduct, answers: list[dict[str, NDArray[Any]]], output: NDArray[Any]) -> float:
    """The largest difference of one output from its nearest answer."""
    expected = answers[0][layer.output]
    left, right = (answers[0][name] for name in layer.operands)
    step = layer.scales[0] * float(np.abs(right).max(initial=0))
    if len(layer.scales) > 1:
        step += layer.scales[1] * float(np.abs(left).max(initial=0))
    if not np.isfinite(output).all():
        return float("inf")
    differences = [np.abs(output.astype(np.float64) - answer[layer.output]) for answer in answers]
    difference = float(np.minimum.reduce(differences).max(initial=0)) - FLOAT_ERROR * float(np.abs(expected).max(initial=0))
    return max(0.0, difference) / step if step > 0 else (0.0 if difference <= 0 else float("inf"))


def _quantised_layers(model: onnx.ModelProto) -> list[_QuantisedProduct]:
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {initializer.name: initializer for initializer in model.graph.initializer}
    products = []
    for node in model.graph.node:
        if node.op_type not in COMPUTE:
            continue
        left, right = (_operand(name, makers, constants) for name in node.input[:2])
        if left is None or right is None:
            continue
        rounded = [(name, scale) for _, name, scale in (left, right) if name is not None]
        products.append(
            _QuantisedProduct(
                name=node.name or node.output[0],
                nodes=(*left[0], *right[0], node),
                inputs=tuple(name for name, _ in rounded),
                operands=(node.input[0], node.input[1]),
                scales=tuple(scale for _, scale in rounded),
                output=node.output[0],
            )
        )
    return products


_Operand = tuple[list[onnx.NodeProto], str | None, float]


def _operand(name: str, makers: dict[str, onnx.NodeProto], constants: dict[str, onnx.TensorProto]) -> _Operand | None:
    """The nodes that round an operand, its unrounded tensor (None for a weight) and its scale. None if it is not quantised."""
    dequantise = makers.get(name)
    if dequantise is None or dequantise.op_type != "DequantizeLinear":
        return None
    if dequantise.input[0] in constants:
        return [dequantise], None, 0.0
    quantise = makers.get(dequantise.input[0])
    if quantise is None or quantise.op_type != "QuantizeLinear" or quantise.input[1] not in constants:
        return None
    scale = float(numpy_helper.to_array(constants[quantise.input[1]]).reshape(-1)[0])
    return [quantise, dequantise], quantise.input[0], scale


def _fed(name: str) -> str:
    return f"fed:{name}"


def _alone(model: onnx.ModelProto, layers: Sequence[_QuantisedProduct], threads: int) -> Any:
    """A session of all layers side by side, each from its unrounded inputs to its output: no layer reads another."""
    from muntin.runtime.engines.onnxruntime import session_options  # engines are imported where they are used
    from muntin.runtime.host.quiet_imports import onnxruntime

    nodes: dict[str, onnx.NodeProto] = {}
    for layer in layers:
        for node in layer.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            if node.op_type == "QuantizeLinear":
                copy.input[0] = _fed(node.input[0])
            nodes[node.output[0]] = copy
    used = {name for node in nodes.values() for name in node.input}
    fed = dict.fromkeys(_fed(name) for layer in layers for name in layer.inputs)
    outputs = dict.fromkeys(name for layer in layers for name in (layer.output, *layer.operands))
    graph = onnx.helper.make_graph(
        list(nodes.values()),
        "layers",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in fed],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [initializer for initializer in model.graph.initializer if initializer.name in used],
    )
    options = session_options(threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    single = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return onnxruntime.InferenceSession(single.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run_tapped(model: onnx.ModelProto, layers: Sequence[_QuantisedProduct], given: Named, threads: int) -> dict[str, NDArray[Any]]:
    """Every layer's unrounded inputs and its output in the engine, in f32."""
    from muntin.runtime.host.quiet_imports import openvino

    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    present = {output.name for output in tapped.graph.output} | {entry.name for entry in tapped.graph.input}
    names = dict.fromkeys(name for layer in layers for name in (*layer.inputs, layer.output))
    tapped.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names if name not in present
    )
    core = openvino.Core()
    read = core.read_model(model=tapped.SerializeToString(), weights=b"")
    feed = {port: next(given[name] for name in port.get_names() if name in given) for port in read.inputs}
    read.reshape({port: list(value.shape) for port, value in feed.items()})
    with signal_stack_kept():
        compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads})
        results = compiled(list(feed.values()))
    by_name = {name: np.array(value) for port, value in results.items() for name in port.get_names()}
    return {name: given[name] if name in given else by_name[name] for name in names}
