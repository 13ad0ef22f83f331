"""Capture of a PyTorch model with named tensors in and out as an ONNX graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from muntin.deployment.capture.model_contract import reason_of
from muntin.deployment.capture.onnx_export import named_tensors_to_onnx
from muntin.errors import ExportError

Axes = Mapping[str, Sequence[str | None]]
"""Names of the free dimensions of each input; None for a fixed one. Dimensions of one name are equal."""
NamedTensors = Mapping[str, Tensor]
_PLACE = "muntin tensor "
"""Beginning of the names of inputs and outputs during a capture: the exporter may give a tensor inside the name of an output."""


class NamedModel(nn.Module):
    """A model that is called with tensors in the order of `names` and returns a tuple of tensors.

    `outputs` are their names: the keys of the dictionary that the model returns, "output" of a tensor, "output_0", "output_1" of a tuple.
    Entries that are no tensors are left out.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.outputs: tuple[str, ...] = ()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = _tensors_of(self.model(**dict(zip(self.names, tensors, strict=True))))
        self.outputs = tuple(named)
        return tuple(named.values())


def _tensors_of(answer: Any, name: str = "output") -> dict[str, Tensor]:
    if isinstance(answer, Tensor):
        return {name: answer}
    if isinstance(answer, Mapping):
        entries = [(str(key), value) for key, value in answer.items()]
    elif isinstance(answer, tuple | list):
        entries = [(f"{name}_{index}", value) for index, value in enumerate(answer)]
    else:
        return {}
    return {key: tensor for name, value in entries for key, tensor in _tensors_of(value, name).items()}


def usual_axes(*batches: Mapping[str, Any]) -> Axes:
    """Return the axes of inputs for which none are given, from tensors or arrays by name.

    A first dimension that all inputs of the first batch share is the batch. Dimensions that differ between batches are free, and those
    that have the same sizes in every batch share a name; others are fixed.
    """
    first = {tensor.shape[0] if tensor.ndim else None for tensor in batches[0].values()}
    shared = len(first) == 1 and None not in first
    free: dict[tuple[int, ...], str] = {}
    axes = {}
    for name, tensor in batches[0].items():
        dims: list[str | None] = []
        for axis in range(tensor.ndim):
            sizes = tuple(batch[name].shape[axis] for batch in batches)
            varied = len(set(sizes)) > 1
            dims.append("batch" if axis == 0 and shared else free.setdefault(sizes, f"size_{len(free)}") if varied else None)
        axes[name] = tuple(dims)
    return axes


def to_named_onnx(model: nn.Module, example: NamedTensors, axes: Axes) -> onnx.ModelProto:
    """Return the model as ONNX (opset 20) with named inputs and outputs. `example`: arguments of `forward` by name.

    Raises `ExportError` for a model that fails on the example, or cannot be traced for the axes.
    """
    check_call(model, example, axes)
    wrapped = NamedModel(model, tuple(example)).eval()
    answer(wrapped, example)  # its outputs get their names
    traced = {name: _varied(tensor, axes[name]) for name, tensor in example.items()}
    free = tuple({axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(axes[name]) if dim is not None} for name in example)
    places = {f"{_PLACE}{index}": name for index, name in enumerate((*example, *wrapped.outputs))}
    inputs, outputs = list(places)[: len(example)], list(places)[len(example) :]
    try:
        proto = named_tensors_to_onnx(wrapped, tuple(traced.values()), dynamic_shapes=(free,), input_names=inputs, output_names=outputs)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        named = ", ".join(f"{name} ({', '.join(dim or 'fixed' for dim in axes[name])})" for name in example)
        raise ExportError(
            f"the model cannot be exported for {named}: {reason_of(error.__cause__ or error)}; fewer free dimensions may help: axes"
        ) from error
    taken = {name: f"{name}/value" for name in places.values()}
    _rename(proto.graph, taken | places)
    _name_dims(proto, axes)
    return proto


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename tensors, also in the graphs inside of nodes, which read those around them."""
    for node in graph.node:
        for tensors in (node.input, node.output):
            for index, name in enumerate(tensors):
                tensors[index] = names.get(name, name)
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _rename(inner, names)
    for entry in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        entry.name = names.get(entry.name, entry.name)


def answer(model: NamedModel, inputs: NamedTensors) -> dict[str, NDArray[Any]]:
    """Return a model's outputs by name. Raises `ExportError` where it fails or returns no tensor."""
    shapes = ", ".join(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for name, tensor in inputs.items())
    try:
        with torch.inference_mode():
            outputs = model(*inputs.values())
    except Exception as error:
        raise ExportError(f"the model fails on {shapes}: {type(error).__name__}: {reason_of(error)}") from error
    if not outputs:
        raise ExportError(f"the model returns no tensor for {shapes}: return tensors, or a dictionary of them")
    return {name: tensor.detach().numpy() for name, tensor in zip(model.outputs, outputs, strict=True)}


def check_call(model: nn.Module, example: NamedTensors, axes: Axes) -> None:
    """Raise `ExportError` for inputs that the model's `forward` does not take, and axes of other inputs or dimensions."""
    parameters = inspect.signature(model.forward).parameters
    anything = any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in parameters.values())
    if unknown := [name for name in example if name not in parameters and not anything]:
        raise ExportError(f"example names {', '.join(unknown)}: the model's forward takes {', '.join(parameters)}")
    if axes.keys() != example.keys():
        raise ExportError(f"axes names {', '.join(axes) or 'nothing'}, and the inputs are {', '.join(example)}")
    for name, tensor in example.items():
        if len(axes[name]) != tensor.ndim:
            raise ExportError(f"axes of '{name}' {tuple(axes[name])}: it has {tensor.ndim} dimensions; give a name or None for each")


def _varied(tensor: Tensor, dims: Sequence[str | None]) -> Tensor:
    """Return the tensor with free dimensions of at least two: the tracer takes one for a fixed size."""
    for axis, dim in enumerate(dims):
        if dim is not None and tensor.shape[axis] == 1:
            tensor = tensor.repeat_interleave(2, axis)
    return tensor


def _name_dims(proto: onnx.ModelProto, axes: Axes) -> None:
    """Give the free dimensions of inputs and outputs their names."""
    names: dict[str, str] = {}
    for entry in proto.graph.input:
        for side, dim in zip(entry.type.tensor_type.shape.dim, axes[entry.name], strict=True):
            if dim is not None and side.dim_param:
                names[side.dim_param] = dim
    for entry in (*proto.graph.input, *proto.graph.output):
        for side in entry.type.tensor_type.shape.dim:
            if side.dim_param:  # setting an empty one would drop the number
                side.dim_param = names.get(side.dim_param, side.dim_param)


def as_arrays(inputs: NamedTensors) -> dict[str, NDArray[Any]]:
    """Return tensors as contiguous arrays."""
    return {name: np.ascontiguousarray(tensor.detach().cpu().numpy()) for name, tensor in inputs.items()}
