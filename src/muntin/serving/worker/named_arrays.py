"""Named arrays in the memory of a channel: both processes know the signature, so a call is only sizes and positions.

memory   input | input | ... | output | output | ...        in the model's order, each at a multiple of `ALIGNMENT`
call     the sizes of the free dimensions, then the positions of the requested outputs in the signature
answer   bytes of the memory, then the shape of each output: it may depend on values, so its length is not known before
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import AnySignature, TensorInfo
from muntin.runtime.session import Dims, Named

ALIGNMENT = 64
NUMBER = 8
"""Bytes of a number in a call and an answer."""


def packed(numbers: Iterable[int]) -> bytes:
    values = tuple(numbers)
    return struct.pack(f"={len(values)}q", *values)


def unpacked(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"={len(data) // NUMBER}q", data)


def aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def write_arrays(arrays: Iterable[NDArray[Any]], memory: NDArray[np.uint8], start: int = 0) -> None:
    """Copy contiguous arrays into memory, one after the other."""
    for array in arrays:
        memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        start = aligned(start + array.nbytes)


def length_of(arrays: Iterable[NDArray[Any]]) -> int:
    """Bytes that `write_arrays` takes."""
    return sum(aligned(array.nbytes) for array in arrays)


def views(specs: Iterable[TensorInfo], shapes: Iterable[tuple[int, ...]], memory: NDArray[np.uint8], start: int = 0) -> tuple[Named, int]:
    """Return arrays of these shapes that share memory, and the position behind them."""
    arrays: Named = {}
    for spec, shape in zip(specs, shapes, strict=True):
        dtype = np.dtype(spec.dtype)
        nbytes = prod(shape) * dtype.itemsize
        arrays[spec.name] = memory[start : start + nbytes].view(dtype).reshape(shape)
        start = aligned(start + nbytes)
    return arrays, start


class NamedCalls:
    """Numbers of the calls and answers for a signature."""

    def __init__(self, signature: AnySignature) -> None:
        self.signature, self._sized = signature.tensors, signature
        self._position = {spec.name: index for index, spec in enumerate(self.signature.outputs)}

    def call(self, dims: Dims, outputs: Sequence[str]) -> bytes:
        sizes = dict(dims)
        return packed((*(sizes[name] for name in self.signature.dims), *(self._position[name] for name in outputs)))

    def read_call(self, data: bytes) -> tuple[Dims, list[TensorInfo]]:
        """Return the sizes of the free dimensions and the requested outputs."""
        names, numbers = self.signature.dims, unpacked(data)
        dims = tuple(sorted(zip(names, numbers, strict=False)))
        return dims, [self.signature.outputs[index] for index in numbers[len(names) :]]

    def specs(self, outputs: Iterable[str]) -> list[TensorInfo]:
        return [self.signature.outputs[self._position[name]] for name in outputs]

    def answer(self, end: int, answer: Mapping[str, NDArray[Any]]) -> bytes:
        return packed((end, *(size for array in answer.values() for size in array.shape)))

    def answer_length(self, specs: Iterable[TensorInfo]) -> int:
        return NUMBER * (1 + sum(len(spec.shape) for spec in specs))

    def read_answer(self, data: bytes, specs: Iterable[TensorInfo]) -> tuple[int, list[tuple[int, ...]]]:
        """Return the bytes of the memory and the shape of each output."""
        end, *sizes = unpacked(data)
        shapes, first = [], 0
        for spec in specs:
            shapes.append(tuple(sizes[first : first + len(spec.shape)]))
            first += len(spec.shape)
        return end, shapes

    def expected_length(self, dims: Dims, specs: Iterable[TensorInfo]) -> int:
        """Bytes of the outputs whose shapes follow from the inputs' sizes; of the others 0."""
        shapes = self._sized.output_sizes(dict(dims))
        return sum(aligned(prod(shapes[spec.name]) * np.dtype(spec.dtype).itemsize) for spec in specs)
