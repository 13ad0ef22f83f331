"""Kernels: the operations that an engine really executes, with their cost, work and kind.

Engines fuse, split and add operations, so a kernel is seldom one node of `model.onnx`. Common to all engines are the work in multiply-adds
and bytes, and the kinds that a profile shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import LayerRecord
from muntin.runtime.engines.onnx_nodes import is_node_of

PRODUCTS = "convolution and matrix products"
LAYOUT = "layout changes"
CONVERT = "quantise / convert"
ELEMENTWISE = "element-wise and softmax"
COPIES = "copies: split, join, pad, resize"
OTHER = "other"
BETWEEN = "between kernels"
INTERRUPTIONS = "interruptions, of no kernel in particular"

TO_PIXELS = "DepthToSpace"
"""ONNX operation that may run as a permutation (`engines.openvino.output_fusion`)."""
IMAGES = "the image"
"""`source` of the model's input."""

# Kind in words -> engines' names of operations. An operation with multiply-adds is a product under any name.
_KINDS: dict[str, frozenset[str]] = {
    LAYOUT: frozenset({"Transpose", "Reorder", "ReorderInput", "ReorderOutput"}),
    CONVERT: frozenset({"Convert", "FakeQuantize", "Cast", "QuantizeLinear", "DequantizeLinear"}),
    COPIES: frozenset({
        "Split", "VariadicSplit", "Concatenation", "Concat", "StridedSlice", "Slice", "Pad", "Tile", "Expand", "Broadcast", "Gather",
        "Interpolate", "Resize", "DepthToSpace", "SpaceToDepth", "Reshape", "Squeeze", "Unsqueeze", "Flatten",
    }),
    ELEMENTWISE: frozenset({
        "Subgraph", "Eltwise", "Softmax", "LogSoftmax", "QLinearSoftmax", "MVN", "RMS", "NormalizeL2", "LayerNormalization",
        "SkipLayerNormalization", "Reduce", "ReduceMean", "ReduceSum", "ReduceMax", "Math", "Select", "Where", "Add", "Sub", "Mul", "Div",
        "QLinearAdd", "QLinearMul", "Max", "Min", "Pow", "Sqrt", "Exp", "Erf", "Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid",
        "Tanh", "Gelu", "BiasGelu", "QuickGelu", "Equal", "Less", "Greater", "And", "Not",
    }),
}  # fmt: skip

PRECISION_LABELS = {"i8": "INT8", "bf16": "BF16", "f16": "FP16", "f32": "FP32"}
"""Precision -> label."""

TensorShape = tuple[int, ...]
ProfiledInputs = NDArray[np.uint8] | Mapping[str, NDArray[Any]]
"""Images (B, H, W, C), or named inputs."""


def words(batch: ProfiledInputs) -> str:
    """Shapes of the images or named inputs."""
    if isinstance(batch, Mapping):
        return ", ".join(f"{name} {value.shape}" for name, value in batch.items())
    return f"images of shape {batch.shape}"


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Measured limits of this machine.

    `gmacs`: 1e9 multiply-adds a second of a large product, by "f32", "bf16", "f16", "i8"; a precision without kernels on this CPU is
    absent. `copy_gb_s`: 1e9 bytes read and written a second by a copy far larger than the caches. `threads`: how many worked. `others`:
    CPU cores' worth of time that other processes used meanwhile, None where unknown: well above 0, the limits are too low.
    """

    gmacs: Mapping[str, float]
    copy_gb_s: float
    threads: int
    others: float | None


@dataclass(frozen=True, kw_only=True)
class Operand:
    """A tensor that a kernel reads or writes.

    `shape`: the logical one (B, C, H, W). `layout`: the engine's name of the order in memory ("abcd": as in the shape, "acdb": channels
    last), empty where unknown. `type`: element type, "u8", "f32". `bytes`: size. `source`: the executed kernel that wrote it, `IMAGES` for
    the input, None for a constant.
    """

    shape: TensorShape
    type: str
    bytes: int
    layout: str = ""
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of an inference.

    `name`: unique; the compute node of `model.onnx` if there is one, otherwise the engine's name. `kind`: the engine's name of the
    operation, `implementation` of its code. `precision`: "i8" (of either sign), "f32", "bf16" or "f16". `compute`: True if `name` is a
    compute node. `layer`: the manifest's layer. `ms`: median time in one inference. `macs`: multiply-adds of the whole batch. `group`: its
    kind in words.
    """

    name: str
    kind: str
    implementation: str
    precision: str
    compute: bool
    layer: str | None
    ms: float
    macs: int
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    group: str

    @property
    def bytes(self) -> int:
        """Bytes read and written, weights included."""
        return sum(operand.bytes for operand in (*self.inputs, *self.outputs))

    @property
    def label(self) -> str:
        """The layer's name if there is one, otherwise the kernel's."""
        return self.layer or self.name

    @property
    def words(self) -> str:
        """Kind in words; of a product with its precision."""
        return f"{self.group}, {PRECISION_LABELS.get(self.precision, self.precision)}" if self.group == PRODUCTS else self.group

    def bounds_ms(self, ceilings: Ceilings) -> tuple[float | None, float]:
        """Shortest times for the multiply-adds (None without a ceiling of the precision) and for the bytes."""
        return macs_ms(self.macs, self.precision, ceilings), self.bytes / ceilings.copy_gb_s / 1e6

    def attainable_ms(self, ceilings: Ceilings) -> float | None:
        """Shortest time by the machine's ceilings; None without a ceiling of the precision."""
        arithmetic, memory = self.bounds_ms(ceilings)
        return None if arithmetic is None else max(arithmetic, memory)

    def ceiling_share(self, ceilings: Ceilings) -> float | None:
        """Shortest time over measured time; None where either is unknown."""
        attainable = self.attainable_ms(ceilings)
        return None if attainable is None or self.ms == 0 else attainable / self.ms


@dataclass(frozen=True, kw_only=True)
class Execution:
    """An engine's executed kernels in order, its precision and threads.

    `profiled_ms`: median of the whole inference with counters on. `between_ms`: median of an inference's time outside of its kernels.
    """

    kernels: tuple[Kernel, ...]
    profiled_ms: float
    between_ms: float
    precision: str
    threads: int


def macs_ms(macs: int, precision: str, ceilings: Ceilings) -> float | None:
    """Shortest time for multiply-adds in a precision: 0 for none, None without a ceiling."""
    if macs == 0:
        return 0.0
    ceiling = ceilings.gmacs.get(precision)
    return None if not ceiling else macs / ceiling / 1e6


def layer_of(node: str | None, weight: str, records: Sequence[LayerRecord]) -> str | None:
    """The recorded layer of a compute node, by the node's name or, if none matches, by its weight's name.

    A float convolution may have the name of a norm that was folded into it; its weight keeps the layer's name.
    """
    if node is None:
        return None
    stem = weight.removeprefix("model.").partition(".weight")[0]
    names = [record.name for record in records if is_node_of(node, record)] + [record.name for record in records if record.name == stem]
    return next(iter(names), None)


def group_of(kind: str, macs: int, operations: Sequence[str], inputs: Sequence[Operand], outputs: Sequence[Operand]) -> str:
    """A kernel's kind in words. `operations`: types of the operations that were fused into it, where known."""
    if macs:
        return PRODUCTS
    group = next((group for group, kinds in _KINDS.items() if kind in kinds), OTHER)
    if group == ELEMENTWISE and operations and _KINDS[CONVERT].issuperset(operations):
        return CONVERT
    if group == LAYOUT and TO_PIXELS in operations:
        return COPIES
    if group == LAYOUT and inputs and outputs and inputs[0].layout == outputs[0].layout != "" and inputs[0].type != outputs[0].type:
        return CONVERT
    return group


def convolution_macs(output: TensorShape, weight: TensorShape) -> int:
    """Multiply-adds of a convolution, grouped or not: each output value takes its channel's share of the weights."""
    return prod(output) * prod(weight) // output[1]


def deconvolution_macs(entry: TensorShape, weight: TensorShape) -> int:
    """Multiply-adds of a transposed convolution: each input value takes its channel's share of the weights."""
    return prod(entry) * prod(weight) // entry[1]


def product_macs(left: TensorShape, right: TensorShape, output: TensorShape) -> int:
    """Multiply-adds of a matrix product, the left operand transposed or not: (..., M, K) x (..., K, N) is M * N * K for each matrix."""
    if len(right) == 1:  # a vector: its axis is missing in the output
        return prod(output) * right[0]
    if len(left) == 1:
        return prod(output) * left[0]
    rows = output[-2] if len(output) > 1 else 1
    return prod(output) * left[-1] * left[-2] // rows if prod(output) else 0
