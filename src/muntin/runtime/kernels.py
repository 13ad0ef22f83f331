"""A kernel: one piece of work that an engine really executes, what it cost, and what it is in a person's words.

Engines fuse, split and add operations, so a kernel is seldom a node of `model.onnx`. What they have in common is here: work in
multiply-adds and bytes, and the kinds that a reader of a profile knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from muntin.artifact import LayerRecord

PRODUCTS = "convolution and matrix products"
LAYOUT = "layout changes"
CONVERT = "quantise / convert"
ELEMENTWISE = "element-wise and softmax"
COPIES = "copies: split, join, pad, resize"
OTHER = "other"
BETWEEN = "between kernels"
INTERRUPTIONS = "interruptions, of no kernel in particular"

TO_PIXELS = "DepthToSpace"
"""An operation that may run as a permutation (`openvino_endings`)."""
IMAGES = "the image"
"""Source of what the input holds."""

# Engines' names of operations -> the kind in words. What has multiply-adds is a product whatever it is called.
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
"""Ours -> in words."""

TensorShape = tuple[int, ...]


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
    """A tensor that a kernel reads or writes. `shape` is the logical one (B, C, H, W); `layout` the order in memory as the engine calls it
    ("abcd" as the shape says, "acdb" channels last), empty where it does not say. `type`: element type, "u8", "f32"; `bytes`: its size.
    `source`: the executed kernel that wrote it, `IMAGES` for the input, None for a constant."""

    shape: TensorShape
    type: str
    bytes: int
    layout: str = ""
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of an inference.

    `name`: the compute node of `model.onnx` where it has one, otherwise the engine's own; no two kernels share one. `kind`: the
    engine's name of the operation, `implementation` of its code. `precision`: what it computes in, "i8" (of either sign), "f32", "bf16",
    "f16". `compute`: whether it is such a node. `layer`: the manifest's layer that it belongs to. `ms`: median time of one inference.
    `macs`: multiply-adds of the whole batch. `start_ms`: when it began within one inference, None where the engine does not say.
    `group`: its kind in words.
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
    start_ms: float | None = None

    @property
    def bytes(self) -> int:
        """What it reads and writes, weights included."""
        return sum(operand.bytes for operand in (*self.inputs, *self.outputs))

    @property
    def label(self) -> str:
        """The name that a reader knows: the layer's where there is one."""
        return self.layer or self.name

    @property
    def words(self) -> str:
        """Its kind in words, for a product with the precision."""
        return f"{self.group}, {PRECISION_LABELS.get(self.precision, self.precision)}" if self.group == PRODUCTS else self.group

    def bounds_ms(self, ceilings: Ceilings) -> tuple[float | None, float]:
        """The least time for its multiply-adds (None without a ceiling of its precision) and for its bytes."""
        return macs_ms(self.macs, self.precision, ceilings), self.bytes / ceilings.copy_gb_s / 1e6

    def attainable_ms(self, ceilings: Ceilings) -> float | None:
        """The least time that the machine's ceilings allow; None without a ceiling of its precision."""
        arithmetic, memory = self.bounds_ms(ceilings)
        return None if arithmetic is None else max(arithmetic, memory)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What an engine executed: its kernels in order, and what it ran in.

    `profiled_ms`: median of the whole inference with counters on. `between_ms`: median of what no kernel of the same inference
    accounts for.
    """

    kernels: tuple[Kernel, ...]
    profiled_ms: float
    between_ms: float
    precision: str
    threads: int


def macs_ms(macs: int, precision: str, ceilings: Ceilings) -> float | None:
    """The least time for multiply-adds in a precision: 0 for none, None without a ceiling."""
    if macs == 0:
        return 0.0
    ceiling = ceilings.gmacs.get(precision)
    return None if not ceiling else macs / ceiling / 1e6


def layer_of(node: str | None, weight: str, records: Sequence[LayerRecord]) -> str | None:
    """The recorded layer of a compute node: of its name, or of a prefix of it before a "/".

    A float convolution may carry the name of a norm that was folded into it; then the layer is that of its weight's name in the model,
    which an engine may have changed.
    """
    if node is None:
        return None
    found = next((record.name for record in records if node == record.name or node.startswith(f"{record.name}/")), None)
    stem = weight.removeprefix("model.").partition(".weight")[0]
    return found or next((record.name for record in records if record.name == stem), None)


def group_of(kind: str, macs: int, operations: Sequence[str], inputs: Sequence[Operand], outputs: Sequence[Operand]) -> str:
    """A kernel's kind in words. `operations`: the types of the operations that were fused into it, where the engine says."""
    if macs:
        return PRODUCTS
    found = next((group for group, kinds in _KINDS.items() if kind in kinds), OTHER)
    if found == ELEMENTWISE and operations and _KINDS[CONVERT].issuperset(operations):
        return CONVERT
    if found == LAYOUT and TO_PIXELS in operations:
        return COPIES
    if found == LAYOUT and inputs and outputs and inputs[0].layout == outputs[0].layout != "" and inputs[0].type != outputs[0].type:
        return CONVERT
    return found


def convolution_macs(output: TensorShape, weight: TensorShape) -> int:
    """Multiply-adds of a convolution, grouped or not: each output channel has its share of the weights, (B, K, ...) x their number."""
    return prod(output) * prod(weight) // output[1]


def deconvolution_macs(entry: TensorShape, weight: TensorShape) -> int:
    """Multiply-adds of a transposed convolution: each input channel has its share of the weights."""
    return prod(entry) * prod(weight) // entry[1]


def product_macs(left: TensorShape, right: TensorShape, output: TensorShape) -> int:
    """Multiply-adds of a matrix product, the left operand transposed or not: (..., M, K) x (..., K, N) is M * N * K for each matrix."""
    if len(right) == 1:  # whose axis the output does not have
        return prod(output) * right[0]
    if len(left) == 1:
        return prod(output) * left[0]
    rows = output[-2] if len(output) > 1 else 1
    return prod(output) * left[-1] * left[-2] // rows if prod(output) else 0
