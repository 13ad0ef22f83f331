"""Requests to a model with named inputs and outputs of any shape and type."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import DTypeLike

from muntin.artifact import TensorInfo, TensorSignature
from muntin.errors import DataError
from muntin.runtime.inputs import Named, check_inputs
from muntin.serving.inference.groups import Group
from muntin.serving.inference.image_requests import check_rows
from muntin.serving.inference.outputs import Wanted, check_classes, check_json
from muntin.serving.protocol.messages import InferOutput, InferRequest, ProtocolError, RequestedOutput, shown
from muntin.serving.protocol.metadata import TensorSpec
from muntin.serving.protocol.tensors import DATATYPES
from muntin.serving.versions.version import Version

SizedOutput = tuple[str, DTypeLike, tuple[int, ...]]
"""Name, type and shape of an output; -1 for a size that follows from values."""
_DATATYPES = {dtype.name: name for name, dtype in DATATYPES.items()}
_JSON_BYTES = 4
"""Bytes that a value counts as, at least, in an answer as text."""


class TensorRequests:
    """Reads requests of named tensors and makes their outputs."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows

    def specs(self, signature: TensorSignature) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], int]:
        """Inputs, outputs, and the maximum number of rows of a request; 0: they have no batch axis."""
        inputs, outputs = (tuple(map(_spec, infos)) for infos in (signature.inputs, signature.outputs))
        return inputs, outputs, 0 if signature.batch is None else self._max_rows

    def read(self, request: InferRequest, version: Version, signature: TensorSignature) -> tuple[Named, Group, Wanted]:
        """Return the inputs in the model's order, their group and the requested answer. Raises ProtocolError."""
        infos = {info.name: info for info in signature.inputs}
        for tensor in request.inputs:
            info = infos.get(tensor.name)
            if info is not None and tensor.datatype != _DATATYPES[info.dtype]:
                raise ProtocolError(f'input "{tensor.name}" is {tensor.datatype}: the model takes {_text(info)}')
        try:
            inputs, dims = check_inputs({tensor.name: tensor.data for tensor in request.inputs}, signature)
        except DataError as error:
            raise ProtocolError(str(error)) from error
        batch = signature.batch
        sizes = dict(dims)
        rows = 1 if batch is None else sizes[batch]
        check_rows(rows, self._max_rows)
        given = {info.name: info for info in signature.outputs}
        names = tuple(output.name for output in request.outputs) or tuple(given)
        for name in names:
            if name not in given:
                raise ProtocolError(f"output {shown(name)}: the model gives {' and '.join(given)}")
        wanted = _wanted(request, [(name, given[name].dtype, _shape(given[name], sizes)) for name in names])
        row_size = sum(tensor.size for tensor in inputs.values()) // rows
        free = tuple(dim for dim in dims if dim[0] != batch)
        return inputs, Group(version, free, batch, row_size, names), wanted

    def measured(self, request: InferRequest, answer: Named) -> Wanted:
        """Return the requested answer with its sizes. Raises ProtocolError for one that is too large for its form."""
        return _wanted(request, [(name, array.dtype, array.shape) for name, array in answer.items()])

    def outputs(self, answer: Named, wanted: Wanted, signature: TensorSignature) -> tuple[InferOutput, ...]:
        return tuple(InferOutput(name=name, data=answer[name]) for name in wanted.names)


def _wanted(request: InferRequest, outputs: Sequence[SizedOutput]) -> Wanted:
    names = tuple(name for name, _, _ in outputs)
    written = {output.name: output for output in request.outputs} or {
        name: RequestedOutput(name=name, binary=request.binary_default) for name in names
    }
    nbytes, listed, most_rows, known = 0, 0, 0, True
    for name, dtype, shape in outputs:
        output = written[name]
        if -1 in shape:
            known = False
            continue
        count = prod(shape)
        if output.classification is not None:
            rows = shape[0] if len(shape) > 1 else 1
            listed += rows * min(output.classification, count // max(rows, 1))
            most_rows = max(most_rows, rows)
        elif not output.binary:
            check_json(name, count)
        width = np.dtype(dtype).itemsize
        nbytes += count * (width if output.binary else max(width, _JSON_BYTES))
    check_classes(listed, most_rows)
    binary = all(output.binary and output.classification is None for output in written.values())
    return Wanted(names=names, labels=False, nbytes=nbytes, listed=listed, binary=binary, known=known)


def _shape(info: TensorInfo, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes.get(dim, -1) if isinstance(dim, str) else dim for dim in info.shape)


def _spec(info: TensorInfo) -> TensorSpec:
    return TensorSpec(name=info.name, datatype=_DATATYPES[info.dtype], shape=_shape(info, {}))


def _text(info: TensorInfo) -> str:
    return f"{_DATATYPES[info.dtype]} ({', '.join(map(str, info.shape))})"
