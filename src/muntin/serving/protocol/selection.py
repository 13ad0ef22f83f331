"""Selects the requested outputs of a response, each whole or as its best classes (Triton's classification extension).

As classes, an output becomes BYTES "value:index" or "value:index:label", best first: (B, ...) -> (B, k), (K,) -> (k,). A value has as few
digits as identify it (`3.3`), as in the extension's document; Triton itself writes `3.300000`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from muntin.serving.protocol.messages import InferOutput, InferResponse, ProtocolError, RequestedOutput, Tensor, shown


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Selected:
    """One tensor of the answer. `binary`: sent as bytes behind the JSON."""

    name: str
    data: Tensor
    binary: bool


def select(response: InferResponse, requested: tuple[RequestedOutput, ...], *, binary_default: bool) -> list[Selected]:
    """Select the requested outputs in their order; all of them, as `binary_default` says, where none is requested.

    Raises ProtocolError for an output that the model does not have, and for classes of one that holds no numbers.
    """
    if not requested:
        return [Selected(name=output.name, data=output.data, binary=binary_default) for output in response.outputs]
    outputs = {output.name: output for output in response.outputs}
    selected: list[Selected] = []
    for request in requested:
        output = outputs.get(request.name)
        if output is None:
            raise ProtocolError(f"output {shown(request.name)}: model {response.model} gives {', '.join(outputs) or 'none'}")
        data = output.data if request.classification is None else best_classes(output, request.classification)
        selected.append(Selected(name=output.name, data=data, binary=request.binary))
    return selected


def best_classes(output: InferOutput, count: int) -> Tensor:
    """Format the `count` highest values of each row, or all where there are fewer; equal ones in the order of their indices, NaN last.

    Cost: linear in the size of the output, plus sorting what is returned.
    """
    data = output.data
    if data.dtype.kind not in "uif":
        raise ProtocolError(f"output {shown(output.name)} is {data.dtype}: classes can be asked for of numbers only")
    rows = data.reshape(data.shape[0], -1) if data.ndim > 1 and data.size else data.reshape(1, -1)
    count = min(count, rows.shape[1])
    strings = np.empty((len(rows), count), object)
    for row, values in enumerate(rows):
        best = _highest(values, count)
        for place, (index, value) in enumerate(zip(best, values[best].astype(str), strict=True)):
            label = f":{output.labels[index]}" if index < len(output.labels) else ""
            strings[row, place] = f"{value}:{index}{label}".encode()
    if data.ndim <= 1:
        return strings.reshape(count)
    return strings if data.size else np.empty((data.shape[0], 0), object)


def _highest(values: Tensor, count: int) -> list[int]:
    if count == 0:
        return []
    order = np.where(np.isnan(values), -np.inf, values) if values.dtype.kind == "f" else values
    candidates = np.flatnonzero(order >= np.partition(order, -count)[-count])
    # A stable sort of the reversed candidates, reversed: highest first, and the lower index first among equals.
    highest = candidates[::-1][np.argsort(order[candidates][::-1], kind="stable")][::-1]
    indices: list[int] = highest[:count].tolist()
    return indices
