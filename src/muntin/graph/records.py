"""The result of a quantisation: the model, and a record of each of its products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from muntin.artifact.atomic_files import write_files
from muntin.errors import ExportError
from muntin.graph.calibration import Shapes
from muntin.graph.insertion import Grids
from muntin.graph.onnx_graph import Graph
from muntin.graph.passes.storage import is_half
from muntin.graph.products import GraphProduct

LOW_COVERAGE = 0.9
"""Share of multiply-adds in integers below which `QuantizedOnnx.notes` names the largest of the others."""
_NAMED = 3
"""Products that a note names."""


@dataclass(frozen=True, kw_only=True)
class ProductRecord:
    """Result of quantisation for one product.

    `name`: of its node. `bits`: of its activations; None: floats. `weight_bits`: of its weight, or of the second operand. `parameters`:
    values of its weight and bias. `macs`: multiply-adds for the example. `sqnr_db`: signal over noise of its output when it alone is
    rounded. `reason`: why it stays in floats.
    """

    name: str
    kind: str
    bits: int | None
    weight_bits: int
    parameters: int
    macs: int
    sqnr_db: float | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class QuantizedOnnx:
    """A quantised model. `products`: what multiplies in it, in the graph's order. `opaque`: operators inside which nothing is counted.
    `reduced`: why weights have 7 bits instead of 8, or empty."""

    model: onnx.ModelProto
    products: tuple[ProductRecord, ...]
    opaque: tuple[str, ...] = ()
    reduced: str = ""

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
        if self.reduced:
            lines.append(self.reduced)
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


def product_records(
    graph: Graph,
    products: Sequence[GraphProduct],
    grids_by_product: Grids,
    reasons: Mapping[str, str],
    shapes: Shapes,
    sqnr: Mapping[str, float],
) -> tuple[ProductRecord, ...]:
    """Return a record of each product. `shapes`: of the first operands and the outputs. A weight counts at its first product only."""
    counted: set[str] = set()
    records = []
    for product in products:
        grids = grids_by_product.get(product.name)
        values = [graph.constants[name] for name in product.parameters(graph) if name not in counted]
        counted.update(product.parameters(graph))
        weight = graph.constants.get(product.weight or "")
        float_bits = 32 if weight is None else 16 if is_half(weight) else 8 * weight.itemsize
        records.append(
            ProductRecord(
                name=product.name,
                kind=product.node.op_type,
                bits=None if grids is None else 8,
                weight_bits=float_bits if grids is None else grids.weight_bits,
                parameters=sum(math.prod(value.shape) for value in values),
                macs=product.macs(graph, shapes[product.node.output[0]], shapes[product.node.input[0]]),
                sqnr_db=sqnr.get(product.name),
                reason="" if grids is not None else reasons.get(product.name, ""),
            )
        )
    return tuple(records)
