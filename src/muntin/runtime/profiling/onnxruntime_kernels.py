"""Kernels that ONNX Runtime executes on the CPU: their cost, and what they read and write.

Times come from its trace of every inference, connections from the optimised graph. That graph is written to a file, each node gets a
unique name (the trace has names only), and the result is run without further optimisation.

B, C, H, W: images, channels, rows, columns; K: outputs of a product. Convolutions may run channels last, or with channels in padded blocks
of 8 or 16 ("NCHWc"): the shapes given here are the logical ones.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from muntin.artifact import Artifact
from muntin.runtime.engines.onnx_nodes import ComputeNodes, Weight, compute_nodes
from muntin.runtime.engines.onnxruntime import (
    FAILURES,
    INTEGER,
    INTEGER_ELEMENTWISE,
    MULTIPLY,
    check_precision,
    failure,
    open_model,
    optimized_model,
    session_options,
)
from muntin.runtime.host.quiet_imports import onnxruntime
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.kernels import (
    IMAGES,
    Execution,
    Kernel,
    Operand,
    ProfiledInputs,
    TensorShape,
    convolution_macs,
    deconvolution_macs,
    group_of,
    layer_of,
    product_macs,
    words,
)

WARM_UP = 2
"""Inferences that are not measured: the first one reserves memory."""

CONVOLUTIONS = frozenset({"Conv", "FusedConv", "QLinearConv", "ConvInteger"})
CHANNELS_LAST = "acdb"
BLOCKS = "com.microsoft.nchwc"
"""The domain of operations on channels in blocks."""
# Element types in the trace (in ONNX: upper case) -> the profile's name, bytes of an element
_TYPES = {
    "float": ("f32", 4), "double": ("f64", 8), "float16": ("f16", 2), "bfloat16": ("bf16", 2), "uint8": ("u8", 1), "int8": ("i8", 1),
    "int16": ("i16", 2), "uint16": ("u16", 2), "int32": ("i32", 4), "uint32": ("u32", 4), "int64": ("i64", 8), "uint64": ("u64", 8),
    "bool": ("bool", 1),
}  # fmt: skip


def onnxruntime_kernels(artifact: Artifact, batch: ProfiledInputs, options: SessionOptions, rounds: int) -> Execution:
    """Opens an artefact with tracing on, runs it `rounds` times on these images or named inputs and reads the executed kernels.

    Costs opening twice and `rounds` + 2 inferences. Raises ArtifactError for a model that ONNX Runtime cannot open or cannot run on such
    images, DependencyError for a precision that it has no kernels for on CPUs.
    """
    check_precision(options.precision, ("f32",), "on CPUs")
    threads = options.thread_count
    data = artifact.model_bytes()
    optimized = _named(optimized_model(lambda settings: open_model(artifact, data, settings), session_options(threads)))
    with tempfile.TemporaryDirectory(prefix="muntin-") as folder:
        settings = session_options(threads)
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "trace")
        session = open_model(artifact, optimized.SerializeToString(), settings)
        feed = batch if isinstance(batch, Mapping) else {session.get_inputs()[0].name: batch}
        whole = _run(artifact, session, feed, rounds, words(batch))
        trace = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    traced = _traced(trace, optimized)
    between = [wall - sum(node.times[index] for node in traced.values()) for index, wall in enumerate(whole)]
    entries = {name: _operand(str(value.dtype), value.shape, IMAGES) for name, value in feed.items()}
    kernels = tuple(_kernels(optimized, traced, entries, compute_nodes(data), artifact))
    return Execution(kernels=kernels, profiled_ms=median(whole), between_ms=median(between), precision="f32", threads=threads)


def _named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with unique node names: a node without one, or with another's, is named after its first output."""
    taken: set[str] = set()
    for node in model.graph.node:
        name = node.name or node.output[0]
        while name in taken:
            name = f"{name}_{node.output[0]}"
        node.name = name
        taken.add(name)
    return model


def _run(artifact: Artifact, session: Any, feed: Mapping[str, NDArray[Any]], rounds: int, shapes: str) -> list[float]:
    """The time of each measured inference, in ms."""
    whole = []
    try:
        for _ in range(WARM_UP + rounds):
            started = time.perf_counter()
            session.run(None, dict(feed))
            whole.append((time.perf_counter() - started) * 1e3)
    except FAILURES as error:
        raise failure(artifact, f"cannot run it on {shapes}", error) from error
    return whole[WARM_UP:]


@dataclass
class _Traced:
    """One node in the trace: its start within each inference and its duration, in ms, and its outputs."""

    starts: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    outputs: tuple[Operand, ...] = ()


def _traced(trace: list[dict[str, Any]], optimized: onnx.ModelProto) -> dict[str, _Traced]:
    """The nodes of the main graph, by name, that ran in every measured inference. Nodes of branches count in their parents' time."""
    runs = sorted(event["ts"] for event in trace if event["name"] == "model_run")[WARM_UP:]
    names = {node.name for node in optimized.graph.node}
    nodes: dict[str, _Traced] = {}
    for event in sorted((event for event in trace if event["cat"] == "Node"), key=lambda event: event["ts"]):
        name = event["name"].removesuffix("_kernel_time")
        starts = [start for start in runs if start <= event["ts"]]
        if name not in names or not starts or not event["name"].endswith("_kernel_time"):
            continue
        node = nodes.setdefault(name, _Traced())
        node.starts.append((event["ts"] - starts[-1]) / 1e3)
        node.times.append(event["dur"] / 1e3)
        node.outputs = tuple(_operand(kind, tuple(shape)) for entry in event["args"]["output_type_shape"] for kind, shape in entry.items())
    return {name: node for name, node in nodes.items() if len(node.times) == len(runs)}


def _operand(kind: str, shape: TensorShape, source: str | None = None) -> Operand:
    name, size = _TYPES.get(kind.lower(), (kind, 0))
    return Operand(shape=shape, type=name, bytes=prod(shape) * size, source=source)


def _kernels(
    optimized: onnx.ModelProto,
    traced: Mapping[str, _Traced],
    entries: Mapping[str, Operand],
    nodes: ComputeNodes,
    artifact: Artifact,
) -> Iterator[Kernel]:
    values = dict(entries)
    for initializer in optimized.graph.initializer:
        values[initializer.name] = _operand(TensorProto.DataType.Name(initializer.data_type), tuple(initializer.dims))
    ran = [node for node in optimized.graph.node if node.name in traced]
    computed = _computed(ran, nodes)
    channels = _channels(optimized)
    for node in ran:
        compute_node = computed.get(node.name)
        weight = None if compute_node is None else nodes.weights.get(compute_node)
        name = compute_node or (f"{node.name} ({node.op_type})" if node.name in computed.values() else node.name)
        read = [values[entry] for entry in node.input if entry in values]
        inputs, outputs = _logical(node, read, traced[node.name].outputs, weight, channels.get(node.output[0]))
        macs = _macs(node, inputs, outputs, weight)
        yield Kernel(
            name=name,
            kind=node.op_type,
            implementation=node.domain or "ai.onnx",
            precision=_precision(node, outputs),
            compute=compute_node is not None,
            layer=layer_of(compute_node, "" if weight is None else weight.name, artifact.manifest.layers),
            ms=median(traced[node.name].times),
            macs=macs,
            inputs=inputs,
            outputs=outputs,
            group=group_of(node.op_type, macs, [], inputs, outputs),
            start_ms=median(traced[node.name].starts),
        )
        written = (output for output in node.output if output)
        values |= {output: replace(value, source=name) for output, value in zip(written, outputs, strict=False)}


def _computed(ran: Iterable[onnx.NodeProto], nodes: ComputeNodes) -> dict[str, str]:
    """The compute nodes of the executed products, by the engine's name. Exact names are assigned first: the remaining nodes tell which of
    two products a sum was fused into."""
    assigned: dict[str, str] = {}
    products = [node for node in ran if node.op_type in MULTIPLY]
    for _ in range(2):
        for node in products:
            taken = set(assigned.values())
            name = None if node.name in assigned else nodes.find([node.name, *node.output], derived=True, taken=taken)
            if name is not None and name not in taken:
                assigned[node.name] = name
    return assigned


def _channels(optimized: onnx.ModelProto) -> dict[str, int]:
    """The number of channels without padding of each blocked tensor that is reordered to channels first."""
    return {
        node.input[0]: int(attribute.i)
        for node in optimized.graph.node
        if node.op_type == "ReorderOutput"
        for attribute in node.attribute
        if attribute.name == "channels"
    }


def _logical(
    node: onnx.NodeProto, inputs: Sequence[Operand], outputs: tuple[Operand, ...], weight: Weight | None, channels: int | None
) -> tuple[tuple[Operand, ...], tuple[Operand, ...]]:
    """Inputs and outputs with logical shapes (B, C, H, W), for any order in memory and without padded channels."""
    if not inputs or not outputs:
        return tuple(inputs), outputs
    if any(attribute.name == "channels_last" and attribute.i for attribute in node.attribute):
        first = inputs[0] if inputs[0].layout == CHANNELS_LAST else _channels_first(inputs[0])
        return (first, *inputs[1:]), tuple(_channels_first(value) for value in outputs)
    if node.domain == BLOCKS and node.op_type == "Conv" and weight is not None:
        K, C = weight.shape[0], weight.shape[1] * weight.groups
        return (_with_channels(inputs[0], C), *inputs[1:]), tuple(_with_channels(value, K) for value in outputs)
    if node.domain == BLOCKS and node.op_type == "Conv" and channels is not None:
        return tuple(inputs), tuple(_with_channels(value, channels) for value in outputs)
    return tuple(inputs), outputs


def _channels_first(value: Operand) -> Operand:
    if len(value.shape) != 4:
        return value
    B, H, W, C = value.shape
    return replace(value, shape=(B, C, H, W), layout=CHANNELS_LAST)


def _with_channels(value: Operand, channels: int) -> Operand:
    return replace(value, shape=(value.shape[0], channels, *value.shape[2:]))


def _precision(node: onnx.NodeProto, outputs: tuple[Operand, ...]) -> str:
    if node.op_type in INTEGER | INTEGER_ELEMENTWISE:
        return "i8"
    written = outputs[0].type if outputs else ""
    return "i8" if written == "u8" else written


_RIGHT = {"QLinearMatMul": 3, "QGemm": 3}
"""Index of the right operand where it is not 1: a scale and a zero point follow the left one."""


def _macs(node: onnx.NodeProto, inputs: tuple[Operand, ...], outputs: tuple[Operand, ...], weight: Weight | None) -> int:
    """Multiply-adds by the model's weight, or by the engine's where the compute node is unknown."""
    if node.op_type not in MULTIPLY or not outputs or not inputs:
        return 0
    output, entry = outputs[0].shape, inputs[0].shape
    if node.op_type not in CONVOLUTIONS | {"ConvTranspose"}:
        right = inputs[_RIGHT.get(node.op_type, 1) :]
        return product_macs(entry, right[0].shape if right else (), output)
    shape = _own_weight(node, inputs, outputs) if weight is None else weight.shape
    if not shape:
        return 0
    return deconvolution_macs(entry, shape) if node.op_type == "ConvTranspose" else convolution_macs(output, shape)


def _own_weight(node: onnx.NodeProto, inputs: Sequence[Operand], outputs: Sequence[Operand]) -> TensorShape:
    """Shape of the weight that a convolution reads, without padding: its constant with as many axes as the image."""
    shape = next((value.shape for value in inputs[1:] if len(value.shape) == len(inputs[0].shape)), ())
    return shape if not shape or node.op_type == "ConvTranspose" else (outputs[0].shape[1], *shape[1:])
