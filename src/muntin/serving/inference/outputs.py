"""Read the outputs that a request asks for, and make the tensors of an answer.

Outputs, by task (which of them a request names decides what is computed; none named: all):
    segment    labels UINT8 (B, sH, sW)         scores FP32 (B, K, sH, sW)
    classify   labels UINT8 (B,)                scores FP32 (B, K)
    restore    image UINT8 (B, sH, sW, C)       scores FP32 (B, C, sH, sW)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.serving.protocol.messages import JSON_ELEMENTS, InferOutput, InferRequest, ProtocolError, RequestedOutput, shown

CLASSES = 1 << 16
"""Largest number of best classes of an answer, all rows and outputs together. Each is a string."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """The answer that one request asks for. `known`: False for outputs whose size follows from values, which are not counted yet.

    `names`: its outputs, in their order. `labels`: whether labels are all, so that the engine need not give scores. `nbytes`: bytes of what
    is computed. `listed`: best classes to write, at most. `binary`: whether it is sent in binary, not as text.
    """

    names: tuple[str, ...]
    labels: bool
    nbytes: int
    listed: int
    binary: bool
    known: bool = True


def output_names(signature: Signature) -> tuple[str, ...]:
    """Names of a model's outputs."""
    first = ("labels",) if signature.answer.argmax else ("image",) if signature.answer.picture else ()
    return (*first, "scores")


def read_wanted(request: InferRequest, signature: Signature, shape: tuple[int, ...]) -> Wanted:
    """Read the outputs that a request asks for. `shape`: of its images (rows, H, W, C).

    Raises ProtocolError for an unknown output, for more than `CLASSES`, for more numbers than JSON carries, and for best classes of a
    classifier's labels.
    """
    names = output_names(signature)
    wanted = tuple(output.name for output in request.outputs) or names
    for name in wanted:
        if name not in names:
            raise ProtocolError(f"output {shown(name)}: the model gives {' and '.join(names)}")
    labels = wanted == ("labels",)
    listed, binary = 0, request.binary_default
    if request.outputs:
        binary = all(output.binary and output.classification is None for output in request.outputs)
        if any(output.classification for output in request.outputs):
            listed = _listed(request, signature, shape)
    rows, height, width, _ = shape
    pixels_each = 1 if signature.answer.one else height * width * signature.scale * signature.scale
    numbers = pixels_each * (rows if labels else rows * signature.outputs)
    written = request.outputs or [RequestedOutput(name=name, binary=request.binary_default) for name in names]
    for output in written:
        count = rows * pixels_each * (1 if output.name == "labels" else signature.outputs)
        if not output.binary and output.classification is None:
            check_json(output.name, count)
    return Wanted(
        names=wanted, labels=labels, nbytes=numbers * (signature.label_type.itemsize if labels else 4), listed=listed, binary=binary
    )


def _listed(request: InferRequest, signature: Signature, shape: tuple[int, ...]) -> int:
    if signature.answer.one and any(output.classification and output.name == "labels" for output in request.outputs):
        raise ProtocolError('classification of "labels": a label is the best class of its row, and has none below it; ask it of scores')
    rows, *row = signature.scores_shape(*shape[:3])
    count = sum(rows * min(output.classification or 0, math.prod(row)) for output in request.outputs)
    check_classes(count, rows)
    return count


def check_json(output: str, count: int) -> None:
    """Raise ProtocolError 413 for an output of more elements than JSON carries."""
    if count > JSON_ELEMENTS:
        raise ProtocolError(
            f"output {shown(output)} has {count:,} elements, and JSON carries at most {JSON_ELEMENTS:,}: ask for binary data", status=413
        )


def check_classes(count: int, rows: int) -> None:
    """Raise ProtocolError for more best classes, all rows and outputs together, than an answer has."""
    if count > CLASSES:
        raise ProtocolError(
            f"classification of {rows} rows asks for {count:,} classes: this server writes at most {CLASSES:,} in one answer; "
            "ask for fewer, or for the output itself"
        )


def make_outputs(answer: NDArray[Any], wanted: Wanted, signature: Signature) -> tuple[InferOutput, ...]:
    """Make the tensors of a response from the labels or scores that were computed."""
    if wanted.labels:
        return (InferOutput(name="labels", data=answer),)
    classes = tuple(entry.name for entry in signature.classes)
    outputs = []
    for name in wanted.names:
        if name == "scores":
            outputs.append(InferOutput(name=name, data=answer, labels=classes if signature.answer.one else ()))
        elif name == "labels":
            outputs.append(InferOutput(name=name, data=answer.argmax(axis=1).astype(signature.label_type)))
        else:
            outputs.append(InferOutput(name=name, data=pixels(answer)))
    return tuple(outputs)


def pixels(scores_BCHW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Convert the scores of a model that restores to images (B, H, W, C)."""
    rounded = np.clip(np.rint(scores_BCHW), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(rounded.transpose(0, 2, 3, 1))
