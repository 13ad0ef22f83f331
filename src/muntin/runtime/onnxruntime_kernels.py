"""What ONNX Runtime executes on the CPU: its kernels, what each costs, and what it reads and writes.

From its own trace of every inference, which has real time stamps, and the optimised graph, which has the connections. The optimised graph
is written, every node of it given a name of its own (the trace knows nodes by name only), and run as it is.

B, C, H, W: images, channels, rows, columns; K: outputs of a product. Convolutions may run channels last, or with channels in blocks of 8
or 16 ("NCHWc"), where missing ones are filled up: the shapes given here are the logical ones all the same.
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

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from muntin.artifact import Artifact
from muntin.errors import ArtifactError
from muntin.runtime.graph import ComputeNodes, Weight, compute_nodes
from muntin.runtime.kernels import (
    IMAGES,
    Execution,
    Kernel,
    Operand,
    TensorShape,
    convolution_macs,
    deconvolution_macs,
    group_of,
    layer_of,
    product_macs,
)
from muntin.runtime.onnxruntime import FAILURES, INTEGER, INTEGER_ELEMENTWISE, MULTIPLY, check_precision
from muntin.runtime.options import SessionOptions
from muntin.runtime.quiet import onnxruntime

WARM_UP = 2
"""Inferences before the first that counts: the first one reserves memory."""

CONVOLUTIONS = frozenset({"Conv", "FusedConv", "QLinearConv", "ConvInteger"})
CHANNELS_LAST = "acdb"
BLOCKS = "com.microsoft.nchwc"
"""The domain of operations on channels in blocks."""
# The names of element types in the trace and, in capitals, in ONNX -> ours, and bytes of one
_TYPES = {
    "float": ("f32", 4), "double": ("f64", 8), "float16": ("f16", 2), "bfloat16": ("bf16", 2), "uint8": ("u8", 1), "int8": ("i8", 1),
    "int16": ("i16", 2), "uint16": ("u16", 2), "int32": ("i32", 4), "uint32": ("u32", 4), "int64": ("i64", 8), "uint64": ("u64", 8),
    "bool": ("bool", 1),
}  # fmt: skip


def onnxruntime_kernels(artifact: Artifact, images_BHWC: NDArray[np.uint8], options: SessionOptions, rounds: int) -> Execution:
    """Opens an artefact with tracing on, runs it `rounds` times on these images and reads what was executed.

    Costs opening twice and `rounds` + 2 inferences. Raises ArtifactError for a model that ONNX Runtime cannot open or cannot run on such
    images, DependencyError for a precision that it has no kernels for on CPUs.
    """
    check_precision(options.precision, ("f32",), "on CPUs")
    threads = options.thread_count
    data = artifact.model_bytes()
    with tempfile.TemporaryDirectory(prefix="muntin-") as folder:
        written = Path(folder) / "optimized.onnx"
        _open(artifact, data, threads, written=written)
        optimized = _named(onnx.load(str(written)))
        session = _open(artifact, optimized.SerializeToString(), threads, trace=Path(folder) / "trace")
        (entry,) = (item.name for item in session.get_inputs())
        whole = _run(artifact, session, {entry: images_BHWC}, rounds)
        trace = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    traced = _traced(trace, optimized)
    between = [wall - spent for wall, spent in zip(whole, _sums(traced.values(), rounds), strict=True)]
    entries = {entry: _operand("uint8", images_BHWC.shape, IMAGES)}
    kernels = tuple(_kernels(optimized, traced, entries, compute_nodes(data), artifact))
    return Execution(kernels=kernels, profiled_ms=median(whole), between_ms=median(between), precision="f32", threads=threads)


def _named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a name of its own on every node: that of its first output where it had none or another's."""
    taken: set[str] = set()
    for node in model.graph.node:
        name = node.name or node.output[0]
        while name in taken:
            name = f"{name}_{node.output[0]}"
        node.name = name
        taken.add(name)
    return model


def _open(artifact: Artifact, data: bytes, threads: int, *, written: Path | None = None, trace: Path | None = None) -> Any:
    """Optimises a model and writes it, or runs it as it is with tracing on."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised
    if written is not None:
        options.optimized_model_filepath = str(written)
    if trace is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_profiling = True
        options.profile_file_prefix = str(trace)
    onnxruntime.disable_telemetry_events()
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except FAILURES as error:
        text = " ".join(str(error).split())
        raise ArtifactError(f"{artifact.path}: ONNX Runtime {onnxruntime.__version__} cannot open its model: {text}") from error


def _run(artifact: Artifact, session: Any, feed: Mapping[str, NDArray[np.uint8]], rounds: int) -> list[float]:
    """The time of every inference that counts, in ms."""
    whole = []
    try:
        for _ in range(WARM_UP + rounds):
            started = time.perf_counter()
            session.run(None, dict(feed))
            whole.append((time.perf_counter() - started) * 1e3)
    except FAILURES as error:
        (shape,) = (images_BHWC.shape for images_BHWC in feed.values())
        text = " ".join(str(error).split())
        raise ArtifactError(
            f"{artifact.path}: ONNX Runtime {onnxruntime.__version__} cannot run it on images of shape {shape}: {text}"
        ) from error
    return whole[WARM_UP:]


@dataclass
class _Traced:
    """What the trace says of one node: when it began within each inference and how long it took, in ms, and its outputs."""

    starts: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    outputs: tuple[Operand, ...] = ()


def _traced(trace: list[dict[str, Any]], optimized: onnx.ModelProto) -> dict[str, _Traced]:
    """By name, the nodes of the main graph that ran in every inference after the warm-up: those of branches are within their parents'."""
    runs = sorted(event["ts"] for event in trace if event["name"] == "model_run")[WARM_UP:]
    names = {node.name for node in optimized.graph.node}
    found: dict[str, _Traced] = {}
    for event in sorted((event for event in trace if event["cat"] == "Node"), key=lambda event: event["ts"]):
        name = event["name"].removesuffix("_kernel_time")
        begun = [start for start in runs if start <= event["ts"]]
        if name not in names or not begun or not event["name"].endswith("_kernel_time"):
            continue
        node = found.setdefault(name, _Traced())
        node.starts.append((event["ts"] - begun[-1]) / 1e3)
        node.times.append(event["dur"] / 1e3)
        node.outputs = tuple(_operand(kind, tuple(shape)) for entry in event["args"]["output_type_shape"] for kind, shape in entry.items())
    return {name: node for name, node in found.items() if len(node.times) == len(runs)}


def _sums(nodes: Iterable[_Traced], rounds: int) -> list[float]:
    return [sum(times) for times in zip(*(node.times for node in nodes), strict=True)] or [0.0] * rounds


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
    values = dict(entries) | {initializer.name: _constant(initializer) for initializer in optimized.graph.initializer}
    ran = [node for node in optimized.graph.node if node.name in traced]
    computed = _computed(ran, nodes)
    channels = _channels(optimized)
    for node in ran:
        found, weight = computed.get(node.name), nodes.weights.get(computed.get(node.name, ""))
        name = found or (f"{node.name} ({node.op_type})" if node.name in computed.values() else node.name)
        read = [values[entry] for entry in node.input if entry in values]
        inputs, outputs = _logical(node, read, traced[node.name].outputs, weight, channels.get(node.output[0]))
        macs = _macs(node, inputs, outputs, weight)
        yield Kernel(
            name=name,
            kind=node.op_type,
            implementation=node.domain or "ai.onnx",
            precision=_precision(node, outputs),
            compute=found is not None,
            layer=layer_of(found, "" if weight is None else weight.name, artifact.manifest.layers),
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
    """Of the products that ran, by the engine's name, the compute nodes. Those that are named outright choose first: what is left tells
    which of two products a sum was fused into."""
    found: dict[str, str] = {}
    products = [node for node in ran if node.op_type in MULTIPLY]
    for _ in range(2):
        for node in products:
            taken = set(found.values())
            name = None if node.name in found else nodes.find([node.name, *node.output], derived=True, taken=taken)
            if name is not None and name not in taken:
                found[node.name] = name
    return found


def _channels(optimized: onnx.ModelProto) -> dict[str, int]:
    """The number of channels that are no filling, of the tensors in blocks that are brought back to the usual order."""
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
    """What a node reads and writes with shapes as (B, C, H, W), whatever the order in memory and however many channels are filled up."""
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


def _constant(initializer: onnx.TensorProto) -> Operand:
    return _operand(TensorProto.DataType.Name(initializer.data_type), tuple(initializer.dims))


def _precision(node: onnx.NodeProto, outputs: tuple[Operand, ...]) -> str:
    if node.op_type in INTEGER | INTEGER_ELEMENTWISE:
        return "i8"
    written = outputs[0].type if outputs else ""
    return "i8" if written == "u8" else written


_RIGHT = {"QLinearMatMul": 3, "QGemm": 3}
"""Which input is the right operand, where it is not the second: a scale and a zero point stand behind the left one."""


def _macs(node: onnx.NodeProto, inputs: tuple[Operand, ...], outputs: tuple[Operand, ...], weight: Weight | None) -> int:
    """Multiply-adds of logical shapes: those of the model's weight, or of the weight that the engine has where its node is not known."""
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
    """The shape of the weight that a convolution itself reads, without filling: of its constants the one with as many axes as the image."""
    found = next((value.shape for value in inputs[1:] if len(value.shape) == len(inputs[0].shape)), ())
    return found if not found or node.op_type == "ConvTranspose" else (outputs[0].shape[1], *found[1:])
