"""What goes back of a response: the outputs that were asked for, each whole or as its best classes (Triton's classification extension).

As classes, an output becomes BYTES "value:index" or "value:index:label", best first: (B, ...) -> (B, k), (K,) -> (k,). The value is written
with as many digits as tell it from its neighbours: `3.3`, as the extension's document has it; Triton itself writes `3.300000`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import orjson

from muntin.serving.protocol import InferOutput, InferResponse, ProtocolError, RequestedOutput, Tensor, shown

_SHORTEST = 4
"""Bytes of a float from which on orjson writes no more digits than it needs."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Selected:
    """One tensor as it goes back. `binary`: as bytes behind the JSON."""

    name: str
    data: Tensor
    binary: bool


def select(response: InferResponse, requested: tuple[RequestedOutput, ...], *, binary_default: bool) -> list[Selected]:
    """The outputs in the order asked for; all of them, as `binary_default` says, when none is.

    Raises ProtocolError for an output that the model does not give, and for classes of one that has no order.
    """
    if not requested:
        return [Selected(name=output.name, data=output.data, binary=binary_default) for output in response.outputs]
    outputs = {output.name: output for output in response.outputs}
    selected: list[Selected] = []
    for wanted in requested:
        output = outputs.get(wanted.name)
        if output is None:
            raise ProtocolError(f"output {shown(wanted.name)}: model {response.model} gives {', '.join(outputs) or 'none'}")
        data = output.data if wanted.classification is None else best_classes(output, wanted.classification)
        selected.append(Selected(name=output.name, data=data, binary=wanted.binary))
    return selected


def best_classes(output: InferOutput, count: int) -> Tensor:
    """The `count` highest values of each row, or all where there are fewer; equal ones in the order of their indices, NaN last.

    Linear in the size of the output, plus the sorting of what is returned.
    """
    data = output.data
    if data.dtype.kind not in "uif":
        raise ProtocolError(f"output {shown(output.name)} is {data.dtype}: classes can be asked for of numbers only")
    rows = data.reshape(data.shape[0], -1) if data.ndim > 1 and data.size else data.reshape(1, -1)
    count = min(count, rows.shape[1])
    strings = np.empty((len(rows), count), object)
    for row, values in enumerate(rows):
        best = _highest(values, count)
        for place, (index, value) in enumerate(zip(best, _written(values[best]), strict=True)):
            label = f":{output.labels[index]}" if index < len(output.labels) else ""
            strings[row, place] = f"{value}:{index}{label}".encode()
    if data.ndim <= 1:
        return strings.reshape(count)
    return strings if data.size else np.empty((data.shape[0], 0), object)


def _highest(values: Tensor, count: int) -> list[int]:
    if count == 0:
        return []
    order = np.where(np.isnan(values), -np.inf, values) if values.dtype.kind == "f" else values
    least = np.partition(order, -count)[-count]
    candidates = np.flatnonzero(order >= least)
    # A stable sort of the reversed candidates, reversed: highest first, and the lower index first among equals.
    highest = candidates[::-1][np.argsort(order[candidates][::-1], kind="stable")][::-1]
    found: list[int] = highest[:count].tolist()
    return found


def _written(values: Tensor) -> list[str]:
    """Each value in digits: one text of a whole row is made a dozen times as fast as one of each number."""
    if values.size and (values.dtype.kind in "ui" or (values.dtype.itemsize >= _SHORTEST and np.isfinite(values).all())):
        native = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
        return orjson.dumps(native, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].decode().split(",")
    return [str(value) for value in values]
