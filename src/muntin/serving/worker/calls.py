"""Kinds of calls of a session: what versions are compiled for, and what their times are compared by."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple

from muntin.artifact import Manifest
from muntin.errors import DataError
from muntin.runtime.inputs import LABELS, SCORES, Dims, Shape, image_dims
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


def image_call(shape: Shape, *, labels: bool = False) -> Call:
    """Return the call of images (B, H, W)."""
    return Call(image_dims(shape), "batch", LABELS if labels else SCORES)


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
    if manifest.named is not None:
        if sizes:
            raise DataError(f"--sizes: the model takes named tensors ({manifest.signature.tensors.text}): give --dims, or leave it out")
        return _tensor_calls(manifest, max_batch, list(dims))
    if dims:
        raise DataError("--dims: the model takes images: give --sizes, or leave it out")
    return _image_calls(manifest, max_batch, list(sizes))


def _image_calls(manifest: Manifest, max_batch: int, sizes: list[tuple[int, int]]) -> tuple[Call, ...]:
    allowed = manifest.picture.sizes
    for height, width in sizes:
        if not allowed.takes(height, width):
            rows, columns = allowed.at_least(height, width)
            raise DataError(f"--sizes {height}x{width}: the model takes {allowed.text}: give {rows}x{columns}, or leave it out")
    exported = () if manifest.shape is None else (manifest.shape[1:],)
    segments = manifest.picture.answer.masks
    calls = []
    for height, width in dict.fromkeys((*exported, *sizes)) if max_batch else ():
        calls += [image_call((rows, height, width), labels=segments) for rows in batch_sizes(max_batch, height * width)]
        if segments:
            calls.append(image_call((1, height, width)))
    return tuple(calls)


def _tensor_calls(manifest: Manifest, max_batch: int, dims: list[Mapping[str, int]]) -> tuple[Call, ...]:
    signature, batch = manifest.signature.tensors, manifest.signature.tensors.batch
    rows = {} if batch is None else {batch: 1}
    free = [name for name in signature.dims if name != batch]
    for sizes in dims:
        if sizes.keys() != set(free):
            given = ",".join(f"{name}={size}" for name, size in sizes.items())
            raise DataError(f"--dims {given}: give a size of each free dimension ({', '.join(free) or 'there is none'}), or leave it out")
    exported = [manifest.example] if manifest.example is not None else [] if signature.dims else [{}]
    calls = []
    for sizes in [*exported, *dims] if max_batch else []:
        most = 1 if batch is None else max_batch
        for count in batch_sizes(most, signature.values({**sizes, **rows})):
            calls.append(Call(tuple(sorted({**sizes, **dict.fromkeys(rows, count)}.items())), batch or ""))
    return tuple(dict.fromkeys(calls))
