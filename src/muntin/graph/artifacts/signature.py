"""The signature of an ONNX model, from its declared inputs and from what it computes at two sizes; and the inputs of its golden pairs.

A free dimension keeps its name. One without a name gets one: "batch" if it comes first in every input, otherwise that of its tensor and
axis. One of an output is that of the inputs with the same sizes in all runs, unless they are so small that this may be chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic import ValidationError

from muntin.artifact import GoldenTolerance, TensorInfo, TensorPair, TensorSignature
from muntin.artifact.manifest import field_error
from muntin.artifact.tensors import TensorType
from muntin.errors import ExportError
from muntin.graph.calibration import Inputs
from muntin.runtime.verification.golden import compare_outputs

ModelRun = Callable[[Inputs], dict[str, NDArray[Any]]]
BATCH = "batch"
ROWS = 3
"""Rows of the largest golden pair."""
LARGEST_PAIR = 1 << 16
"""Values of the inputs of a golden pair above which free dimensions other than the first are halved."""
NO_CHANCE = 5
"""Size from which on an output's dimension that equals one of the inputs in all runs is that dimension."""
SAME = GoldenTolerance(max_error=0.01, label_agreement=1)
"""Allowed difference of a row from the same row alone: in floats only the order of sums differs."""


def declared_inputs(model: onnx.ModelProto, batch: Inputs) -> tuple[TensorInfo, ...]:
    """Return the inputs of a model. `batch`: inputs that it takes; dimensions that one name calls equal and are not get names of their own.

    Raises ExportError for a type of an input or output that an artefact does not hold.
    """
    for entry in model.graph.output:
        _element_type(entry, "output")
    constants = {entry.name for entry in model.graph.initializer}
    entries = [entry for entry in model.graph.input if entry.name not in constants]
    first = {batch[entry.name].shape[:1] for entry in entries}
    unnamed_first = all(not _dim(entry, 0) for entry in entries if batch[entry.name].ndim)
    sizes: dict[str, int] = {}
    infos = []
    for entry in entries:
        shape: list[int | str] = []
        for axis, size in enumerate(batch[entry.name].shape):
            dim = _dim(entry, axis)
            if isinstance(dim, int):
                shape.append(dim)
                continue
            if not dim:
                dim = BATCH if axis == 0 and unnamed_first and len(first) == 1 else f"{entry.name}_{axis}"[-128:]
            if sizes.setdefault(dim, size) != size:
                dim = f"{entry.name}_{axis}"[-128:]
                sizes[dim] = size
            shape.append(dim)
        infos.append(_info(entry, tuple(shape), "input"))
    return tuple(infos)


def _dim(entry: onnx.ValueInfoProto, axis: int) -> int | str:
    """Return a dimension's number or name; an empty name where neither is declared, or where a tool made the name up."""
    dims = entry.type.tensor_type.shape.dim
    if axis >= len(dims):
        return ""
    if dims[axis].dim_value > 0:
        return int(dims[axis].dim_value)
    name = str(dims[axis].dim_param)
    return name if len(name) <= 128 and not name.startswith("unk__") else ""


def _element_type(entry: onnx.ValueInfoProto, kind: str) -> str:
    if not entry.type.HasField("tensor_type"):
        raise ExportError(f"{kind} '{entry.name}' is no tensor: an artefact has tensors only, so split it inside the model")
    number = entry.type.tensor_type.elem_type
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(number))
    if dtype not in get_args(TensorType):
        name = onnx.TensorProto.DataType.Name(number)
        raise ExportError(f"{kind} '{entry.name}' is {name}: an artefact holds {', '.join(get_args(TensorType))}: add a Cast to the model")
    return dtype


def _info(entry: onnx.ValueInfoProto, shape: tuple[int | str, ...], kind: str) -> TensorInfo:
    dtype = _element_type(entry, kind)
    try:
        return TensorInfo(name=entry.name, dtype=dtype, shape=shape)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ExportError(f"{kind} '{entry.name}' of shape {shape}: {field_error(error)}") from error


def golden_pairs(inputs: Sequence[TensorInfo], batches: Sequence[Inputs], run: ModelRun) -> tuple[list[TensorPair], list[str]]:
    """Return one or two pairs of inputs, cut from the batches, and the answers, at different sizes of the free dimensions; and notes.

    Raises ExportError where the model fails on the batches themselves, or answers NaN or infinity.
    """
    rows = _rows(inputs, batches)
    first_dims = {dim for info in inputs for dim in info.shape[:1] if isinstance(dim, str)}
    whole = _sizes(inputs, rows)
    if not whole:
        return [_pair(batch, run) for batch in batches[:2]], []
    larger = _smaller(inputs, whole | {dim: min(ROWS, whole[dim]) for dim in first_dims if len(first_dims) == 1})
    try:
        pairs = [_pair(_cut(inputs, rows, larger), run)]
    except ExportError:  # sizes that the model does not take
        larger, pairs = whole, [_pair(rows, run)]
    for sizes in _other_sizes(larger, first_dims):
        try:
            pairs.append(_pair(_cut(inputs, rows, sizes), run))
        except ExportError:
            continue
        fixed = [f"{dim} {size}" for dim, size in larger.items() if sizes[dim] == size > 1]
        return pairs, [f"compared at one size only: {', '.join(fixed)}"] if fixed else []
    return pairs, [f"compared at one size only: {', '.join(f'{dim} {size}' for dim, size in larger.items())}"]


def _rows(inputs: Sequence[TensorInfo], batches: Sequence[Inputs]) -> Inputs:
    """Return the first batch, with rows of the next ones, or its own again, where one free dimension comes first in every input."""
    first = {info.shape[0] if info.shape else 1 for info in inputs}
    if len(first) > 1 or not isinstance(next(iter(first)), str):
        return batches[0]
    alike = [batch for batch in batches if all(batch[name].shape[1:] == batches[0][name].shape[1:] for name in batch)]
    parts = alike[:ROWS] if len(alike) >= ROWS else alike * ROWS
    own = inputs[0].name
    if batches[0][own].shape[0] >= ROWS:
        return batches[0]
    return {name: np.concatenate([part[name] for part in parts])[:ROWS] for name in batches[0]}


def _sizes(inputs: Sequence[TensorInfo], batch: Inputs) -> dict[str, int]:
    return {dim: size for info in inputs for dim, size in zip(info.shape, batch[info.name].shape, strict=True) if isinstance(dim, str)}


def _smaller(inputs: Sequence[TensorInfo], sizes: dict[str, int]) -> dict[str, int]:
    """Return the sizes with the largest one halved until a pair is small."""
    first = {info.shape[0] for info in inputs if info.shape}
    free = [dim for dim in sizes if dim not in first]
    sizes = dict(sizes)

    def values() -> int:
        return sum(prod(sizes[dim] if isinstance(dim, str) else dim for dim in info.shape) for info in inputs)

    while values() > LARGEST_PAIR and any(sizes[dim] > 1 for dim in free):
        largest = max(free, key=lambda dim: sizes[dim])
        sizes[largest] //= 2
    return sizes


def _other_sizes(sizes: Mapping[str, int], first: set[str]) -> Iterator[dict[str, int]]:
    """Yield other sizes to try: odd ones, which reveal a size that was fixed in the model; halves; then fewer rows alone."""
    rows = {dim: max(1, size - 1) for dim, size in sizes.items() if dim in first}
    odd = {dim: min(size, size * 5 // 8 | 1) for dim, size in sizes.items()}
    half = {dim: max(1, size // 2) for dim, size in sizes.items()}
    for candidate in (odd | rows, half | rows, {**sizes, **rows}):
        if candidate != sizes:
            yield candidate


def _cut(inputs: Sequence[TensorInfo], batch: Inputs, sizes: Mapping[str, int]) -> Inputs:
    cuts = {info.name: tuple(slice(0, sizes[dim] if isinstance(dim, str) else None) for dim in info.shape) for info in inputs}
    return {name: np.require(tensor[cuts[name]], requirements="C") for name, tensor in batch.items()}


def _pair(inputs: Inputs, run: ModelRun) -> TensorPair:
    outputs = run(inputs)
    wrong = [name for name, tensor in outputs.items() if tensor.dtype.kind == "f" and not np.isfinite(tensor).all()]
    if wrong:
        shapes = ", ".join(f"{name} {tensor.shape}" for name, tensor in inputs.items())
        raise ExportError(f"output '{wrong[0]}' holds NaN or infinity for {shapes}: give typical inputs, with finite outputs")
    if any(not result.passed for result in compare_outputs(run(inputs), outputs, SAME)):
        raise ExportError("the model draws random numbers: two calls with the same inputs differ, so nothing could be verified")
    return dict(inputs), outputs


def signature_of(model: onnx.ModelProto, inputs: tuple[TensorInfo, ...], pairs: Sequence[TensorPair], run: ModelRun) -> TensorSignature:
    """Return the signature, with its batch where one free dimension comes first everywhere and rows are independent."""
    sizes = [_sizes(inputs, batch) for batch, _ in pairs]
    own_dims: dict[str, list[int]] = {}
    outputs = []
    for entry in model.graph.output:
        seen = [answer[entry.name].shape for _, answer in pairs]
        if len({len(shape) for shape in seen}) > 1:
            raise ExportError(f"output '{entry.name}' has shapes {', '.join(map(str, seen))}: its number of dimensions has to be one")
        shape = tuple(_output_dim(entry, axis, [shape[axis] for shape in seen], sizes, own_dims) for axis in range(len(seen[0])))
        outputs.append(_info(entry, shape, "output"))
    try:
        signature = TensorSignature(inputs=inputs, outputs=tuple(outputs))
    except ValidationError as error:
        raise ExportError(f"the model's inputs and outputs: {field_error(error)}") from error
    batch = signature.first_dim
    independent = batch is not None and all(_rows_alone(pair, run) for pair in pairs)
    return signature.model_copy(update={"batch": batch if independent else None})


def _output_dim(
    entry: onnx.ValueInfoProto, axis: int, seen: list[int], sizes: Sequence[Mapping[str, int]], own_dims: dict[str, list[int]]
) -> int | str:
    """Return an output's dimension: its number; the input's dimension of its name, or of its sizes; or a name of its own.

    `own_dims`: the names of the latter so far, with their sizes, to which this one is added.
    """
    declared = _dim(entry, axis)
    if isinstance(declared, int) and set(seen) == {declared}:
        return declared
    equal = [dim for dim in sizes[0] if [size[dim] for size in sizes] == seen]
    if declared in equal:
        return declared
    if not declared and len(equal) == 1 and len(set(seen)) > 1 and (axis == 0 or min(seen) >= NO_CHANCE):
        return equal[0]
    taken = isinstance(declared, int) or not declared or declared in sizes[0] or own_dims.get(declared, seen) != seen
    name = f"{entry.name}_{axis}"[-128:] if taken else str(declared)
    own_dims[name] = seen
    return name


def _rows_alone(pair: TensorPair, run: ModelRun) -> bool:
    """Return True if each row of a pair has the same outputs alone."""
    inputs, outputs = pair
    rows = next(iter(inputs.values())).shape[0]
    try:
        answers = [run({name: tensor[row : row + 1] for name, tensor in inputs.items()}) for row in range(rows)]
        alone = {name: np.concatenate([answer[name] for answer in answers]) for name in outputs}
    except (ExportError, ValueError):  # a model of several rows only; other numbers of outputs
        return False
    return all(result.passed for result in compare_outputs(alone, outputs, SAME))
