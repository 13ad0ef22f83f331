"""Quantisation-aware training: layers that compute in float what their integer forms will compute, on learned grids.

    model -> prepare_qat (fold, calibrate, put QAT layers in place) -> train -> set_bits for layers that need more -> freeze -> integers

A QAT layer keeps its float weight and rounds it, and its inputs, in every forward pass; a product rounds both operands. `freeze` makes a
quantised layer of the same grids, so the deployed model is the trained one.

Axes: O output and I input channels of a weight.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.compression.history import remember
from muntin.compression.quantization.fake_quantization import along, round_to_grid, round_to_half, sqnr_db, weight_limit, weight_scale
from muntin.compression.quantization.preparation import prepare
from muntin.compression.quantization.quantized_layers import (
    InputGrid,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedOperation,
    QuantizedProduct,
    QuantizedSoftmaxProduct,
    already_quantized,
    exponentials,
    keep_geometry,
    plain_layer,
    quantized_form,
    quantized_operations,
    uncalibrated,
)
from muntin.compression.quantization.widths import WidthOf, check_bits, requested_widths
from muntin.compression.rewrite import EVERY, is_kept, keepable, left_out, named, others, out_of_reach, replace
from muntin.errors import MuntinError
from muntin.graph.grids import SHARES, ByteGrid, usable
from muntin.layers import Product, SoftmaxProduct
from muntin.models.compression_record import Change, OperationRecord, TrainedRecord
from muntin.models.eager import ModelInputs, check_eager, inputs_of, watch_inputs


class LearnedGrid(nn.Module):
    """Rounds a tensor to an 8-bit grid whose scale is learned. The zero point stays as calibrated."""

    def __init__(self, grid: ByteGrid) -> None:
        super().__init__()
        self.unsigned, self.zero_point = grid.unsigned, grid.zero_point
        self.low, self.high = grid.levels
        self.log_scale = nn.Parameter(torch.tensor(grid.scale, dtype=torch.float32).log())

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # the type of the next product
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return round_to_grid(x, self.log_scale.exp(), self.low, self.high)

    def frozen(self) -> ByteGrid:
        """The grid with the current scale."""
        scale = usable(float(self.log_scale.detach().exp()))
        return ByteGrid(scale=scale, unsigned=self.unsigned, zero_point=self.zero_point)


class _LearnedWeight(nn.Module):
    """Base of QATLinear and QATConv2d: a float weight, a learned scale for each output channel, a grid for the inputs or None."""

    layer: nn.Linear | nn.Conv2d

    def __init__(self, layer: nn.Linear | nn.Conv2d, grid: ByteGrid | None, bits: int, scale: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.input = nn.Identity() if grid is None else LearnedGrid(grid)
        self.bits = bits
        self.groups = getattr(layer, "groups", 1)
        keep_geometry(self, layer)
        self.log_scale = nn.Parameter((weight_scale(layer.weight, 0, bits) if scale is None else scale).log())
        self.shape_of = [copy.deepcopy(layer).to("meta")]  # in a list, so that it is no submodule

    def set_bits(self, bits: int) -> None:
        """Change the width. A wider one starts from the rounded weight, on a grid that holds its values exactly."""
        with torch.no_grad():
            self.weight.copy_(self.rounded())
            finer = weight_limit(bits) // weight_limit(self.bits)
            self.log_scale.copy_(self.log_scale - math.log(finer) if finer else weight_scale(self.weight, 0, bits).log())
            self.bits = bits

    def rounded(self) -> Tensor:
        """The weight on its grid, with gradients for the weight and the scales."""
        limit = weight_limit(self.bits)
        scale = along(self.log_scale.exp(), self.weight.ndim, 0)
        return round_to_grid(self.weight.to(torch.float32), scale, -limit, limit)

    def terms(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The rounded weight and the bias in `dtype`, that of the input."""
        return self.rounded().to(dtype), None if self.bias is None else self.bias.to(dtype)

    def plain(self) -> nn.Linear | nn.Conv2d:
        """The float layer with this weight."""
        layer = copy.deepcopy(self.shape_of[0])
        layer.weight, layer.bias = self.weight, self.bias
        return layer

    def frozen(self) -> QuantizedLayer:
        """The integer form."""
        grid = self.input.frozen() if isinstance(self.input, LearnedGrid) else None
        return quantized_form(self.plain(), grid, bits=self.bits, scale=self.log_scale.exp())


class QATLinear(_LearnedWeight):
    """A Linear in quantisation-aware training, `(..., I) -> (..., O)`."""

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's parameter name: models may call it by keyword
        x = self.input(input)
        return F.linear(x, *self.terms(x.dtype))


class QATConv2d(_LearnedWeight):
    """A Conv2d (groups and depthwise included) in quantisation-aware training; zero padding."""

    def forward(self, input: Tensor) -> Tensor:
        like = cast(nn.Conv2d, self.shape_of[0])
        x = self.input(input)
        return F.conv2d(x, *self.terms(x.dtype), like.stride, like.padding, like.dilation, like.groups)


class QATProduct(nn.Module):
    """A product of two activations in quantisation-aware training."""

    def __init__(self, left: ByteGrid, right: ByteGrid) -> None:
        super().__init__()
        self.left, self.right = LearnedGrid(left), LearnedGrid(right)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(self.left(a), self.right(b))

    def frozen(self) -> QuantizedProduct:
        """The integer form."""
        return QuantizedProduct(self.left.frozen(), self.right.frozen())


class QATSoftmaxProduct(nn.Module):
    """softmax(logits)·values in quantisation-aware training; see `QuantizedSoftmaxProduct`."""

    def __init__(self, values: ByteGrid) -> None:
        super().__init__()
        self.values = LearnedGrid(values)

    def forward(self, logits: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        scale = torch.tensor(SHARES.scale, device=logits.device)
        shares = round_to_grid(exponentials(logits, bias), scale, 0, 255)
        values = self.values(values)
        mixed: Tensor = torch.matmul(shares.to(values.dtype), values) / shares.sum(-1, keepdim=True)
        return mixed.to(values.dtype)

    def frozen(self) -> QuantizedSoftmaxProduct:
        """The integer form."""
        return QuantizedSoftmaxProduct(self.values.frozen())


QATOperation = QATLinear | QATConv2d | QATProduct | QATSoftmaxProduct
_OPERATIONS = (QATLinear, QATConv2d, QATProduct, QATSoftmaxProduct)
_WEIGHTED = (QATLinear, QATConv2d)
FLOAT = 32
"""Bits of a layer that is not quantised."""


def prepare_qat(
    model: nn.Module,
    calibration: Iterable[ModelInputs],
    *,
    bits: int | Mapping[str, int] = 4,
    only: Sequence[str] = EVERY,
    keep: Sequence[str] = (),
) -> list[Change]:
    """Put a model into W`bits`A8 quantisation-aware training, in place.

    Linear, Conv2d and depthwise convolutions get weights of `bits` bits (2-8) per output channel and 8-bit inputs; the products of muntin's
    attention get two 8-bit operands. `bits` by name or pattern are as in `quantize`: the last that fits counts, other layers get 8. Norms
    and gates are folded first. `calibration`: batches of training inputs, as in `quantize`; activation grids start at the least squared
    error over them. `only`, `keep`: names or patterns of the layers and products to take, and
    to leave in float. Costs two forward passes over the batches and three of one row.

    A second run with the same bits changes nothing, and one of other layers may have other bits. Raises `MuntinError` like `prepare`, for
    layers that are prepared with other bits. Quantised layers go on from their values, on their grids if `bits` are theirs.
    """
    if not isinstance(bits, Mapping):
        check_bits(bits)
    check_eager(model)
    width_of = requested_widths(bits, {**keepable(model), **quantized_operations(model), **qat_operations(model)})
    thawed, scales = _thaw(model, width_of, only, keep)
    before = qat_operations(model)
    taken = {name: one for name, one in before.items() if is_kept(name, only) and not is_kept(name, keep)}
    other = {name: one.bits for name, one in taken.items() if isinstance(one, QATLinear | QATConv2d) and one.bits != width_of(name)}
    if other:
        name, width = next(iter(other.items()))
        raise MuntinError(
            f"bits={width_of(name)}: '{name}' is in quantisation-aware training with {width} bits ({len(other)} layers are): "
            f"muntin.compression.set_bits(model, {{'{name}': {width_of(name)}}}) goes on from its rounded weights; or begin with the float "
            "model"
        )
    ready = prepare(model, calibration, only=only, keep=keep, done=before, products=(Product, SoftmaxProduct))
    already = [
        Change(layer=name, pass_="qat", done="kept", reason=f"already {_form(one)}") for name, one in before.items() if name not in thawed
    ]
    changes = [*ready.changes, *already, *(Change(layer=name, pass_="qat", done=_form(before[name])) for name in thawed)]
    for name, operation in ready.operations.items():
        if name in ready.reasons:
            changes.append(Change(layer=name, pass_="qat", done="kept", reason=ready.reasons[name]))
            continue
        symmetric = isinstance(operation, Product | SoftmaxProduct)
        grids = [observer.grid(symmetric=symmetric) if observer.seen else SHARES for observer in ready.observed[name]]
        form = _qat_form(operation, grids, width_of(name), scales.get(name))
        replace(model, name, form)
        changes.append(Change(layer=name, pass_="qat", done=_form(form)))
    return remember(model, changes + out_of_reach(model, "qat", "integer form"))


def _thaw(model: nn.Module, width_of: WidthOf, only: Sequence[str], keep: Sequence[str]) -> tuple[list[str], dict[str, Tensor]]:
    """Put quantised operations into quantisation-aware training with their values and grids, in place; return their names.

    Layers whose inputs have no grid become float layers, to be calibrated; the scales of those with the requested bits are returned.
    """
    operations = quantized_operations(model)
    unnamed = left_out({**keepable(model), **operations, **qat_operations(model)}, only, keep)
    bare, thawed, scales = uncalibrated(model), list[str](), dict[str, Tensor]()
    for name, form in operations.items():
        if name in unnamed:
            continue
        if name in bare:
            assert isinstance(form, QuantizedLinear | QuantizedConv2d)
            replace(model, name, plain_layer(form))
            if form.bits == width_of(name):
                scales[name] = form.weight_scale
        else:
            replace(model, name, _thawed(form, width_of(name)))
            thawed.append(name)
    return thawed, scales


def _thawed(form: QuantizedOperation, bits: int) -> QATOperation:
    if isinstance(form, QuantizedProduct):
        return QATProduct(form.left.grid(), form.right.grid())
    if isinstance(form, QuantizedSoftmaxProduct):
        return QATSoftmaxProduct(form.values.grid())
    assert isinstance(form.input, InputGrid)
    return _qat_form(plain_layer(form), [form.input.grid()], bits, form.weight_scale if form.bits == bits else None)


def _form(operation: QATOperation) -> str:
    return f"W{operation.bits}A8" if isinstance(operation, QATLinear | QATConv2d) else "A8"


def _qat_form(operation: nn.Module, grids: Sequence[ByteGrid], bits: int, scale: Tensor | None = None) -> QATOperation:
    """The form of an operation in quantisation-aware training.

    `grids`: of its inputs; of a SoftmaxProduct the last is the values'. `scale`: of its weight, `(O,)`; by default chosen from its values.
    """
    if isinstance(operation, nn.Conv2d):
        return QATConv2d(operation, grids[0], bits, scale)
    if isinstance(operation, nn.Linear):
        return QATLinear(operation, grids[0], bits, scale)
    return QATProduct(grids[0], grids[1]) if isinstance(operation, Product) else QATSoftmaxProduct(grids[-1])


def qat_operations(model: nn.Module) -> dict[str, QATOperation]:
    """The operations in quantisation-aware training, by dotted name."""
    return dict(named(model, *_OPERATIONS))


def check_frozen(model: nn.Module) -> None:
    """Raise `MuntinError` for a model in quantisation-aware training, whose layers other passes do not know."""
    if operations := qat_operations(model):
        raise MuntinError(
            f"{next(iter(operations)) or 'the model'} is in quantisation-aware training ({len(operations)} operations are): call "
            "freeze(model), that makes integers of them, or begin with the model as it was before prepare_qat"
        )


def set_bits(model: nn.Module, bits: Mapping[str, int]) -> None:
    """Change the widths of layers: 2-8 with 8-bit inputs, or `FLOAT` for the plain layer.

    A layer continues from its rounded weight, to which the network around it is adapted.
    """
    for name, width in bits.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QATLinear | QATConv2d)
        if width == FLOAT:
            with torch.no_grad():
                layer.weight.copy_(layer.rounded())
            replace(model, name, layer.plain())
        elif width != layer.bits:
            layer.set_bits(width)


def qat_structure(model: nn.Module) -> dict[str, TrainedRecord]:
    """The operations in quantisation-aware training, by dotted name, for a checkpoint's record."""
    structure = {}
    for name, operation in qat_operations(model).items():
        grids = [module for module in operation.modules() if isinstance(module, LearnedGrid)]
        bits = operation.bits if isinstance(operation, QATLinear | QATConv2d) else 0
        zero_points = tuple(grid.zero_point for grid in grids)
        structure[name] = TrainedRecord(
            bits=bits, unsigned=tuple(grid.unsigned for grid in grids), zero_points=zero_points if any(zero_points) else ()
        )
    return structure


def apply_qat(model: nn.Module, structure: Mapping[str, OperationRecord]) -> None:
    """Put the operations of `structure` into quantisation-aware training; load the weights and scales of a checkpoint next.

    Raises `MuntinError` for a name that is no such operation of the model, before anything is changed.
    """
    operations = keepable(model)
    for name, record in structure.items():
        grids = 2 if isinstance(operations.get(name), Product) else 1
        if name not in operations or len(record.unsigned) != grids:
            what = "is no Linear, Conv2d or product of the model" if name not in operations else f"has {grids} activation grids"
            raise MuntinError(f"qat: '{name}' {what}: build the model that the checkpoint was made of")
    for name, record in structure.items():
        zero_points = record.zero_points or (0,) * len(record.unsigned)
        grids_of = [ByteGrid(scale=1.0, unsigned=sign, zero_point=zero) for sign, zero in zip(record.unsigned, zero_points, strict=True)]
        replace(model, name, _qat_form(operations[name], grids_of, record.bits))


def freeze(model: nn.Module, calibration: Iterable[ModelInputs] = ()) -> list[Change]:
    """Turn every operation in quantisation-aware training into its integer form, in place.

    Float layers are rounded to the FP16 in which they are stored. `calibration`: on its first batch, if there is one, the signal over noise
    of each layer is measured against its float form. A second run changes nothing.
    """
    batches = [inputs_of(model, batch) for batch in itertools.islice(calibration, 1)]
    before = already_quantized(quantized_operations(model))
    model.eval()
    layers = dict(named(model, *_WEIGHTED))
    sqnr: dict[str, float] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, QATLinear | QATConv2d)
        sqnr.setdefault(name, sqnr_db(layer.plain()(inputs[0]), layer.forward(inputs[0])))

    watch_inputs(model, layers, batches, watch)
    changes = before
    for name, operation in qat_operations(model).items():
        replace(model, name, operation.frozen())
        changes.append(Change(layer=name, pass_="quantize", done=_form(operation), sqnr_db=sqnr.get(name)))
    for name, layer in named(model, nn.Linear, nn.Conv2d):
        round_to_half(layer)
        changes.append(Change(layer=name, pass_="quantize", done="kept", reason="16 bits, as assigned"))
    for other in others(model).values():
        round_to_half(other)
    return remember(model, changes)
