"""Calibration on the graph: ranges and histograms of activations, and the error of each product when it alone is quantised.

The extremes and the errors are computed inside the graph, as scalars; only the histograms need whole tensors, one batch at a time.
Tensors that this adds to a copy of the graph have a "~" in their names, so that they are none of the graph's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence

import onnx
from onnx import helper

from muntin.errors import ExportError
from muntin.graph.float_run import FloatRun
from muntin.graph.grids import RangeObserver
from muntin.graph.insertion import Grids, insert
from muntin.graph.onnx_graph import Array, Graph
from muntin.graph.products import GraphProduct

Inputs = Mapping[str, Array]
Shapes = dict[str, tuple[int, ...]]
TAPPED_BYTES = 1 << 29
"""Bytes of the tensors that leave the graph at a time for their histograms."""


def observe(graph: Graph, tensors: Iterable[str], batches: Sequence[Inputs]) -> dict[str, RangeObserver]:
    """Return an observer of each tensor over the batches. Raises ExportError where a tensor holds NaN or infinity."""
    names = list(dict.fromkeys(tensors))
    observers = {name: RangeObserver() for name in names}
    reduced = Graph(graph.proto())
    ends = {name: (f"{name}~least", f"{name}~greatest") for name in names}
    for name, outputs in ends.items():
        for kind, output in zip(("ReduceMin", "ReduceMax"), outputs, strict=True):
            reduced.nodes.append(helper.make_node(kind, [name], [output], keepdims=0))
    run = FloatRun(reduced.proto([name for pair in ends.values() for name in pair]))
    for batch in batches:
        values = run(batch)
        for name, (least, greatest) in ends.items():
            try:
                observers[name].see_range(float(values[least]), float(values[greatest]))
            except ValueError as error:
                raise ExportError(f"tensor '{name}' holds NaN or infinity for a calibration batch: give other inputs") from error
    for group in _groups(names, output_shapes(graph, names, batches[-1])):
        tapped = FloatRun(graph.proto(name for name in group if name not in graph.inputs))
        for batch in batches:
            seen = {**tapped(batch), **batch}
            for name in group:
                observers[name].see_values(seen[name])
    return observers


def output_shapes(graph: Graph, tensors: Iterable[str], inputs: Inputs) -> Shapes:
    """Return the shapes of tensors for these inputs.

    The graph's inputs get fixed sizes: ONNX Runtime then folds most shapes into constants and computes none of the tensors behind them.
    """
    shaped = Graph(graph.proto())
    names = {name: f"{name}~shape" for name in dict.fromkeys(tensors)}
    shaped.nodes += [helper.make_node("Shape", [name], [output]) for name, output in names.items()]
    model = shaped.proto(names.values())
    del model.graph.output[: -len(names)]
    for entry in model.graph.input:
        entry.type.tensor_type.shape.CopyFrom(
            onnx.TensorShapeProto(dim=[onnx.TensorShapeProto.Dimension(dim_value=side) for side in inputs[entry.name].shape])
        )
    values = FloatRun(model)(inputs, list(names.values()))
    return {name: tuple(int(side) for side in values[output]) for name, output in names.items()}


def _groups(names: Iterable[str], shapes: Shapes) -> list[list[str]]:
    """Return the tensors in groups of at most `TAPPED_BYTES` in float32, or one larger tensor alone."""
    groups: list[list[str]] = [[]]
    room = TAPPED_BYTES
    for name in names:
        size = 4 * math.prod(shapes[name])
        if groups[-1] and size > room:
            groups.append([])
            room = TAPPED_BYTES
        groups[-1].append(name)
        room -= size
    return groups


def measure(graph: Graph, products: Sequence[GraphProduct], by_product: Grids, batch: Inputs) -> dict[str, float]:
    """Return the signal over noise, in dB, of each quantised product's output when it alone is quantised.

    Each product gets a twin in the same graph that reads the same float inputs in integers; only two sums of squares leave the graph.
    """
    twins = Graph(graph.proto())
    floats = {id(node) for node in twins.nodes}
    quantized = [product for product in products if product.name in by_product]
    for product in quantized:
        node = copy.deepcopy(product.node)
        node.output[0], node.name = f"{product.node.output[0]}~twin", f"{product.name}~twin"
        twins.nodes.append(node)
    twins.reindex()
    renamed = {f"{name}~twin": grids for name, grids in by_product.items()}
    insert(twins, renamed, untouched=floats)
    for product in quantized:
        output = product.node.output[0]
        twins.nodes.append(helper.make_node("Sub", [output, f"{output}~twin"], [f"{output}~noise"]))
        twins.nodes += [
            helper.make_node("ReduceSumSquare", [f"{output}{end}"], [f"{output}{end}~power"], keepdims=0) for end in ("", "~noise")
        ]
    names = [f"{product.node.output[0]}{end}~power" for product in quantized for end in ("", "~noise")]
    values = FloatRun(twins.proto(names), exact=True)(batch, names)
    return {
        product.name: _decibel(*(float(values[f"{product.node.output[0]}{end}~power"]) for end in ("", "~noise"))) for product in quantized
    }


def _decibel(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else float("inf")
