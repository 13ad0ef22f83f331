"""Read requests to a model, and make the outputs of its answers.

A model of images has one input, `images`. Its outputs, by task (which of them a request names decides what is computed; none named: all):
    segment    labels UINT8 (B, sH, sW)         scores FP32 (B, K, sH, sW)
    classify   labels UINT8 (B,)                scores FP32 (B, K)
    restore    image UINT8 (B, sH, sW, C)       scores FP32 (B, C, sH, sW)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from muntin.artifact import AnySignature, Signature, TensorInfo
from muntin.errors import DataError
from muntin.runtime.inputs import LABELS, SCORES, Named, check_inputs
from muntin.runtime.session import class_names
from muntin.serving.inference.groups import Group
from muntin.serving.protocol.messages import JSON_ELEMENTS, InferOutput, InferRequest, ProtocolError, RequestedOutput, shown
from muntin.serving.protocol.metadata import TensorSpec
from muntin.serving.protocol.tensors import DATATYPES
from muntin.serving.versions.version import Version

INPUT = "images"
CLASSES = 1 << 16
"""Largest number of best classes of an answer, all rows and outputs together. Each is a string."""
_DATATYPES = {dtype.name: name for name, dtype in DATATYPES.items()}
_JSON_BYTES = 4
"""Bytes that a value counts as, at least, in an answer as text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """The answer that one request asks for. `known`: False for outputs whose size follows from values, which are not counted yet.

    `names`: its outputs, in their order. `nbytes`: their bytes. `listed`: best classes to write, at most. `binary`: whether it is sent in
    binary, not as text.
    """

    names: tuple[str, ...]
    nbytes: int
    listed: int
    binary: bool
    known: bool = True


class Requests:
    """Reads requests to a model of any signature and makes their outputs. `max_pixels`: of one image."""

    def __init__(self, max_rows: int, max_pixels: int) -> None:
        self._max_rows, self._max_pixels = max_rows, max_pixels

    def specs(self, signature: AnySignature) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], int]:
        """Inputs, outputs, and the maximum number of rows of a request; 0: they have no batch axis."""
        tensors = signature.tensors
        dims = {name: -1 if name == tensors.batch else size for name, size in signature.row.items()}
        inputs = _specs(tensors.inputs, tensors.input_shapes(dims))
        return inputs, _specs(signature.served, signature.output_sizes(dims)), 0 if tensors.batch is None else self._max_rows

    def read(self, request: InferRequest, version: Version, signature: AnySignature) -> tuple[Named, Group, Wanted]:
        """Return the inputs in the model's order, their group and the requested answer. Raises ProtocolError."""
        tensors = signature.tensors
        infos = {info.name: info for info in tensors.inputs}
        for tensor in request.inputs:
            info = infos.get(tensor.name)
            if info is not None and tensor.datatype != _DATATYPES[info.dtype]:
                raise ProtocolError(f'input "{tensor.name}" is {tensor.datatype}: the model takes {_text(info)}')
        try:
            inputs, dims = check_inputs({tensor.name: tensor.data for tensor in request.inputs}, signature)
        except DataError as error:
            raise ProtocolError(str(error)) from error
        batch, sizes = tensors.batch, dict(dims)
        rows = 1 if batch is None else sizes[batch]
        if rows > self._max_rows:
            raise ProtocolError(f"{rows} rows: this server computes at most {self._max_rows} at once; send them in several requests")
        row_size = sum(tensor.size for tensor in inputs.values()) // rows
        images = signature.task != "tensors"  # isinstance of a pydantic model takes a microsecond
        if images and (row_size := sizes["height"] * sizes["width"]) > self._max_pixels:
            raise ProtocolError(
                f"images of {sizes['width']}x{sizes['height']} pixels: this server takes at most {self._max_pixels:,} (--max-pixels)",
                status=413,
            )
        given = {info.name: info.dtype for info in signature.served}
        held = given | {"image": "float32"}  # a restored picture is written from scores
        names = tuple(output.name for output in request.outputs) or tuple(given)
        for name in names:
            if name not in given:
                raise ProtocolError(f"output {shown(name)}: the model gives {' and '.join(given)}")
        shapes = signature.output_sizes(sizes)
        if images and any(output.classification and len(shapes[output.name]) == 1 for output in request.outputs):
            raise ProtocolError('classification of "labels": a label is the best class of its row, and has none below it; ask it of scores')
        wanted = _wanted(request, [(name, held[name] if images else given[name], shapes[name]) for name in names])
        outputs = names if not images else LABELS if names == LABELS else SCORES
        free = tuple(dim for dim in dims if dim[0] != batch)
        return inputs, Group(version, free, batch, row_size, outputs, images), wanted

    def measured(self, request: InferRequest, answer: Named) -> Wanted:
        """Return the requested answer with its sizes. Raises ProtocolError for one that is too large for its form."""
        return _wanted(request, [(name, array.dtype, array.shape) for name, array in answer.items()], measured=True)

    def outputs(self, answer: Named, wanted: Wanted, signature: AnySignature) -> tuple[InferOutput, ...]:
        """Make the outputs of a response from those that were computed."""
        outputs = []
        for name in wanted.names:
            data = answer[name] if name in answer else _of_scores(name, answer["scores"], signature)
            labels = class_names(signature) if name == "scores" and isinstance(signature, Signature) and signature.answer.one else ()
            outputs.append(InferOutput(name=name, data=data, labels=labels))
        return tuple(outputs)


def _wanted(request: InferRequest, outputs: Iterable[tuple[str, DTypeLike, tuple[int, ...]]], *, measured: bool = False) -> Wanted:
    """Read the outputs of these names, types and shapes. A size of 0 follows from values, unless `measured`."""
    written = {output.name: output for output in request.outputs}
    names, nbytes, listed, most_rows, known, all_binary = [], 0, 0, 0, True, True
    for name, dtype, shape in outputs:
        output = written.get(name) or RequestedOutput(name=name, binary=request.binary_default)
        names.append(name)
        all_binary = all_binary and output.binary and output.classification is None
        if 0 in shape and not measured:
            known = False
            continue
        count = prod(shape)
        if output.classification is not None:
            rows = shape[0] if len(shape) > 1 else 1
            listed += rows * min(output.classification, count // max(rows, 1))
            most_rows = max(most_rows, rows)
        elif not output.binary and count > JSON_ELEMENTS:
            raise ProtocolError(
                f"output {shown(name)} has {count:,} elements, and JSON carries at most {JSON_ELEMENTS:,}: ask for binary data", status=413
            )
        width = np.dtype(dtype).itemsize
        nbytes += count * (width if output.binary else max(width, _JSON_BYTES))
    if listed > CLASSES:
        raise ProtocolError(
            f"classification of {most_rows} rows asks for {listed:,} classes: this server writes at most {CLASSES:,} in one answer; "
            "ask for fewer, or for the output itself"
        )
    return Wanted(names=tuple(names), nbytes=nbytes, listed=listed, binary=all_binary, known=known)


def _of_scores(name: str, scores: NDArray[np.float32], signature: Any) -> NDArray[Any]:
    return pixels(scores) if name == "image" else scores.argmax(axis=1).astype(signature.label_type)


def _specs(infos: Iterable[TensorInfo], shapes: dict[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=info.name, datatype=_DATATYPES[info.dtype], shape=tuple(size if size > 0 else -1 for size in shapes[info.name]))
        for info in infos
    )


def _text(info: TensorInfo) -> str:
    return f"{_DATATYPES[info.dtype]} ({', '.join(map(str, info.shape))})"


def pixels(scores_BCHW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Convert the scores of a model that restores to images (B, H, W, C)."""
    rounded = np.clip(np.rint(scores_BCHW), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(rounded.transpose(0, 2, 3, 1))
