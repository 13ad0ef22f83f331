"""Factored layers: a layer's weight as a product of small ones, in plain Linears and convolutions that other passes find.

    Linear           (I -> r), (r -> O)                         r·(I + O) weights instead of I·O
    Conv2d 1x1       the same, as two 1x1 convolutions
    Conv2d 2-4       Tucker-2: 1x1 (I -> r1), kh x kw (r1 -> r2), 1x1 (r2 -> O)
    Conv2d from 5    spatial: kh x 1 (I -> r), 1 x kw (r -> O)

Only the last part has a bias, so zero padding inside the chain equals zero padding before the layer.

Axes: O output and I input channels, R ranks.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from muntin.compression.rewrite import named

SPATIAL_FROM = 5
"""Kernel side from which a convolution is split into a vertical and a horizontal one."""


class FactoredLinear(nn.Module):
    """Two Linears in place of one, of rank r: `(..., I) -> (..., O)`, r·(I + O) multiply-adds a token."""

    def __init__(self, reduce: nn.Linear, expand: nn.Linear) -> None:
        super().__init__()
        if reduce.out_features != expand.in_features:
            raise ValueError(f"reduce gives {reduce.out_features} features and expand takes {expand.in_features}: they must be equal")
        self.reduce = reduce
        self.expand = expand
        self.ranks: tuple[int, ...] = (reduce.out_features,)
        """`(r,)`. Stored, because a later pass may replace the parts by forms with other attributes."""

    @property
    def in_features(self) -> int:
        return self.reduce.in_features

    @property
    def out_features(self) -> int:
        return self.expand.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.expand.bias

    @property
    def weight(self) -> Tensor:
        """The product of the parts' weights, `(O, I)`, computed at each access: some models read a layer's weight for its type."""
        return self.expand.weight @ self.reduce.weight

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's parameter name: models may call it by keyword
        out: Tensor = self.expand(self.reduce(input))
        return out


class FactoredConv2d(nn.Module):
    """A chain of two or three convolutions in place of one: `(B, I, H, W) -> (B, O, H', W')`; forms at the head of this file.

    Stride, padding and dilation are where they cost least: on `reduce` for 1x1, on `core` for Tucker-2, vertical ones on `reduce` and
    horizontal ones on `expand` for the spatial form. Sources: Tucker-2, Kim et al., 1511.06530, section 3; spatial, Jaderberg et al.,
    1405.3866, section 2 (scheme 2).
    """

    groups, padding_mode = 1, "zeros"  # others are not factored

    def __init__(self, reduce: nn.Conv2d, expand: nn.Conv2d, core: nn.Conv2d | None = None) -> None:
        super().__init__()
        chain = [part for part in (reduce, core, expand) if part is not None]
        for before, after in itertools.pairwise(chain):
            if before.out_channels != after.in_channels:
                raise ValueError(f"a part gives {before.out_channels} channels and the next takes {after.in_channels}: they must be equal")
        self.reduce = reduce
        if core is not None:
            self.core = core
        self.expand = expand
        self.ranks: tuple[int, ...] = (reduce.out_channels,) if core is None else (core.in_channels, core.out_channels)
        """`(r,)`, or `(r1, r2)` of Tucker-2. Stored for the same reason as in `FactoredLinear`."""

    @property
    def in_channels(self) -> int:
        return self.reduce.in_channels

    @property
    def out_channels(self) -> int:
        return self.expand.out_channels

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Kernel of the whole chain; like stride, padding and dilation, each axis belongs to one part."""
        return self._along("kernel_size")

    @property
    def stride(self) -> tuple[int, ...]:
        return self._along("stride")

    @property
    def padding(self) -> tuple[int, ...]:
        return self._along("padding")

    @property
    def dilation(self) -> tuple[int, ...]:
        return self._along("dilation")

    def _along(self, name: str) -> tuple[int, ...]:
        return tuple(map(max, *(getattr(part, name) for part in self.children())))

    @property
    def bias(self) -> Tensor | None:
        return self.expand.bias

    @property
    def weight(self) -> Tensor:
        """The product of the parts' weights, `(O, I, H, W)`, computed at each access; see `FactoredLinear.weight`."""
        core = getattr(self, "core", None)
        if core is None:
            return torch.einsum("orhw,rihw->oihw", self.expand.weight, self.reduce.weight)  # axes of size 1 are broadcast
        return torch.einsum("opyx,prhw,rizv->oihw", self.expand.weight, core.weight, self.reduce.weight)

    def forward(self, input: Tensor) -> Tensor:
        core = getattr(self, "core", None)
        reduced = self.reduce(input)
        out: Tensor = self.expand(reduced if core is None else core(reduced))
        return out


FactoredLayer = FactoredLinear | FactoredConv2d
AnyForm = nn.Linear | nn.Conv2d | FactoredLinear | FactoredConv2d


def factored_layers(model: nn.Module) -> dict[str, FactoredLayer]:
    """The factored layers of a model, by dotted name."""
    return dict(named(model, FactoredLinear, FactoredConv2d))


def update_ranks(layer: FactoredLayer) -> None:
    """Set the ranks of a factored layer to the sizes of its parts, which another pass has changed."""
    parts = list(layer.children())[:-1]  # without `expand`
    layer.ranks = tuple(len(cast(Tensor, part.weight)) for part in parts)


L = TypeVar("L", bound=nn.Module)


def _zeros(kind: type[L], like: nn.Linear | nn.Conv2d, *sizes: Any, bias: bool) -> L:
    """A layer of zeros (no random number is drawn) in the type and on the device of `like`."""
    layer: L = kind(*sizes, bias=bias, device="meta", dtype=like.weight.dtype)
    layer.to_empty(device=like.weight.device)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _is_tucker(layer: nn.Conv2d | FactoredConv2d) -> bool:
    return 1 < max(layer.kernel_size) < SPATIAL_FROM


def _is_spatial(layer: nn.Conv2d | FactoredConv2d) -> bool:
    return max(layer.kernel_size) >= SPATIAL_FROM


def full_ranks(layer: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    """The ranks at which the factored form of `layer` holds any weight exactly."""
    if isinstance(layer, nn.Linear):
        return (min(layer.in_features, layer.out_features),)
    inputs, outputs, taps = layer.in_channels, layer.out_channels, math.prod(layer.kernel_size)
    if _is_tucker(layer):
        return (min(inputs, outputs * taps), min(outputs, inputs * taps))
    return (min(inputs * layer.kernel_size[0], outputs * layer.kernel_size[1]),)


def factored_parameters(layer: AnyForm, ranks: tuple[int, ...]) -> int:
    """Parameters of the factored form of `layer` at `ranks`, bias included."""
    return sum(weights for weights, _ in _parts(layer, ranks)) + (0 if layer.bias is None else layer.bias.numel())


def factored_macs(layer: AnyForm, ranks: tuple[int, ...], positions: float) -> float:
    """Multiply-adds an image of the factored form of `layer` at `ranks`, with `positions` rows of output an image, without padding."""
    return sum(weights * share for weights, share in _parts(layer, ranks)) * positions


def _parts(layer: AnyForm, ranks: tuple[int, ...]) -> list[tuple[int, int]]:
    """Weights of each part of the factored form, and its positions for each output position: more before a stride."""
    outputs, inputs = layer.weight.shape[:2]
    if isinstance(layer, nn.Linear | FactoredLinear):
        return [(ranks[0] * inputs, 1), (ranks[0] * outputs, 1)]
    (height, width), (down, across) = layer.kernel_size, layer.stride
    if _is_tucker(layer):
        return [(inputs * ranks[0], down * across), (ranks[0] * ranks[1] * height * width, 1), (ranks[1] * outputs, 1)]
    return [(ranks[0] * inputs * height, across if _is_spatial(layer) else 1), (ranks[0] * outputs * width, 1)]


def shell(layer: nn.Linear | nn.Conv2d, ranks: tuple[int, ...]) -> FactoredLayer:
    """The factored form of a Linear or Conv2d at `ranks` with zero weights, for a checkpoint to be loaded into.

    A convolution must have one group and be padded with a number of zeros. Raises `ValueError` for ranks that do not fit the layer.
    """
    full = full_ranks(layer)
    if len(ranks) != len(full) or not all(1 <= rank <= most for rank, most in zip(ranks, full, strict=True)):
        allowed = ", ".join(f"1-{most}" for most in full)
        raise ValueError(
            f"ranks {', '.join(map(str, ranks)) or 'none'}: {type(layer).__name__} {tuple(layer.weight.shape)} takes {allowed}"
        )
    first, last, bias = ranks[0], ranks[-1], layer.bias is not None
    if isinstance(layer, nn.Linear):
        reduce = _zeros(nn.Linear, layer, layer.in_features, first, bias=False)
        return FactoredLinear(reduce, _zeros(nn.Linear, layer, first, layer.out_features, bias=bias))

    def conv(inputs: int, outputs: int, axes: tuple[bool, bool], *, bias: bool = False) -> nn.Conv2d:
        """A convolution with the layer's kernel, stride, padding and dilation along `axes` and size 1 along the others."""
        kernel, stride, dilation = (
            tuple(value if on else 1 for value, on in zip(values, axes, strict=True))
            for values in (layer.kernel_size, layer.stride, layer.dilation)
        )
        assert not isinstance(layer.padding, str)
        padding = tuple(value if on else 0 for value, on in zip(layer.padding, axes, strict=True))
        return _zeros(nn.Conv2d, layer, inputs, outputs, kernel, stride, padding, dilation, bias=bias)

    inputs, outputs = layer.in_channels, layer.out_channels
    both, neither, vertical, horizontal = (True, True), (False, False), (True, False), (False, True)
    if _is_tucker(layer):
        return FactoredConv2d(conv(inputs, first, neither), conv(last, outputs, neither, bias=bias), conv(first, last, both))
    before, after = (vertical, horizontal) if _is_spatial(layer) else (both, neither)
    return FactoredConv2d(conv(inputs, first, before), conv(last, outputs, after, bias=bias))
