"""Static INT8 quantisation of a float graph by calibration; see the head of the package.

A product stays in floats if engines have no integer kernel for it, if `keep` names it, or if its own rounding leaves less signal over noise
than `min_sqnr_db`. Neither its name nor its position matters.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter

from muntin.artifact.atomic_files import write_files
from muntin.errors import ExportError
from muntin.graph.calibration import Inputs, Shapes, measure, observe
from muntin.graph.grids import RangeObserver
from muntin.graph.insertion import Plan, ProductGrids, insert
from muntin.graph.onnx_graph import Graph
from muntin.graph.pixel_grid import align_with_pixels
from muntin.graph.products import LONGEST_SOFTMAX, OPAQUE, GraphProduct, find_products, no_integer_form
from muntin.graph.simplify import simplify

OPSET = 20
"""Opset of the written graph; an older model is converted."""
MIN_SQNR_DB = 15.0
"""Signal over noise that a product's own rounding has to leave."""
LOW_COVERAGE = 0.9
"""Share of multiply-adds in integers below which `QuantizedOnnx.notes` names the largest of the others."""
_NAMED = 3
"""Products that a note names."""


@dataclass(frozen=True, kw_only=True)
class ProductRecord:
    """Result of quantisation for one product.

    `name`: of its node. `bits`: of both operands; None: floats. `parameters`: values of its weight. `macs`: multiply-adds for one row of
    the last calibration batch. `sqnr_db`: signal over noise of its output when it alone is rounded. `reason`: why it stays in floats.
    """

    name: str
    kind: str
    bits: int | None
    parameters: int
    macs: int
    sqnr_db: float | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class QuantizedOnnx:
    """A quantised model. `products`: what multiplies in it, in the graph's order. `opaque`: operators inside which nothing is counted."""

    model: onnx.ModelProto
    products: tuple[ProductRecord, ...]
    opaque: tuple[str, ...] = ()

    @property
    def coverage(self) -> float:
        """Share of the multiply-adds in integers, 0 to 1. Products of two activations count."""
        total = sum(record.macs for record in self.products)
        return sum(record.macs for record in self.products if record.bits) / total if total else 1.0

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user: the largest products in floats if less than `LOW_COVERAGE` is in integers; what is not counted."""
        lines = []
        if self.coverage < LOW_COVERAGE:
            floats = sorted((record for record in self.products if not record.bits), key=lambda record: -record.macs)
            total = sum(record.macs for record in self.products)
            reasons = "; ".join(f"{record.name} ({record.macs / total:.0%}): {record.reason}" for record in floats[:_NAMED])
            more = f"; and {len(floats) - _NAMED} more" if len(floats) > _NAMED else ""
            lines.append(f"{self.coverage:.0%} of the multiply-adds are in integers. In floats: {reasons}{more}")
        if self.opaque:
            lines.append(f"{', '.join(self.opaque)}: what these compute stays in floats and is not counted")
        return tuple(lines)

    def save(self, path: Path | str) -> None:
        """Write the ONNX file, whole or not at all. An existing one is replaced. Raises ExportError where it cannot be written."""
        path = Path(path)
        try:
            write_files(path.parent, {path.name: self.model.SerializeToString()})
        except OSError as error:
            raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error

    def __repr__(self) -> str:
        return f"<QuantizedOnnx: {len(self.products)} products, {self.coverage:.1%} of the multiply-adds in integers>"


def quantize(
    model: onnx.ModelProto, calibration: Sequence[Inputs], *, min_sqnr_db: float = MIN_SQNR_DB, keep: Collection[str] = ()
) -> QuantizedOnnx:
    """Return a float model in static W8A8. `calibration`: batches of named inputs. Raises ExportError as `quantize_onnx` does."""
    graph = Graph(_recent(model))
    simplify(graph)
    products = find_products(graph)
    if not products:
        raise ExportError("the model holds no convolution and no matrix product: there is nothing to quantise")
    if unknown := set(keep) - {product.name for product in products}:
        raise ExportError(f"keep names {', '.join(sorted(unknown))}: no node that multiplies is called so in this model")
    reasons = {product.name: "named in keep" for product in products if product.name in keep}
    reasons |= {product.name: reason for product in products if (reason := no_integer_form(graph, product))}
    free = [product for product in products if product.name not in reasons]
    tensors = [name for product in free for name in product.activations.values()]
    ends = [name for product in products for name in (product.node.input[0], product.node.output[0])]
    observers, shapes = observe(graph, tensors, ends, calibration)
    reasons |= {
        product.name: f"a softmax over {shapes[product.node.input[0]][-1]:,} entries, of which integers take {LONGEST_SOFTMAX:,}"
        for product in free
        if product.softmax is not None and shapes[product.node.input[0]][-1] > LONGEST_SOFTMAX
    }
    free = [product for product in free if product.name not in reasons]
    plan = align_with_pixels(graph, _calibrated(free, observers), free, {name: batch[:1] for name, batch in calibration[0].items()})
    sqnr = measure(graph, free, plan, calibration[0])
    reasons |= {
        name: f"integers leave {value:.1f} dB of signal over noise in its output, less than {min_sqnr_db:g}"
        for name, value in sqnr.items()
        if value < min_sqnr_db
    }
    plan = {name: grids for name, grids in plan.items() if name not in reasons}
    rows = next((value.shape[0] for value in calibration[-1].values() if value.ndim), 1)
    records = tuple(_record(graph, product, shapes, rows, sqnr.get(product.name), reasons.get(product.name, "")) for product in products)
    insert(graph, plan)
    graph.drop_unread()
    opaque = tuple(sorted({node.op_type for node in graph.nodes if node.op_type in OPAQUE}))
    return QuantizedOnnx(model=graph.proto(), products=records, opaque=opaque)


def keep_floats(model: onnx.ModelProto, batches: Sequence[Inputs]) -> QuantizedOnnx:
    """Return a float model, simplified as for quantisation, with a record of each product. `batches`: inputs for the multiply-adds."""
    graph = Graph(_recent(model))
    simplify(graph)
    products = find_products(graph)
    _, shapes = observe(graph, (), [name for product in products for name in (product.node.input[0], product.node.output[0])], batches)
    rows = next((value.shape[0] for value in batches[-1].values() if value.ndim), 1)
    records = tuple(_record(graph, product, shapes, rows, None, "not quantised") for product in products)
    graph.drop_unread()
    return QuantizedOnnx(model=graph.proto(), products=records)


def _recent(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model in opset 20 or later."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), OPSET)
    if opset >= OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter's errors have no common class
        cause = " ".join(str(error).split())[:200]
        raise ExportError(f"the model is of opset {opset}, and onnx cannot convert it to {OPSET}: {cause}: export it anew") from error


def _calibrated(products: Sequence[GraphProduct], observers: dict[str, RangeObserver]) -> Plan:
    return {
        product.name: ProductGrids(
            activations={index: observers[name].grid() for index, name in product.activations.items()},
            spread_softmax=product.softmax is not None,
        )
        for product in products
    }


def _record(graph: Graph, product: GraphProduct, shapes: Shapes, rows: int, sqnr_db: float | None, reason: str) -> ProductRecord:
    weight = None if product.weight is None else graph.constants[product.weight]
    left, out = shapes[product.node.input[0]], shapes[product.node.output[0]]
    return ProductRecord(
        name=product.name,
        kind=product.node.op_type,
        bits=None if reason else 8,
        parameters=0 if weight is None else int(np.prod(weight.shape)),
        macs=product.macs(graph, out, left) // rows,
        sqnr_db=sqnr_db,
        reason=reason,
    )
