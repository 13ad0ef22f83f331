"""Convolutions that pad or compute their weights in their own way, written as a padding and an `nn.Conv2d` with a number of zeros.

    padding="same", reflection, Conv2dSame (TensorFlow's padding), a class with a padding module of its own, standardised weights
        -> nn.Conv2d, or PaddedConv2d: "pad", then "conv"

A layer is taken by what it does, not by its name: its forward runs on noise of several sizes, and the one call of `conv2d` in it shows the
padded input, the weight and the strides. It is replaced only if the model's answer stays the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torch.overrides import TorchFunctionMode

from muntin.compression.replaceability import all_same
from muntin.compression.rewrite import computed_weight, failing, named, replace
from muntin.errors import MuntinError
from muntin.models.compression_record import Change, ConvolutionRecord, PaddingMode
from muntin.models.eager import ModelInputs, call, tensors_of, watch_inputs

_PLAIN = "_muntin_convolutions"
"""Attribute of the model, in its copies too: the record of each layer that was replaced."""
_PADDINGS: dict[PaddingMode, Any] = {
    "zeros": nn.ZeroPad2d, "reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d, "circular": nn.CircularPad2d,
}  # fmt: skip
_MODES: dict[PaddingMode, str] = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


class SamePad2d(nn.Module):
    """Pads with zeros to ceil(size / stride) outputs of a convolution, the odd pixel at the end, `(B, C, H, W)`: TensorFlow's "SAME"."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.spans = tuple(d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
        self.strides = tuple(conv.stride)

    def forward(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = (_same(*one) for one in zip(x.shape[-2:], self.spans, self.strides, strict=True))
        return F.pad(x, (left, right, top, bottom))


def _same(size: int, span: int, stride: int) -> tuple[int, int]:
    both = torch.sym_max((-(-size // stride) - 1) * stride + span - size, 0)  # type: ignore[no-untyped-call]  # sizes may be symbols
    return both // 2, both - both // 2


class PaddedConv2d(nn.Sequential):
    """A padding, `pad`, and a convolution, `conv`."""


@dataclass(frozen=True)
class _Call:
    """A layer's convolution of an input of one size. `pads`: left, right, top, bottom, without the convolution's own padding."""

    mode: PaddingMode
    pads: tuple[int, int, int, int]
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def plain_convolutions(model: nn.Module, row: ModelInputs) -> list[Change]:
    """Replace the convolutions of this file's head in place. Idempotent.

    `row`: one row of inputs; the model is in `eval` mode. Costs a few calls of each such layer, and three of the model. A weight that its
    class computes, such as a standardised one, becomes the weight.
    """
    candidates = {name: conv for name, conv in named(model, nn.Conv2d) if _is_unusual(name, conv)}
    if not candidates:
        return []
    sizes: dict[str, torch.Size] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes.setdefault(name, inputs[0].shape)

    watch_inputs(model, candidates, [row], watch)
    forms = {name: (conv, form) for name, conv in candidates.items() if name in sizes and (form := _plain_form(conv, sizes[name]))}
    before = _answer(model, row)

    def unchanged(names: Any) -> bool:
        for name in names:
            replace(model, name, forms[name][1][1])
        if all_same(before, _answer(model, row)):
            return True
        for name in names:
            replace(model, name, forms[name][0])
        return False

    refused = failing(list(forms), unchanged)
    done = {name: form for name, (_, form) in forms.items() if name not in refused}
    vars(model)[_PLAIN] = plain_records(model) | {name: record for name, (record, _) in done.items()}
    return [
        Change(layer=name, pass_="pad", done=f"{type(candidates[name]).__name__} written as {_words(record)}")
        for name, (record, _) in done.items()
    ]


def _words(record: ConvolutionRecord) -> str:
    return "nn.Conv2d" if record.pads is None else "a padding and nn.Conv2d"


def plain_records(model: nn.Module) -> dict[str, ConvolutionRecord]:
    """The records of the layers of a model that were replaced, by dotted name."""
    records: dict[str, ConvolutionRecord] = vars(model).get(_PLAIN, {})
    return records


def apply_plain(model: nn.Module, records: Mapping[str, ConvolutionRecord]) -> None:
    """Replace the convolutions of a record, in place; load the weights next. Raises `MuntinError` for a name that is no convolution."""
    layers = dict(named(model, nn.Conv2d))
    for name in records:
        if name not in layers:
            raise MuntinError(f"convolutions: '{name}' is no Conv2d of the model: build the model that was saved")
    for name, record in records.items():
        conv = layers[name]
        replace(model, name, _module(conv, record, cast(nn.Parameter, conv.weight), cast("nn.Parameter | None", conv.bias)))
    vars(model)[_PLAIN] = dict(records)


def _is_unusual(name: str, conv: nn.Conv2d) -> bool:
    own = type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward
    other = own or isinstance(conv.padding, str) or conv.padding_mode != "zeros"
    return bool(name) and other and computed_weight(conv) is None and "forward" not in vars(conv)


def _answer(model: nn.Module, row: ModelInputs) -> list[Tensor]:
    with torch.no_grad():
        return [part.clone() for part in tensors_of(call(model, row))]


def _plain_form(conv: nn.Conv2d, shape: torch.Size) -> tuple[ConvolutionRecord, nn.Module] | None:
    """The record and the module that compute what the layer does; None if it does something else. `shape`: of an input, (B, C, H, W)."""
    calls: dict[tuple[int, int], _Call | None] = {}
    for fewer_rows, fewer_columns in itertools.product(*(sorted({0, 1, max(1, stride - 1)}) for stride in conv.stride)):
        H, W = shape[-2] - fewer_rows, shape[-1] - fewer_columns
        with suppress(RuntimeError, ValueError, AssertionError):  # a size that the model never uses
            calls[H, W] = _observe(conv, torch.randn(1, shape[-3], H, W, generator=torch.Generator().manual_seed(H * W)))
    first = calls.get((shape[-2], shape[-1]))
    if first is None or not all(one is not None and _alike(one, first) for one in calls.values()):
        return None
    record = ConvolutionRecord(stride=first.stride, padding=first.padding, dilation=first.dilation)
    pads = {size: one.pads for size, one in calls.items() if one is not None}
    if len(set(pads.values())) == 1:
        left, right, top, bottom = first.pads
        if first.mode != "zeros":
            record = record.model_copy(update={"pads": first.pads, "mode": first.mode})
        elif left == right and top == bottom:
            record = record.model_copy(update={"padding": (record.padding[0] + top, record.padding[1] + left)})
        else:
            record = record.model_copy(update={"pads": first.pads})
    else:
        spans = [d * (k - 1) + 1 for k, d in zip(first.weight.shape[2:], first.dilation, strict=True)]
        for (H, W), observed in pads.items():
            vertical, horizontal = _same(H, spans[0], first.stride[0]), _same(W, spans[1], first.stride[1])
            if observed != (*horizontal, *vertical):
                return None
        record = record.model_copy(update={"pads": ()})
    bias = None if first.bias is None else _parameter(first.bias, conv)
    return record, _module(conv, record, _parameter(first.weight, conv), bias)


def _parameter(value: Tensor, conv: nn.Conv2d) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone(), conv.weight.requires_grad)


def _module(conv: nn.Conv2d, record: ConvolutionRecord, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    kernel: Any = tuple(weight.shape[2:])
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, kernel, record.stride, record.padding, record.dilation, conv.groups, bias is not None,
        device="meta",
    )  # fmt: skip
    plain.weight, plain.bias = weight, bias
    if record.pads is None:
        return plain
    padded = PaddedConv2d()
    padded.add_module("pad", _PADDINGS[record.mode](record.pads) if record.pads else SamePad2d(plain))
    padded.add_module("conv", plain)
    return padded


class _Convolutions(TorchFunctionMode):
    """Records the calls of `conv2d`: its arguments and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[dict[str, Any], Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.conv2d:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            self.calls.append((dict(zip(names, args, strict=False)) | dict(kwargs or {}), result))
        return result


@torch.no_grad()
def _observe(conv: nn.Conv2d, noise: Tensor) -> _Call | None:
    x = noise.to(conv.weight.device, conv.weight.dtype)
    with _Convolutions() as seen:
        answer = type(conv).forward(conv, x)
    if len(seen.calls) != 1 or answer is not seen.calls[0][1] or seen.calls[0][0].get("groups", 1) != conv.groups:
        return None
    arguments = seen.calls[0][0]
    padding, added = arguments.get("padding", 0), _padding(x, arguments["input"])
    if added is None:
        return None
    mode, pads = added
    stride, dilation = (_pair(arguments.get(key, 1)) for key in ("stride", "dilation"))
    if padding == "same":
        height, width = (d * (k - 1) for k, d in zip(arguments["weight"].shape[2:], dilation, strict=True))
        if any(pads):
            return None
        pads = (width // 2, width - width // 2, height // 2, height - height // 2)
    both = (0, 0) if isinstance(padding, str) else _pair(padding)
    return _Call(mode, pads, arguments["weight"], arguments.get("bias"), stride, both, dilation)


def _pair(value: Any) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return int(values[0]), int(values[-1])


def _padding(x: Tensor, padded: Tensor) -> tuple[PaddingMode, tuple[int, int, int, int]] | None:
    """The mode and the pixels with which an input was padded; None if the other tensor is something else."""
    if padded.shape[:-2] != x.shape[:-2]:
        return None
    rows, columns = (padded.shape[axis] - x.shape[axis] for axis in (-2, -1))
    for top, left in itertools.product(range(rows + 1), range(columns + 1)):
        if torch.equal(padded[..., top : top + x.shape[-2], left : left + x.shape[-1]], x):
            pads = (left, columns - left, top, rows - top)
            for mode, name in _MODES.items():
                with suppress(RuntimeError):  # more pixels than a reflection has
                    if torch.equal(F.pad(x, pads, mode=name), padded):
                        return mode, pads
    return None


def _alike(one: _Call, other: _Call) -> bool:
    same = (one.mode, one.stride, one.padding, one.dilation) == (other.mode, other.stride, other.padding, other.dilation)
    biases = one.bias is other.bias or (one.bias is not None and other.bias is not None and torch.equal(one.bias, other.bias))
    return same and biases and torch.equal(one.weight, other.weight)
