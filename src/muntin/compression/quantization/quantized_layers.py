"""Quantised layers: integer weights, and inputs on trained 8-bit grids or, where export is to calibrate them, in floats.

Float arithmetic gives exactly the integers' results.

Axes: B batch, O output and I input channels, H W map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.compression.quantization.fake_quantization import dequantize_weight, quantize_dequantize, quantize_weight
from muntin.compression.rewrite import SPARSITY, computed_weight, keepable, named, other_padding, replace
from muntin.errors import MuntinError
from muntin.graph.grids import SHARES, ByteGrid, RangeObserver
from muntin.layers import Product, SoftmaxProduct
from muntin.models.compression_record import Change, OperationRecord


class InputGrid(nn.Module):
    """Rounds a tensor to a fixed 8-bit grid."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: ByteGrid) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(grid.scale, dtype=torch.float32))
        kind = torch.uint8 if grid.unsigned else torch.int8
        self.register_buffer("zero_point", torch.tensor(grid.zero_point, dtype=kind))

    def grid(self) -> ByteGrid:
        """The grid as a value."""
        unsigned = self.zero_point.dtype == torch.uint8
        return ByteGrid(scale=float(self.scale), unsigned=unsigned, zero_point=int(self.zero_point))

    def ends(self) -> tuple[float, float]:
        """The least and the greatest value of the grid."""
        return self.grid().ends

    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = quantize_dequantize(x, self.scale, self.zero_point)
        return rounded


@contextmanager
def exact_inputs(model: nn.Module) -> Iterator[None]:
    """Compute the quantised operations of a model with unrounded inputs during the block; weights keep their integers."""
    grids = [module for module in model.modules() if isinstance(module, InputGrid)]
    handles = [grid.register_forward_hook(lambda _, inputs, output: inputs[0]) for grid in grids]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


GEOMETRY = (
    "in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    "num_embeddings", "embedding_dim", "padding_idx", SPARSITY,
)  # fmt: skip


def keep_geometry(form: nn.Module, layer: nn.Module) -> None:
    """Copy the attributes of a layer that models read to the form in its place."""
    for name in GEOMETRY:
        if hasattr(layer, name):
            setattr(form, name, getattr(layer, name))


class _QuantizedWeight(nn.Module):
    """Base of QuantizedLinear and QuantizedConv2d. Weights of fewer than 8 bits are int8 too; the artefact packs them."""

    integers: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input: InputGrid | nn.Identity
    """Rounds the input to its grid; an identity where the grid is left to export."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, grid: ByteGrid | None = None, *, bits: int = 8, scale: Tensor | None = None) -> None:
        super().__init__()
        keep_geometry(self, layer)
        q, scale_O = quantize_weight(layer.weight, 0, bits, scale)
        self.bits = bits
        self.input = nn.Identity() if grid is None else InputGrid(grid)
        self.register_buffer("integers", q.t().contiguous() if isinstance(layer, nn.Linear) else q)
        self.register_buffer("weight_scale", scale_O)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())


class QuantizedLinear(_QuantizedWeight):
    """A Linear with integer weights per output channel; `(..., I) -> (..., O)`.

    `integers` are `(I, O)`, the order in which runtimes multiply them, so that no transposition follows in the graph.
    """

    @property
    def weight(self) -> Tensor:
        """The dequantised weight, float `(O, I)`, computed at each access: some models read a layer's weight for its type."""
        weight_IO: Tensor = dequantize_weight(self.integers, self.weight_scale, 1)
        return weight_IO.t()

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's parameter name: models may call it by keyword
        weight_IO = dequantize_weight(self.integers, self.weight_scale, 1)
        out = torch.matmul(self.input(input), weight_IO.to(input.dtype))
        return out if self.bias is None else out + self.bias.to(input.dtype)


class QuantizedConv2d(_QuantizedWeight):
    """A Conv2d (groups and depthwise included) with integer weights per output channel; zero padding."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def weight(self) -> Tensor:
        """The dequantised weight, float `(O, I, H, W)`, computed at each access; see `QuantizedLinear.weight`."""
        weight_OIHW: Tensor = dequantize_weight(self.integers, self.weight_scale, 0)
        return weight_OIHW

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.conv2d(self.input(input), self.weight.to(input.dtype), bias, self.stride, self.padding, self.dilation, self.groups)


class QuantizedProduct(nn.Module):
    """A product of two activations, both rounded to 8 bits: `(..., I, J), (..., J, L) -> (..., I, L)`."""

    def __init__(self, left: ByteGrid, right: ByteGrid) -> None:
        super().__init__()
        self.left, self.right = InputGrid(left), InputGrid(right)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(self.left(a), self.right(b))


class QuantizedSoftmaxProduct(nn.Module):
    """softmax(logits)·values with exp(logits - max) and the values in 8 bits, divided by the sum after the product.

    A softmax over N entries shrinks as 1/N and vanishes in 8 bits; its largest exponential is 1 for every N.
    """

    def __init__(self, values: ByteGrid) -> None:
        super().__init__()
        self.shares, self.values = InputGrid(SHARES), InputGrid(values)

    def forward(self, logits: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        shares = self.shares(exponentials(logits, bias))
        mixed: Tensor = torch.matmul(shares, self.values(values)) / shares.sum(-1, keepdim=True)
        return mixed


MAX_ENTRIES = 24_000
"""Entries of share 1 whose sum of products fits into 32 bits: 255 steps of values times 255 of the share, with a quarter in reserve."""


def exponentials(logits: Tensor, bias: Tensor | None) -> Tensor:
    """exp(logits + bias - their maximum over the last dimension), in 0..1, divided by the number of started `MAX_ENTRIES` entries so that
    the engines' sums do not overflow."""
    if bias is not None:
        logits = logits + bias
    shares = torch.exp(logits - logits.amax(-1, keepdim=True))
    parts = (logits.shape[-1] + MAX_ENTRIES - 1) // MAX_ENTRIES
    return shares if isinstance(parts, int) and parts == 1 else shares / parts  # symbolic if the size is free in an export


QuantizedLayer = QuantizedLinear | QuantizedConv2d
QuantizedOperation = QuantizedLinear | QuantizedConv2d | QuantizedProduct | QuantizedSoftmaxProduct
_OPERATIONS = (QuantizedLinear, QuantizedConv2d, QuantizedProduct, QuantizedSoftmaxProduct)


def quantized_operations(model: nn.Module) -> dict[str, QuantizedOperation]:
    """The quantised operations, by dotted name."""
    return dict(named(model, *_OPERATIONS))


def uncalibrated(model: nn.Module) -> list[str]:
    """The names of the quantised layers whose inputs have no grid: export calibrates these."""
    return [name for name, layer in named(model, QuantizedLinear, QuantizedConv2d) if isinstance(layer.input, nn.Identity)]


def already_quantized(operations: Mapping[str, QuantizedOperation]) -> list[Change]:
    """A kept `Change` for each of the operations."""
    widths = {name: f"W{one.bits}A8" if isinstance(one, _QuantizedWeight) else "A8" for name, one in operations.items()}
    return [Change(layer=name, pass_="quantize", done="kept", reason=f"already {width}") for name, width in widths.items()]


def plain_layer(form: QuantizedLayer) -> nn.Linear | nn.Conv2d:
    """The float layer with the values of an integer form."""
    like: Any = form
    options: dict[str, Any] = {"bias": form.bias is not None, "device": "meta"}
    layer: nn.Linear | nn.Conv2d
    if isinstance(form, QuantizedLinear):
        layer = nn.Linear(like.in_features, like.out_features, **options)
    else:
        sizes = (like.in_channels, like.out_channels, like.kernel_size, like.stride, like.padding, like.dilation, like.groups)
        layer = nn.Conv2d(*sizes, **options)
    layer.weight = nn.Parameter(form.weight.detach().clone(memory_format=torch.contiguous_format))
    layer.bias = None if form.bias is None else nn.Parameter(form.bias.detach().clone())
    if SPARSITY in vars(form):
        vars(layer)[SPARSITY] = vars(form)[SPARSITY]
    return layer


def quantized_form(layer: nn.Module, grid: ByteGrid | None = None, *, bits: int = 8, scale: Tensor | None = None) -> QuantizedLayer:
    """The integer form of a Linear or Conv2d. `grid`: of its input; None leaves it to export."""
    if isinstance(layer, nn.Conv2d):
        return QuantizedConv2d(layer, grid, bits=bits, scale=scale)
    return QuantizedLinear(cast(nn.Linear, layer), grid, bits=bits, scale=scale)


def integer_structure(model: nn.Module) -> dict[str, OperationRecord]:
    """The quantised operations, by dotted name, for a record."""
    structure = {}
    for name, operation in quantized_operations(model).items():
        grids = [module for module in operation.modules() if isinstance(module, InputGrid)]
        bits = operation.bits if isinstance(operation, _QuantizedWeight) else 0
        structure[name] = OperationRecord(bits=bits, unsigned=tuple(grid.zero_point.dtype == torch.uint8 for grid in grids))
    return structure


def apply_integers(model: nn.Module, structure: Mapping[str, OperationRecord]) -> None:
    """Put quantised forms where `structure` says, in place; load the weights and scales next.

    Raises `MuntinError` for a name that is no such operation of the model, before anything is changed.
    """
    operations = keepable(model)
    for name, record in structure.items():
        grids = (2,) if isinstance(operations.get(name), Product | SoftmaxProduct) else (0, 1)
        if name not in operations or len(record.unsigned) not in grids:
            what = "is no Linear, Conv2d or product of the model" if name not in operations else f"has at most {grids[-1]} activation grids"
            raise MuntinError(f"integers: '{name}' {what}: build the model that was saved")
    for name, record in structure.items():
        replace(model, name, _empty_form(operations[name], record))


def _empty_form(operation: nn.Module, record: OperationRecord) -> nn.Module:
    grids = [ByteGrid(scale=1.0, unsigned=sign) for sign in record.unsigned]
    if isinstance(operation, Product):
        return QuantizedProduct(*grids)
    if isinstance(operation, SoftmaxProduct):
        return QuantizedSoftmaxProduct(grids[-1])
    weight = cast(Tensor, operation.weight)
    return quantized_form(operation, grids[0] if grids else None, bits=record.bits, scale=torch.ones(len(weight), device=weight.device))


def no_integer_form(layer: nn.Module, observer: RangeObserver) -> str | None:
    """Why a Linear, Conv2d or product cannot be quantised; None if it can. `observer`: of its first input."""
    if not observer.seen:
        return "no calibration image reached it"
    computed = computed_weight(layer) if isinstance(layer, nn.Linear | nn.Conv2d) else None
    return computed or other_padding(layer, "integer form")
