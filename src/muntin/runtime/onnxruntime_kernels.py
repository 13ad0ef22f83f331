"""What ONNX Runtime executes on the CPU: its kernels, what each costs, and what it reads and writes.

From its own trace of every inference, which has real time stamps, and the optimised graph, which has the connections.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
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
from muntin.errors import ArtifactError, DependencyError
from muntin.runtime.graph import ComputeNodes, compute_nodes
from muntin.runtime.hardware import physical_cores
from muntin.runtime.kernels import IMAGES, Execution, Kernel, Operand, Shape, deconvolution_macs, group_of, layer_of, product_macs
from muntin.runtime.onnxruntime import FAILURES, INTEGER, INTEGER_ELEMENTWISE, MULTIPLY
from muntin.runtime.quiet import onnxruntime

WARM_UP = 2
"""Inferences before the first that counts: the first one reserves memory."""

_CONVOLUTIONS = frozenset({"Conv", "FusedConv", "QLinearConv", "ConvInteger"})
# The names of element types in the trace and, in capitals, in ONNX -> ours, and bytes of one
_TYPES = {
    "float": ("f32", 4), "double": ("f64", 8), "float16": ("f16", 2), "bfloat16": ("bf16", 2), "uint8": ("u8", 1), "int8": ("i8", 1),
    "int16": ("i16", 2), "uint16": ("u16", 2), "int32": ("i32", 4), "uint32": ("u32", 4), "int64": ("i64", 8), "uint64": ("u64", 8),
    "bool": ("bool", 1),
}  # fmt: skip


def onnxruntime_kernels(
    artifact: Artifact, images_BHWC: NDArray[np.uint8], *, precision: str, threads: int | None, rounds: int
) -> Execution:
    """Opens an artefact with tracing on, runs it `rounds` times on these images and reads what was executed.

    Costs opening and `rounds` + 2 inferences. Raises ArtifactError for a model that ONNX Runtime cannot open, DependencyError for a
    precision that it has no kernels for on CPUs.
    """
    if precision not in ("recorded", "f32"):
        raise DependencyError(
            f'precision="{precision}": ONNX Runtime has no {precision} kernels on CPUs: ask for "recorded" or "f32", or engine="openvino"'
        )
    used = threads or physical_cores()
    data = _named(artifact.model_bytes())
    with tempfile.TemporaryDirectory(prefix="muntin-") as folder:
        session = _open(artifact, data, used, Path(folder))
        (entry,) = (item.name for item in session.get_inputs())
        whole = []
        for _ in range(WARM_UP + rounds):
            started = time.perf_counter()
            session.run(None, {entry: images_BHWC})
            whole.append((time.perf_counter() - started) * 1e3)
        trace = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        optimized = onnx.load(str(Path(folder) / "optimized.onnx"))
    whole = whole[WARM_UP:]
    traced = _traced(trace, optimized)
    between = [wall - spent for wall, spent in zip(whole, _sums(traced.values(), rounds), strict=True)]
    kernels = tuple(
        _kernels(optimized, traced, {entry: _operand("uint8", images_BHWC.shape, IMAGES)}, compute_nodes(data), _weights(data), artifact)
    )
    return Execution(kernels=kernels, profiled_ms=median(whole), between_ms=median(between), precision="f32", threads=used)


def _named(model: bytes) -> bytes:
    """The model with a name on every node, that of its first output where there was none: the trace knows nodes by name only."""
    read = onnx.load_model_from_string(model)
    for node in read.graph.node:
        node.name = node.name or node.output[0]
    data: bytes = read.SerializeToString()
    return data


def _open(artifact: Artifact, data: bytes, threads: int, folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "trace")
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.disable_telemetry_events()
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except FAILURES as error:
        text = " ".join(str(error).split())
        raise ArtifactError(f"{artifact.path}: ONNX Runtime {onnxruntime.__version__} cannot open its model: {text}") from error


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


def _operand(kind: str, shape: Shape, source: str | None = None) -> Operand:
    name, size = _TYPES.get(kind.lower(), (kind, 0))
    return Operand(shape=shape, type=name, bytes=prod(shape) * size, source=source)


def _weights(model: bytes) -> dict[str, Shape]:
    """The shape of every compute node's constant weight, by the node's name: the optimised graph may hold it padded or in another order."""
    graph = onnx.load_model_from_string(model).graph
    shapes = {initializer.name: tuple(initializer.dims) for initializer in graph.initializer}
    shapes |= {
        node.output[0]: shapes[node.input[0]] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in shapes
    }
    return {node.name or node.output[0]: shapes[node.input[1]] for node in graph.node if len(node.input) > 1 and node.input[1] in shapes}


def _kernels(
    optimized: onnx.ModelProto,
    traced: Mapping[str, _Traced],
    entries: Mapping[str, Operand],
    nodes: ComputeNodes,
    weights: Mapping[str, Shape],
    artifact: Artifact,
) -> Iterator[Kernel]:
    values = dict(entries) | {initializer.name: _constant(initializer) for initializer in optimized.graph.initializer}
    for node in optimized.graph.node:
        if node.name not in traced:
            continue
        ran = traced[node.name]
        found = nodes.find([node.name, *node.output], derived=True) if node.op_type in MULTIPLY else None
        inputs = tuple(values[name] for name in node.input if name in values)
        macs = _macs(node, inputs, ran.outputs, weights.get(found or ""))
        yield Kernel(
            name=found or node.name,
            kind=node.op_type,
            implementation=node.domain or "ai.onnx",
            precision=_precision(node, ran.outputs),
            compute=found is not None,
            layer=layer_of(found, node.input[1] if len(node.input) > 1 else "", artifact.manifest.layers),
            ms=median(ran.times),
            macs=macs,
            inputs=inputs,
            outputs=ran.outputs,
            group=group_of(node.op_type, macs, [], inputs, ran.outputs),
            start_ms=median(ran.starts),
        )
        written = (name for name in node.output if name)
        values |= {name: replace(value, source=found or node.name) for name, value in zip(written, ran.outputs, strict=False)}


def _constant(initializer: onnx.TensorProto) -> Operand:
    return _operand(TensorProto.DataType.Name(initializer.data_type), tuple(initializer.dims))


def _precision(node: onnx.NodeProto, outputs: tuple[Operand, ...]) -> str:
    if node.op_type in INTEGER | INTEGER_ELEMENTWISE:
        return "i8"
    written = outputs[0].type if outputs else ""
    return "i8" if written == "u8" else written


def _macs(node: onnx.NodeProto, inputs: tuple[Operand, ...], outputs: tuple[Operand, ...], weight: Shape | None) -> int:
    if node.op_type not in MULTIPLY or not outputs or not inputs:
        return 0
    output, entry = outputs[0].shape, inputs[0].shape
    if node.op_type == "ConvTranspose":
        return deconvolution_macs(entry, weight) if weight else 0
    if node.op_type in _CONVOLUTIONS:
        last = any(attribute.name == "channels_last" and attribute.i for attribute in node.attribute)
        return prod(output) // output[-1 if last else 1] * prod(weight) if weight else 0
    return product_macs(entry, output)
