"""The sizes of layers and norms, which pruning changes: read from a model, and given to a new one before its weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from muntin.compression.quantization.qat import QATConv2d, QATLinear
from muntin.compression.quantization.quantized_layers import QuantizedConv2d, QuantizedLinear
from muntin.errors import MuntinError

SIZED = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.BatchNorm1d, nn.BatchNorm2d,
    nn.BatchNorm3d, nn.LayerNorm, nn.PReLU,
)  # fmt: skip
"""Kinds that can be resized; subclasses too."""
_FORMS = (QuantizedLinear, QuantizedConv2d, QATLinear, QATConv2d)
"""Forms that have the sizes of the layer that they replace."""
_NAMES = ("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_channels", "num_parameters")


def prunable(kind: type[nn.Module]) -> bool:
    """Return True for a kind of layer whose outputs and inputs are different channels, unlike a norm's."""
    return issubclass(kind, nn.Linear | nn.modules.conv._ConvNd)


def sizes_of(model: nn.Module) -> dict[str, dict[str, int]]:
    """The sizes of each layer and norm, also of quantised forms, by dotted name and attribute."""
    sizes = {name: _sizes(module) for name, module in model.named_modules()}
    return {name: values for name, values in sizes.items() if values}


def _sizes(module: nn.Module) -> dict[str, int]:
    if isinstance(module, nn.LayerNorm):
        return {"normalized_shape": module.normalized_shape[0]} if len(module.normalized_shape) == 1 else {}
    if not isinstance(module, (*SIZED, *_FORMS)):
        return {}
    attributes = vars(module)
    names = _NAMES[:2] if "in_features" in attributes else _NAMES
    return {name: attributes[name] for name in names if isinstance(attributes.get(name), int)}


@torch.no_grad()
def apply_sizes(model: nn.Module, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Give layers and norms the sizes of a record, with zero weights where they differ, in place; load the weights next.

    Raises `MuntinError` for a name that is no such layer of the model, before anything is changed.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, values in sizes.items():
        module = modules.get(name)
        if not isinstance(module, SIZED) or _sizes(module).keys() != values.keys():
            what = "is not in the model" if module is None else f"is a {type(module).__name__} of other sizes"
            raise MuntinError(f"sizes: '{name}' {what}: build the model that was saved")
    for name, values in sizes.items():
        module = modules[name]
        if _sizes(module) != values:
            _resize(module, values)


def apply_heads(model: nn.Module, heads: Mapping[str, Mapping[str, int]]) -> None:
    """Give modules the numbers of heads of a record, in place. Raises `MuntinError` for attributes that are no integers of the model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, values in heads.items():
        for key, value in values.items():
            if name not in modules or type(vars(modules[name]).get(key)) is not int:
                raise MuntinError(f"heads: '{name}' has no integer '{key}': build the model that was saved")
            setattr(modules[name], key, value)


def _resize(module: nn.Module, values: Mapping[str, int]) -> None:
    for name, value in values.items():
        setattr(module, name, (value,) if name == "normalized_shape" else value)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            zeros = parameter.new_zeros(_shape(module, name, parameter.shape))
            module._parameters[name] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.ndim:  # none: a counter of batches
            module._buffers[name] = buffer.new_zeros(_shape(module, name, buffer.shape))


def _shape(module: nn.Module, name: str, before: torch.Size) -> tuple[int, ...]:
    """The shape of a tensor of a layer with its present sizes."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features) if name == "weight" else (module.out_features,)
    if isinstance(module, nn.modules.conv._ConvNd):
        groups = module.groups
        pair = (module.out_channels, module.in_channels // groups)
        if module.transposed:
            pair = (module.in_channels, module.out_channels // groups)
        return (*pair, *before[2:]) if name == "weight" else (module.out_channels,)
    return (next(iter(_sizes(module).values())),)
