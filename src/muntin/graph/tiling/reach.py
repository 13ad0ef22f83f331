"""The reach (receptive field) of a part of a graph: it is run on marks instead of values.

Some cells of the inputs are marked (1), others not (0). Each operation is replaced by one that marks every answer which depends on a
marked value: products by sums, means by sums, functions of one value by nothing. Operations that move values stay as they are. The answers
that are not marked depend on the unmarked cells alone, whatever the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from muntin.artifact.tile_plan import MapTensor
from muntin.errors import ExportError
from muntin.graph.calibration import output_shapes
from muntin.graph.float_run import FloatRun
from muntin.graph.onnx_graph import Array, Graph, attributes
from muntin.runtime.exact_tiles.grid import PixelSpan

_MOVES = frozenset({
    "Reshape", "Transpose", "Slice", "Concat", "Split", "Squeeze", "Unsqueeze", "Expand", "Tile", "Gather", "DepthToSpace",
    "SpaceToDepth", "Flatten", "Identity",
})  # fmt: skip
_ALONE = frozenset({
    "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Mish", "Tanh", "Erf", "Gelu", "Softplus",
    "Softsign", "Exp", "Log", "Sqrt", "Reciprocal", "Neg", "Abs", "Sign", "Floor", "Ceil", "Round", "Clip", "Cast", "QuantizeLinear",
    "DequantizeLinear", "Not", "Sin", "Cos", "ThresholdedRelu",
})  # fmt: skip
_JOINED = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "Where", "And", "Or", "Less", "Greater", "Equal", "Mod"}
)
_REDUCED = frozenset({"ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare", "ReduceL1", "ReduceProd"})
LARGEST = 2048
"""Side in pixels beyond which a value is taken to depend on the whole picture: the marks of a longer one take gigabytes and minutes."""
MOST_BYTES = 1 << 30
"""Largest marks of a tensor: pairs of all tokens of a tile are more."""


class EndlessReachError(ExportError):
    """Values depend on the whole picture, or through an operation that has no form for marks."""


def halo(
    cut: Callable[[tuple[int, int]], onnx.ModelProto], maps: Iterable[MapTensor], outputs: Iterable[MapTensor], step: int
) -> PixelSpan:
    """Pixels of surroundings, (before, after), that the answers of a part depend on, in multiples of `step`.

    `cut`: gives the part for a tile of some pixels. Raises EndlessReachError.
    """
    maps, outputs = list(maps), list(outputs)
    length = -(-256 // step) * step
    while length <= LARGEST:
        side = length + 2 * step
        spans = _clean(cut((side, side)), maps, outputs, side, (step, step + length))
        if spans is not None:
            before = max(0, *(low - step for low, _ in spans))
            after = max(0, *(step + length - high for _, high in spans))
            return -(-before // step) * step, -(-after // step) * step
        length *= 2
    raise EndlessReachError(f"values of {', '.join(tensor.name for tensor in outputs)[:200]} depend on more than {LARGEST} pixels around")


def _clean(part: onnx.ModelProto, maps: list[MapTensor], outputs: list[MapTensor], side: int, block: PixelSpan) -> list[PixelSpan] | None:
    """For each output, rows and columns, the pixels that depend on those of the block alone; None where there are none."""
    marked = marks(part, {tensor.name for tensor in maps})
    inputs: dict[str, Array] = {}
    kinds = {entry.name: entry.type.tensor_type for entry in marked.graph.input}
    for name, kind in kinds.items():
        shape = tuple(dim.dim_value for dim in kind.shape.dim)
        inputs[name] = np.zeros(shape, np.float32)
    for tensor in maps:
        plane = np.ones((tensor.cells(side), tensor.cells(side)), np.float32)
        own = slice(*(pixels * tensor.scale // tensor.stride for pixels in block))
        plane[own, own] = 0
        inputs[tensor.name] = _in_layout(plane, tensor)
    shapes = output_shapes(Graph(marked), [name for node in marked.graph.node for name in node.output], inputs)
    largest = max(shapes, key=lambda name: math.prod(shapes[name]))
    if 4 * math.prod(shapes[largest]) > MOST_BYTES:
        raise EndlessReachError(f"'{largest}' has the shape {shapes[largest]} for a tile of {side} pixels, too much for a plan")
    answers = FloatRun(marked, exact=True)(inputs)
    spans = []
    for tensor in outputs:
        plane = _plane(answers[tensor.name], tensor, side)
        middle = sum(block) // 2 * tensor.scale // tensor.stride
        for line in (plane[:, middle], plane[middle]):
            if line[middle]:
                return None
            dirty = np.flatnonzero(line)
            low, high = dirty[dirty < middle].max(initial=-1) + 1, dirty[dirty > middle].min(initial=len(line))
            spans.append((-(-int(low) * tensor.stride // tensor.scale), int(high) * tensor.stride // tensor.scale))
        rows, columns = (slice(-(-low * tensor.scale // tensor.stride), high * tensor.scale // tensor.stride) for low, high in spans[-2:])
        if plane[rows, columns].any():
            raise EndlessReachError(f"what '{tensor.name}' depends on is no rectangle")
    return spans


def _in_layout(plane: Array, tensor: MapTensor) -> Array:
    if (window := tensor.window) is not None:
        h, w = plane.shape
        cells = plane.reshape(h // window, window, w // window, window).transpose(0, 2, 1, 3).reshape(-1, window**2, 1)
        return np.repeat(cells, tensor.channels, axis=2)
    if tensor.layout == "channels first":
        return np.repeat(plane[None, None], tensor.channels, axis=1)
    cells = np.repeat(plane[None, :, :, None], tensor.channels, axis=3)
    return cells.reshape(1, -1, tensor.channels) if tensor.layout == "tokens" else cells


def _plane(answer: Array, tensor: MapTensor, side: int) -> Array:
    """The marks of an answer by cell, (h, w)."""
    cells = tensor.cells(side)
    plane: Array
    if (window := tensor.window) is not None:
        marks_S = answer.max(axis=2).reshape(cells // window, cells // window, window, window)
        plane = marks_S.transpose(0, 2, 1, 3).reshape(cells, cells)
        return plane
    plane = answer.max(axis=1)[0] if tensor.layout == "channels first" else answer.max(axis=-1).reshape(cells, cells)
    return plane


def marks(part: onnx.ModelProto, maps: set[str]) -> onnx.ModelProto:
    """A part as a graph of marks; its inputs become float32. Raises EndlessReachError for an operation without a form."""
    builder = _Marks(maps, {node.name: numpy_helper.to_array(node) for node in part.graph.initializer})
    for node in part.graph.node:
        builder.add(node)
    marked = onnx.ModelProto()
    marked.CopyFrom(part)
    del marked.graph.node[:]
    marked.graph.node.extend(builder.nodes)
    for entry in marked.graph.input:
        entry.type.tensor_type.elem_type = TensorProto.FLOAT
    return marked


class _Marks:
    """Builds the nodes of a graph of marks."""

    def __init__(self, maps: set[str], constants: Mapping[str, Array]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.data = set(maps)
        self._constants = constants
        self._number = 0

    def add(self, node: onnx.NodeProto) -> None:
        """Add the form of a node."""
        given = [name for name in node.input if name in self.data]
        kind = node.op_type
        if not given or kind in ("Shape", "Size"):
            self.nodes.append(node)
            return
        self.data.update(node.output)
        output = node.output[0]
        if kind == "Pad":
            self._pad(node, output)
        elif kind in _MOVES:
            self.nodes.append(node)
        elif kind in _ALONE or kind == "Dropout":
            self._emit("Identity", [node.input[0]], output)
        elif kind in _JOINED:
            self._join(node, output)
        elif kind == "ConvTranspose":
            self._sign(self._emit(kind, [node.input[0], self._ones(node.input[1])], None, **attributes(node)), output)
        elif kind in ("Conv", "AveragePool", "MaxPool"):
            self._kernel(node, output)
        elif kind in ("MatMul", "Gemm"):
            self._product(node, output)
        elif kind in _REDUCED:
            self._sign(self._emit("ReduceSum", self._axes(node), None, keepdims=attributes(node).get("keepdims", 1)), output)
        elif kind == "GlobalAveragePool":
            self._sign(self._emit("GlobalAveragePool", [node.input[0]], None), output)
        elif kind in ("Softmax", "LogSoftmax"):
            self._over(node.input[0], [attributes(node).get("axis", -1)], output)
        elif kind == "LayerNormalization" and (axis := attributes(node).get("axis", -1)) < 0:
            self._over(node.input[0], list(range(axis, 0)), output)
        elif kind == "Resize" and attributes(node).get("mode", b"nearest") in (b"nearest", b"linear"):
            self._sign(self._emit(kind, list(node.input), None, **attributes(node)), output)
        else:
            raise EndlessReachError(f"how far '{node.name or output}' ({kind}) reaches is not known")

    def _emit(self, kind: str, inputs: list[str], output: str | None, **options: object) -> str:
        name = output or self._new()
        self.nodes.append(helper.make_node(kind, inputs, [name], **options))
        return name

    def _new(self) -> str:
        self._number += 1
        return f"marks~{self._number}"

    def _sign(self, tensor: str, output: str) -> None:
        self._emit("Sign", [tensor], output)

    def _filled(self, tensor: str, value: float) -> str:
        shape = self._emit("Shape", [tensor], None)
        return self._emit("ConstantOfShape", [shape], None, value=numpy_helper.from_array(np.array([value], np.float32)))

    def _ones(self, tensor: str) -> str:
        return self._filled(tensor, 1.0)

    def _join(self, node: onnx.NodeProto, output: str) -> None:
        parts = [name if name in self.data else self._filled(name, 0.0) for name in node.input if name]
        total = parts[0]
        for part in parts[1:]:
            total = self._emit("Add", [total, part], None)
        self._sign(total, output)

    def _kernel(self, node: onnx.NodeProto, output: str) -> None:
        """Add a kernel. Pixels beyond a tile count as marked: they are padding at the picture's edges only."""
        options = attributes(node)
        if options.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or options.pop("ceil_mode", 0):
            raise EndlessReachError(f"how far '{node.name or output}' ({node.op_type}) reaches is not known")
        given, pads = node.input[0], options.pop("pads", [])
        if any(pads):
            half = len(pads) // 2
            sides = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
            given = self._emit("Pad", [given, self._constant(sides), self._constant(np.array(1, np.float32))], None)
        weights = [self._ones(node.input[1])] if node.op_type == "Conv" else []
        self._sign(self._emit(node.op_type, [given, *weights], None, **options), output)

    def _pad(self, node: onnx.NodeProto, output: str) -> None:
        options = attributes(node)
        inputs = list(node.input)
        if options.get("mode", b"constant") == b"constant":
            axes = inputs[3:]
            inputs = [*inputs[:2], self._constant(np.array(1, np.float32)), *axes]
        self._emit("Pad", inputs, output, **options)

    def _constant(self, value: Array) -> str:
        return self._emit("Constant", [], None, value=numpy_helper.from_array(value))

    def _product(self, node: onnx.NodeProto, output: str) -> None:
        left, right = node.input[:2]
        options = {key: value for key, value in attributes(node).items() if key in ("transA", "transB")}
        terms = []
        if left in self.data:
            terms.append(self._emit(node.op_type, [left, self._ones(right)], None, **options))
        if right in self.data:
            terms.append(self._emit(node.op_type, [self._ones(left), right], None, **options))
        total = terms[0] if len(terms) == 1 else self._emit("Add", terms, None)
        self._sign(total, output)

    def _axes(self, node: onnx.NodeProto) -> list[str]:
        axes = attributes(node).get("axes")
        if axes is None:
            return list(node.input)
        return [node.input[0], self._constant(np.array(axes, np.int64))]

    def _over(self, tensor: str, axes: list[int], output: str) -> None:
        """Every entry along some axes depends on all of them."""
        constant = self._constant(np.array(axes, np.int64))
        total = self._emit("ReduceSum", [tensor, constant], None, keepdims=1)
        self._sign(self._emit("Add", [tensor, total], None), output)
