"""Signatures of models with named inputs and outputs of any shape and type: embeddings, regressions, token ids, several heads.

A dimension is a number, or the name of a free one. Free dimensions of one name are the same number in a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

TensorType = Literal[
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"
]  # fmt: skip
LARGEST_DIM = 1 << 31
MOST_TENSORS, MOST_DIMS = 64, 8
"""Maximum number of inputs, of outputs, and of a tensor's dimensions."""
DimName = Annotated[str, Field(min_length=1, max_length=128)]
DimSize = Annotated[int, Field(ge=1, le=LARGEST_DIM)]
Tensors = Mapping[str, NDArray[Any]]
"""Arrays by the names of inputs or outputs."""
TensorPair = tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]
"""Inputs, and the outputs for them."""


class TensorInfo(BaseModel):
    """Name, element type and shape of an input or output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=256)]
    dtype: TensorType
    shape: Annotated[tuple[DimSize | DimName, ...], Field(max_length=MOST_DIMS)]

    @property
    def text(self) -> str:
        """Type and shape in words: "int64 (batch, 128)"."""
        return f"{self.dtype} ({', '.join(map(str, self.shape))})"

    def misfit(self, tensor: NDArray[Any], dims: dict[str, int], *, empty: bool) -> str | None:
        """Return why a tensor does not fit, or None. `dims`: the free dimensions so far, to which those of this tensor are added.

        `empty`: a free dimension may be 0.
        """
        if tensor.dtype != self.dtype:
            return f"'{self.name}' is {tensor.dtype}: {self.text} is needed"
        if tensor.ndim != len(self.shape) or (0 in tensor.shape and not empty):
            return f"'{self.name}' has the shape {tensor.shape}: {self.text} is needed{'' if empty else ', with no dimension of 0'}"
        for axis, (dim, size) in enumerate(zip(self.shape, tensor.shape, strict=True)):
            due = dims.setdefault(dim, size) if isinstance(dim, str) else dim
            if size != due:
                same = f"{dim} is {due} in another tensor of the call" if isinstance(dim, str) else f"{self.text} is needed"
                return f"'{self.name}' has the shape {tensor.shape}, whose dimension {axis} has to be {due}: {same}"
        return None


class TensorSignature(BaseModel):
    """Inputs and outputs in the order of the model.

    `batch`: the free dimension that comes first in every input and output, if its rows are computed independently of each other. Then
    calls may be joined and split along it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["tensors"] = "tensors"
    inputs: Annotated[tuple[TensorInfo, ...], Field(min_length=1, max_length=MOST_TENSORS)]
    outputs: Annotated[tuple[TensorInfo, ...], Field(min_length=1, max_length=MOST_TENSORS)]
    batch: DimName | None = None

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        for kind, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [spec.name for spec in specs]
            if len(set(names)) < len(names):
                raise ValueError(f"two {kind} of one name, of {', '.join(names)}: give each its own")
        if self.batch is not None and self.batch != self.first_dim:
            raise ValueError(f"batch '{self.batch}' is not the first dimension of every tensor ({self.text}): leave it out")
        return self

    @property
    def tensors(self) -> TensorSignature:
        """This signature: image models have one, too."""
        return self

    @property
    def served(self) -> tuple[TensorInfo, ...]:
        """Outputs as clients of a server see them."""
        return self.outputs

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the free dimensions of the inputs, each once."""
        return tuple(dict.fromkeys(dim for spec in self.inputs for dim in spec.shape if isinstance(dim, str)))

    @property
    def first_dim(self) -> str | None:
        """The free dimension that comes first in every input and output, or None."""
        first = {spec.shape[0] if spec.shape else 1 for spec in (*self.inputs, *self.outputs)}
        name = first.pop()
        return name if not first and isinstance(name, str) else None

    @property
    def text(self) -> str:
        """All tensors in words."""
        inputs, outputs = (", ".join(f"{spec.name} {spec.text}" for spec in specs) for specs in (self.inputs, self.outputs))
        return f"{inputs} -> {outputs}"

    def input_shapes(self, dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Shape of each input for the sizes of all free dimensions."""
        return {spec.name: tuple(dims[dim] if isinstance(dim, str) else dim for dim in spec.shape) for spec in self.inputs}

    def output_sizes(self, dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Shape of each output for the sizes of all free dimensions; 0 for a size that follows from values."""
        return {spec.name: tuple(dims.get(dim, 0) if isinstance(dim, str) else dim for dim in spec.shape) for spec in self.outputs}

    @property
    def row(self) -> dict[str, int]:
        """Sizes of the free dimensions of one row; -1 for those other than the batch."""
        return {name: 1 if name == self.batch else -1 for name in self.dims}

    def zeros(self, dims: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """Inputs of zeros."""
        shapes = self.input_shapes(dims)
        return {spec.name: np.zeros(shapes[spec.name], spec.dtype) for spec in self.inputs}

    def values(self, dims: Mapping[str, int]) -> int:
        """Number of values of all inputs."""
        return sum(prod(shape) for shape in self.input_shapes(dims).values())

    def dims_problem(self, dims: Mapping[str, int]) -> str | None:
        """Return why `dims` does not give a size from 1 for exactly the free dimensions of the inputs, or None."""
        if dims.keys() != set(self.dims):
            return f"sizes of {', '.join(dims) or 'nothing'}: give one of each free dimension ({', '.join(self.dims) or 'there is none'})"
        wrong = {name: size for name, size in dims.items() if type(size) is not int or not 1 <= size <= LARGEST_DIM}
        return next((f"{name} of {size!r}: give a whole number from 1 to {LARGEST_DIM}" for name, size in wrong.items()), None)

    def inputs_problem(self, tensors: Tensors, dims: dict[str, int]) -> str | None:
        """Return why some tensors are no inputs of this model, or None. The sizes of free dimensions are added to `dims`."""
        return _problem(self.inputs, tensors, dims, "input")

    def outputs_problem(self, tensors: Tensors, dims: dict[str, int]) -> str | None:
        """Return why some tensors are no outputs for inputs of these `dims`, or None. A size that follows from values may be 0."""
        return _problem([spec for spec in self.outputs if spec.name in tensors] or self.outputs, tensors, dims, "output")


def _problem(specs: Iterable[TensorInfo], tensors: Tensors, dims: dict[str, int], kind: str) -> str | None:
    specs = list(specs)
    if tensors.keys() != {spec.name for spec in specs}:
        missing = [spec.name for spec in specs if spec.name not in tensors]
        unknown = [name for name in tensors if all(spec.name != name for spec in specs)]
        parts = [f"no {kind} {', '.join(missing)}"] if missing else []
        parts += [f"{', '.join(map(str, unknown))}, which is no {kind}"] if unknown else []
        return f"{' and '.join(parts)}: give {', '.join(f'{spec.name} {spec.text}' for spec in specs)}"
    for spec in specs:
        tensor = tensors[spec.name]
        if not isinstance(tensor, np.ndarray):
            return f"'{spec.name}' is of type {type(tensor).__name__}: give a numpy array, {spec.text}"
        if (reason := spec.misfit(tensor, dims, empty=kind == "output")) is not None:
            return reason
    return None
