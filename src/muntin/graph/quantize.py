"""Static quantisation of a float graph: to INT8 by calibration, or with trained scales; see the head of the package.

A product stays in floats if engines have no integer kernel for it, if `keep` names it, or if its own rounding leaves less signal over noise
than `min_sqnr_db`. Neither its name nor its position matters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx
import onnx.version_converter

from muntin.errors import ExportError
from muntin.graph.calibration import Inputs, measure, observe, output_shapes
from muntin.graph.grids import RangeObserver
from muntin.graph.insertion import Grids, ProductGrids, insert
from muntin.graph.onnx_graph import Graph
from muntin.graph.passes.biases import correct_biases
from muntin.graph.passes.concats import clip_before_signed_quantizers
from muntin.graph.passes.pixel_grid import align_with_pixels
from muntin.graph.passes.simplify import simplify
from muntin.graph.passes.smoothing import smooth
from muntin.graph.passes.storage import quantize_tables, round_to_half
from muntin.graph.products import OPAQUE, GraphProduct, find_products, no_integer_form
from muntin.graph.records import QuantizedOnnx, product_records
from muntin.runtime.verification.exactness import sums_saturate

OPSET = 20
"""Opset of the written graph; an older model is converted."""
MIN_SQNR_DB = 15.0
"""Signal over noise that a product's own rounding has to leave."""
SATURATES = "on this CPU, without VNNI, sums of 8-bit products saturate in 16 bits"
"""Reason of products of two activations in floats, and of 7 bits for weights (`sums_saturate`)."""
NOT_PREPARED = "it is not quantised in the model that was exported"
"""Reason of products in floats beside those whose scales were trained."""


@dataclass(frozen=True, kw_only=True)
class GraphQuantization:
    """A simplified float graph, and how its products are quantised. Made by `calibrate` or `with_grids`.

    `reasons`: why a product is not quantised, by its name. `sqnr`: signal over noise in dB where it was measured. `example`: inputs for
    which multiply-adds are counted. `half`: True to round weights that are not quantised to FP16. `calibration`: batches on which biases
    are corrected, empty for none; `trained`: products whose biases stay.
    """

    graph: Graph
    grids: Grids
    reasons: Mapping[str, str]
    sqnr: Mapping[str, float]
    example: Inputs
    half: bool
    calibration: Sequence[Inputs] = ()
    trained: Collection[str] = ()

    def without(self, reasons: Mapping[str, str]) -> GraphQuantization:
        """Return it with further products in floats, by name, with the reasons."""
        grids = {name: value for name, value in self.grids.items() if name not in reasons}
        return replace(self, grids=grids, reasons={**self.reasons, **reasons})

    def quantized(self) -> QuantizedOnnx:
        """Return the model with the quantisers, and a record of each product. Costs the pass of `correct_biases`."""
        graph = Graph(self.graph.proto())
        if self.calibration:
            correct_biases(graph, self.grids, self.calibration, trained=self.trained)
        products = find_products(graph)
        ends = [name for product in products for name in (product.node.input[0], product.node.output[0])]
        shapes = output_shapes(graph, ends, self.example)
        if self.half:
            quantize_tables(graph)
            round_to_half(graph, spared=[product.weight for product in products if product.name in self.grids and product.weight])
        records = product_records(graph, products, self.grids, self.reasons, shapes, self.sqnr)
        insert(graph, self.grids)
        clip_before_signed_quantizers(graph)
        graph.drop_unread()
        opaque = tuple(sorted({node.op_type for node in graph.nodes if node.op_type in OPAQUE}))
        reduced = f"{SATURATES}: weights have 7 bits, products of two activations stay in floats" if self.grids and sums_saturate() else ""
        return QuantizedOnnx(model=graph.proto(), products=records, opaque=opaque, reduced=reduced)


def calibrate(
    model: onnx.ModelProto,
    calibration: Sequence[Inputs],
    *,
    min_sqnr_db: float = MIN_SQNR_DB,
    keep: Collection[str] = (),
    example: Inputs | None = None,
    half: bool = False,
    given: Grids | None = None,
    floats: Mapping[str, str] | None = None,
) -> GraphQuantization:
    """Return a float model, quantised to static W8A8.

    `calibration`: batches of named inputs. `keep`: names of products, or of modules around them. `example`: by default one row of the last
    batch. `given`: the weights' bits and scales of products or layers, by name, and the grids of their activations if these are trained.
    `floats`: layers that stay in floats, by name, with the reasons. Raises ExportError as `quantize_onnx` does.
    """
    graph = simplified(model)
    fixed = _of_products(given or {}, find_products(graph))
    smooth(graph, calibration, rounded=[name for name, grids in fixed.items() if grids.activations or grids.weight_bits < 8])
    products = find_products(graph)
    if not products:
        raise ExportError("the model holds no convolution and no matrix product: there is nothing to quantise")
    _check_kept(keep, products)
    reasons = {product.name: "named in keep" for product in products if is_kept(product.name, keep)}
    reasons |= {
        product.name: reason for product in products if product.name not in fixed and (reason := (floats or {}).get(layer_of(product)))
    }
    reasons |= {product.name: reason for product in products if (reason := no_integer_form(graph, product) or _saturation(product))}
    free = [product for product in products if product.name not in reasons]
    observers = observe(graph, [name for product in free for name in product.activations.values()], calibration)
    grids = align_with_pixels(graph, _calibrated(free, observers, fixed), free, first_row(calibration[0]))
    sqnr = measure(graph, free, grids, calibration[0])
    noisy = {
        name: f"integers leave {value:.1f} dB of signal over noise in its output, less than {min_sqnr_db:g}"
        for name, value in sqnr.items()
        if value < min_sqnr_db
    }
    grids = {name: value for name, value in grids.items() if name not in noisy}
    return GraphQuantization(
        graph=graph,
        grids=grids,
        reasons=reasons | noisy,
        sqnr=sqnr,
        example=example or first_row(calibration[-1]),
        half=half,
        calibration=calibration,
        trained=[name for name, value in fixed.items() if value.activations],
    )


def with_grids(model: onnx.ModelProto, trained: Grids, reasons: Mapping[str, str], *, example: Inputs, half: bool) -> GraphQuantization:
    """Return a float model with `trained` scales; without any, in floats.

    A product that a layer with a weight computes once more ("layer/2") has the layer's grids.
    """
    graph = simplified(model)
    products = find_products(graph)
    used = align_with_pixels(graph, _of_products(trained, products), products, example)
    others = {product.name: NOT_PREPARED for product in products if used and product.name not in used}
    if used and sums_saturate():
        others |= {product.name: reason for product in products if product.name in used and (reason := _saturation(product))}
        used = {name: value.in_seven_bits() for name, value in used.items() if name not in others}
    return GraphQuantization(graph=graph, grids=used, reasons={**others, **reasons}, sqnr={}, example=example, half=half)


def _of_products(by_layer: Grids, products: Sequence[GraphProduct]) -> dict[str, ProductGrids]:
    """Return the grids of layers by the names of their products."""
    found = {product.name: by_layer.get(product.name) or by_layer.get(layer_of(product)) for product in products}
    return {name: grids for name, grids in found.items() if grids is not None}


def layer_of(product: GraphProduct) -> str:
    """Return the name of a product's layer: a further product of the same weight is called "layer/2"."""
    return product.name.rpartition("/")[0] or product.name if product.weight is not None else product.name


def is_kept(name: str, keep: Collection[str]) -> bool:
    """Return True if `keep` names a product, the layer of a further product, or a module around it."""
    return any(name == entry or name.startswith((f"{entry}.", f"{entry}/")) for entry in keep)


def first_row(batch: Inputs) -> Inputs:
    """Return the first row of each input of a batch; inputs without rows as they are."""
    return {name: value[:1] if value.ndim else value for name, value in batch.items()}


def simplified(model: onnx.ModelProto) -> Graph:
    """Return a model's graph in the form that the quantiser reads. Raises ExportError for an opset that cannot be converted."""
    graph = Graph(_recent(model))
    simplify(graph)
    return graph


def _check_kept(keep: Collection[str], products: Sequence[GraphProduct]) -> None:
    if unknown := [entry for entry in keep if not any(is_kept(product.name, (entry,)) for product in products)]:
        names = ", ".join(product.name for product in products[:6])
        more = ", ..." if len(products) > 6 else ""
        raise ExportError(f"keep names {', '.join(unknown)}: no node that multiplies is called so in this model: it has {names}{more}")


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


def _calibrated(products: Sequence[GraphProduct], observers: Mapping[str, RangeObserver], fixed: Grids) -> Grids:
    """Return the grids of products; `fixed`: those that are given, whose activations may be left to calibration."""
    grids = {}
    for product in products:
        given = fixed.get(product.name)
        own = given or ProductGrids(activations={}, spread_softmax=product.softmax is not None)
        own = own.in_seven_bits() if sums_saturate() else own
        activations = own.activations or {
            index: observers[name].grid(symmetric=product.weight is None) for index, name in product.activations.items()
        }
        grids[product.name] = replace(own, activations=activations)
    return grids


def _saturation(product: GraphProduct) -> str | None:
    """Return why the sums of a product of two activations would be wrong on this CPU; None if they are right."""
    return SATURATES if product.weight is None and sums_saturate() else None
