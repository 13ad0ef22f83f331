"""Kinds of calls of a session: what versions are compiled for, and what their times are compared by."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple

from muntin.artifact import Manifest, Signature
from muntin.errors import DataError
from muntin.runtime.inputs import LABELS, SCORES, Dims
from muntin.runtime.session import Session

DENSE_ROWS, DENSE_PIXELS = 16, 1 << 20
"""Largest batch, in rows and in pixels (or input values) of all rows, up to which every batch size is compiled for (0.4 s and 17 MiB each
at 64 x 64)."""


class Call(NamedTuple):
    """Inputs with these sizes of free dimensions. `batch`: name of the dimension of the rows, or empty.

    `outputs`: of images, what is computed: scores or labels.
    """

    dims: Dims
    batch: str = ""
    outputs: tuple[str, ...] = ()

    @property
    def size(self) -> Hashable:
        """Sizes of the dimensions other than the batch. Versions are compiled by sizes."""
        return tuple(dim for dim in self.dims if dim[0] != self.batch)

    @property
    def order(self) -> tuple[int, bool]:
        """Sort key: small batches first, and labels before scores."""
        return dict(self.dims).get(self.batch, 1), self.outputs != LABELS

    @property
    def advice(self) -> tuple[str, str]:
        """Describe the call, and the option of `muntin serve` that has it compiled."""
        if self.outputs:
            sizes = dict(self.dims)
            name = f"{sizes['height']}x{sizes['width']}"
            return f"images of {name} pixels", f"--sizes {name}"
        text = ",".join(f"{name}={size}" for name, size in self.dims if name != self.batch)
        return f"inputs of {text}", f"--dims {text}"

    def warm_up(self, session: Session) -> None:
        """Warm up a session."""
        session.prepare(self.dims, self.outputs)


def call_from_json(values: list[Any]) -> Call:
    """Return the call that was written as JSON, which has lists for tuples."""
    dims, batch, outputs = values
    return Call(tuple((name, size) for name, size in dims), batch, tuple(outputs))


def batch_sizes(most: int, pixels: int) -> list[int]:
    """Batch sizes up to `most` to compile for, for rows of `pixels`: every number while a batch is small, then the powers of two.

    A size that was not compiled for was 1.2 to 1.7 times slower.
    """
    small = min(most, DENSE_ROWS, max(1, DENSE_PIXELS // pixels))
    return sorted({*range(1, small + 1), *(1 << n for n in range(most.bit_length()))})


def starting_calls(
    manifest: Manifest, max_batch: int, sizes: Iterable[tuple[int, int]] = (), dims: Iterable[Mapping[str, int]] = ()
) -> tuple[Call, ...]:
    """Calls that a version is compiled for: batches of the exported size, and of `sizes` (images: height, width) or `dims` (named tensors).

    Of segmentations these are batches for labels, and one image for scores, in whose calls batches for scores are computed. Raises
    DataError for a size that the model does not take.
    """
    signature, tensors = manifest.signature, manifest.signature.tensors
    given = [dict(named) for named in dims]
    if isinstance(signature, Signature):
        if given:
            raise DataError("--dims: the model takes images: give --sizes, or leave it out")
        for height, width in sizes:
            if not signature.sizes.takes(height, width):
                rows, columns = signature.sizes.at_least(height, width)
                raise DataError(f"--sizes {height}x{width}: the model takes {signature.sizes.text}: give {rows}x{columns}, or leave it out")
            given.append({"height": height, "width": width})
    elif sizes:
        raise DataError(f"--sizes: the model takes named tensors ({tensors.text}): give --dims, or leave it out")
    batch = tensors.batch
    free = [name for name in tensors.dims if name != batch]
    for named in given:
        if named.keys() != set(free):
            text = ",".join(f"{name}={size}" for name, size in named.items())
            raise DataError(f"--dims {text}: give a size of each free dimension ({', '.join(free) or 'there is none'}), or leave it out")
    exported = [manifest.example] if manifest.example is not None else [] if tensors.dims else [{}]
    segments = isinstance(signature, Signature) and signature.answer.masks
    outputs = () if not isinstance(signature, Signature) else LABELS if segments else SCORES
    calls = []
    for named in [*exported, *given] if max_batch else []:
        one = {**named, **({} if batch is None else {batch: 1})}
        values = one["height"] * one["width"] if isinstance(signature, Signature) else tensors.values(one)
        for count in batch_sizes(1 if batch is None else max_batch, values):
            calls.append(_call(one, batch, count, outputs))
        if segments:
            calls.append(_call(one, batch, 1, SCORES))
    return tuple(dict.fromkeys(calls))


def _call(sizes: Mapping[str, int], batch: str | None, rows: int, outputs: tuple[str, ...]) -> Call:
    named = sizes if batch is None else {**sizes, batch: rows}
    return Call(tuple(sorted(named.items())), batch or "", outputs)
