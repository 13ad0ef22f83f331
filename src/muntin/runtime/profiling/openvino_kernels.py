"""Kernels that OpenVINO executes: their cost, and what they read and write.

OpenVINO counts each kernel's time as the mean over all inferences so far, in whole microseconds. The time of inference n is therefore
n * mean(n) - (n - 1) * mean(n - 1), with an error of up to n microseconds; the median over the rounds has an error of one or two. There are
no time stamps.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from statistics import median
from traceback import clear_frames
from typing import Any

import onnx
from numpy.typing import NDArray

from muntin.artifact import Artifact
from muntin.errors import ArtifactError
from muntin.runtime.engines.onnx_nodes import ComputeNodes, compute_nodes
from muntin.runtime.engines.openvino.compiled import MAY_MULTIPLY, MULTIPLY, OPENVINO_PRECISIONS, choose_precision, failure, layer_info
from muntin.runtime.engines.openvino.output_fusion import ending_in_scores
from muntin.runtime.engines.openvino.workarounds import with_whole_masks
from muntin.runtime.host.quiet_imports import openvino
from muntin.runtime.host.signal_stack import signal_stack_kept
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.kernels import (
    IMAGES,
    TO_PIXELS,
    Execution,
    Kernel,
    Operand,
    ProfiledInputs,
    convolution_macs,
    deconvolution_macs,
    group_of,
    layer_of,
    product_macs,
    words,
)

WARM_UP = 2
"""Inferences that are not measured: the first one prepares weights and memory."""

_CONVOLUTIONS = frozenset({"Convolution", "GroupConvolution"})
_GRAPH_DECONVOLUTIONS = frozenset({"ConvolutionBackpropData", "GroupConvolutionBackpropData"})


def openvino_kernels(artifact: Artifact, batch: ProfiledInputs, options: SessionOptions, rounds: int) -> Execution:
    """Compiles an artefact for these images or named inputs with counters on, runs it `rounds` times and reads the executed kernels.

    Costs a compilation and `rounds` + 2 inferences. Raises ArtifactError for a model that OpenVINO cannot read, compile or run.
    """
    with signal_stack_kept():
        try:
            return _kernels(artifact, batch, options, rounds)
        except ArtifactError as error:
            for raised in (error, error.__cause__):  # their frames hold the model, which must be deleted inside this block
                clear_frames(None if raised is None else raised.__traceback__)
            raise


def _kernels(artifact: Artifact, batch: ProfiledInputs, options: SessionOptions, rounds: int) -> Execution:
    core = openvino.Core()
    hint = choose_precision(core, options.precision, artifact.manifest.precision)
    threads = options.thread_count
    data = artifact.model_bytes()
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "PERF_COUNT": True,
    }
    try:
        exported = core.read_model(model=data, weights=b"")
        shuffles = {op.get_friendly_name(): TO_PIXELS for op in exported.get_ordered_ops() if op.get_type_name() == TO_PIXELS}
        model = exported if isinstance(batch, Mapping) else ending_in_scores(exported)  # as in a session
        feed = [_given(batch, port) for port in model.inputs]
        model.reshape({port: list(value.shape) for port, value in zip(model.inputs, feed, strict=True)})
        if hint != "f32":
            model = with_whole_masks(model)
        macs = graph_macs(model)
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise failure(artifact.path, f"cannot compile it for {words(batch)}", error) from error
    try:
        times = _measure(compiled.create_infer_request(), feed, rounds)
    except RuntimeError as error:
        raise failure(artifact.path, f"cannot run it on {words(batch)}", error) from error
    ops = _executed_ops(compiled.get_runtime_model(), set(times.kernels))
    nodes = compute_nodes(data)
    types = {node.name: str(node.op_type) for node in onnx.load_model_from_string(data).graph.node}
    names = _Names(ops, nodes, types | shuffles)  # a graph's last node is named by the output
    weights = {name: weight.name for name, weight in nodes.weights.items()}
    layers = {name: layer_of(name, weights.get(name, ""), artifact.manifest.layers) for name in nodes.names}
    kernels = tuple(_kernel(op, names, macs, times.kernels[op.name], layers) for op in ops)
    return Execution(kernels=kernels, profiled_ms=times.whole, between_ms=times.between, precision=hint, threads=threads)


def _given(batch: ProfiledInputs, port: Any) -> NDArray[Any]:
    return next(batch[name] for name in port.get_names() if name in batch) if isinstance(batch, Mapping) else batch


@dataclass(frozen=True)
class _Times:
    """Medians over the rounds, in ms: the whole inference, its time outside of kernels, and each executed kernel."""

    whole: float
    between: float
    kernels: dict[str, float]


def _measure(request: Any, feed: list[NDArray[Any]], rounds: int) -> _Times:
    before: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    whole, between = [], []
    for call in range(1, WARM_UP + rounds + 1):
        started = time.perf_counter()
        request.infer(feed, share_inputs=True, share_outputs=True)
        elapsed = (time.perf_counter() - started) * 1e3
        totals = {
            entry.node_name: call * entry.real_time.total_seconds() * 1e3
            for entry in request.profiling_info
            if entry.status == entry.Status.EXECUTED
        }
        if call > WARM_UP:
            spent = {name: total - before.get(name, 0.0) for name, total in totals.items()}
            whole.append(elapsed)
            between.append(elapsed - sum(spent.values()))
            for name, ms in spent.items():
                samples.setdefault(name, []).append(ms)
        before = totals
    return _Times(median(whole), median(between), {name: max(0.0, median(values)) for name, values in samples.items()})


@dataclass(frozen=True)
class _Op:
    """An executed operation in OpenVINO's runtime model. `second`: name of the constant or operation of its second input."""

    name: str
    kind: str
    implementation: str
    precision: str
    originals: tuple[str, ...]
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    second: str


def _executed_ops(runtime_model: Any, executed: set[str]) -> list[_Op]:
    ops = []
    for op in runtime_model.get_ordered_ops():
        if op.get_friendly_name() not in executed:
            continue
        info = layer_info(op)
        ops.append(
            _Op(
                name=op.get_friendly_name(),
                kind=info.get("layerType", op.get_type_name()),
                implementation=info.get("primitiveType", ""),
                precision=OPENVINO_PRECISIONS.get(info.get("runtimePrecision", ""), info.get("runtimePrecision", "")),
                originals=tuple(name for name in info.get("originalLayersNames", "").split(",") if name),
                inputs=tuple(_operand(port, _source(port, executed)) for port in (value.get_source_output() for value in op.inputs())),
                outputs=tuple(_operand(output) for output in op.outputs()),
                second=op.input_value(1).get_node().get_friendly_name() if op.get_input_size() > 1 else "",
            )
        )
    return ops


def _operand(port: Any, source: str | None = None) -> Operand:
    shape, kind, index = tuple(port.get_shape()), port.get_element_type(), port.get_index()
    layouts = layer_info(port.get_node()).get("outputLayouts", "").split(",")
    return Operand(
        shape=shape,
        type=str(kind.get_type_name()),
        bytes=(prod(shape) * int(kind.bitwidth) + 7) // 8 if kind.is_static() else 0,
        layout=layouts[index] if index < len(layouts) else "",
        source=source,
    )


def _source(port: Any, executed: set[str]) -> str | None:
    """The executed operation that feeds a port, past operations that only reshape memory."""
    node = port.get_node()
    while node.get_friendly_name() not in executed:
        if node.get_input_size() == 0:
            return IMAGES if layer_info(node).get("layerType") == "Input" else None
        node = node.input_value(0).get_node()
    return str(node.get_friendly_name())


class _Names:
    """Names of the operations in the profile: the operation that multiplies gets the compute node's name."""

    def __init__(self, ops: list[_Op], nodes: ComputeNodes, types: Mapping[str, str]) -> None:
        self._types = types
        self.nodes: dict[str, tuple[str, ...]] = {}  # the engine's name of an operation -> its compute nodes
        claimed: set[str] = set()
        for op in (op for op in ops if op.kind in MULTIPLY):
            # a MatMul may lose its name in a fusion; its weight keeps it
            node = nodes.find(op.originals, derived=True, taken=claimed) or nodes.find([op.second], derived=True, taken=claimed)
            if node is not None:
                self.nodes[op.name] = (node,)
                claimed.add(node)
        for op in (op for op in ops if op.kind in MAY_MULTIPLY):
            # A fused neighbour may have the name of a product that is computed elsewhere.
            named = (nodes.find([name], derived=False) for name in op.originals)
            if inside := tuple(dict.fromkeys(node for node in named if node is not None and node not in claimed)):
                self.nodes[op.name] = inside
                claimed.update(inside)
        self.shown = dict(self._unique(ops))

    def _unique(self, ops: list[_Op]) -> Iterator[tuple[str, str]]:
        taken: set[str] = set()
        for op in sorted(ops, key=lambda op: op.name not in self.nodes):  # compute nodes first
            name = next(iter(self.nodes.get(op.name, ())), op.name)
            while name in taken:
                name = op.name if name != op.name and op.name not in taken else f"{name} ({op.kind})"
            taken.add(name)
            yield op.name, name

    def operations(self, op: _Op) -> list[str]:
        """Types of the operations that were fused into one; of OpenVINO's own names, their beginning."""
        return [self._types.get(name) or re.sub(r"_?\d*$", "", name) for name in op.originals]


def _kernel(op: _Op, names: _Names, graph: Mapping[str, int], ms: float, layers: Mapping[str, str | None]) -> Kernel:
    nodes = names.nodes.get(op.name, ())
    macs = _macs(op) if op.kind in MULTIPLY else sum(graph.get(node, 0) for node in nodes)
    inputs = tuple(
        replace(value, source=None if value.source is None else names.shown.get(value.source, value.source))
        for value in (_constants_as_read(op) if op.kind in MULTIPLY else op.inputs)
    )
    return Kernel(
        name=names.shown[op.name],
        kind=op.kind,
        implementation=op.implementation,
        precision=op.precision,
        compute=bool(nodes),
        layer=layers.get(nodes[0]) if nodes else None,
        ms=ms,
        macs=macs,
        inputs=inputs,
        outputs=op.outputs,
        group=group_of(op.kind, macs, names.operations(op), inputs, op.outputs),
    )


def _constants_as_read(op: _Op) -> tuple[Operand, ...]:
    """The inputs of a product. In 16 bits its constants are in 16 bits, too, though the runtime model shows float32."""
    if op.precision not in ("bf16", "f16"):
        return op.inputs
    return tuple(
        replace(value, type=op.precision, bytes=2 * prod(value.shape)) if value.source is None and value.type == "f32" else value
        for value in op.inputs
    )


def _macs(op: _Op) -> int:
    if op.kind in _CONVOLUTIONS:
        return convolution_macs(op.outputs[0].shape, op.inputs[1].shape)
    if op.kind == "Deconvolution":
        return deconvolution_macs(op.inputs[0].shape, op.inputs[1].shape)
    if op.kind == "FullyConnected":  # its weight is always (N, K)
        return prod(op.outputs[0].shape) * op.inputs[0].shape[-1]
    return product_macs(op.inputs[0].shape, op.inputs[1].shape, op.outputs[0].shape)


def graph_macs(model: Any) -> dict[str, int]:
    """Multiply-adds of every product of a model with static shapes, by node name: for products that the engine fuses into others."""
    macs = {}
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        if kind in _CONVOLUTIONS | _GRAPH_DECONVOLUTIONS | {"MatMul"}:
            name, output = str(op.get_friendly_name()), tuple(op.output(0).get_shape())
            entry, weight = (tuple(op.input_value(index).get_shape()) for index in (0, 1))
            if kind == "MatMul":
                macs[name] = product_macs(entry, weight, output)
            else:
                macs[name] = deconvolution_macs(entry, weight) if kind in _GRAPH_DECONVOLUTIONS else convolution_macs(output, weight)
    return macs
