"""Named arrays in the memory of a channel: both processes know the signature, so a call is only sizes and positions.

memory   input | input | ... | output | output | ...        in the model's order, each at a multiple of `ALIGNMENT`
call     the sizes of the free dimensions, then the positions of the requested outputs in the signature
answer   bytes of the memory, then the shape of each output: it may depend on values, so its length is not known before
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import AnySignature, TensorInfo
from muntin.runtime.inputs import Dims, Named

ALIGNMENT = 64
NUMBER = 8
"""Bytes of a number in a call and an answer."""
KEPT_LAYOUTS = 256
"""Maximum number of layouts that `NamedCalls` keeps, the last used."""


def _packed(numbers: Iterable[int]) -> bytes:
    values = tuple(numbers)
    return struct.pack(f"={len(values)}q", *values)


def _unpacked(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"={len(data) // NUMBER}q", data)


def aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


class ArrayPlace(NamedTuple):
    """Where an array lies in the memory."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int


class CallLayout(NamedTuple):
    """The memory of one kind of call: these sizes of the free dimensions, these outputs.

    `call`: its numbers. `dims`: sizes by name. `end`: bytes of the memory. `answer`: of outputs whose shapes follow from the inputs' sizes.
    """

    call: bytes
    dims: Dims
    inputs: tuple[ArrayPlace, ...]
    outputs: tuple[ArrayPlace, ...]
    end: int
    answer: bytes


def _places(specs: Iterable[TensorInfo], shapes: Iterable[tuple[int, ...]], start: int) -> tuple[tuple[ArrayPlace, ...], int]:
    """Return the places of arrays of these shapes from `start` on, and the position behind them."""
    places = []
    for spec, shape in zip(specs, shapes, strict=True):
        dtype = np.dtype(spec.dtype)
        places.append(ArrayPlace(spec.name, dtype, tuple(shape), start))
        start = aligned(start + prod(shape) * dtype.itemsize)
    return tuple(places), start


def views(places: Iterable[ArrayPlace], memory: NDArray[np.uint8]) -> Named:
    """Return arrays that share memory."""
    return {place.name: np.ndarray(place.shape, place.dtype, memory, place.start) for place in places}


def write_arrays(arrays: Mapping[str, NDArray[Any]], places: Iterable[ArrayPlace], memory: NDArray[np.uint8]) -> None:
    """Copy arrays to their places."""
    for place in places:
        np.ndarray(place.shape, place.dtype, memory, place.start)[...] = arrays[place.name]


class NamedCalls:
    """Layouts of the calls and answers for a signature."""

    def __init__(self, signature: AnySignature) -> None:
        self.signature, self._sized = signature.tensors, signature
        self._position = {spec.name: index for index, spec in enumerate(self.signature.outputs)}
        self.longest_call = NUMBER * (len(self.signature.dims) + len(self.signature.outputs))
        """Bytes."""
        self.layout, self.layout_of = lru_cache(KEPT_LAYOUTS)(self._layout), lru_cache(KEPT_LAYOUTS)(self._layout_of)

    def _layout(self, dims: Dims, outputs: tuple[str, ...]) -> CallLayout:
        """Return the layout of a call."""
        sizes, specs = dict(dims), [self.signature.outputs[self._position[name]] for name in outputs]
        call = _packed((*(sizes[name] for name in self.signature.dims), *(self._position[name] for name in outputs)))
        inputs, start = _places(self.signature.inputs, self.signature.input_shapes(sizes).values(), 0)
        shapes = self._sized.output_sizes(sizes)
        placed, end = _places(specs, (shapes[name] for name in outputs), start)
        return CallLayout(call, dims, inputs, placed, end, _answer(end, (place.shape for place in placed)))

    def _layout_of(self, call: bytes) -> CallLayout:
        """Return the layout of a call that the other process has sent."""
        names, numbers = self.signature.dims, _unpacked(call)
        dims = tuple(sorted(zip(names, numbers, strict=False)))
        return self._layout(dims, tuple(self.signature.outputs[index].name for index in numbers[len(names) :]))

    def answered(self, layout: CallLayout, answer: Mapping[str, NDArray[Any]]) -> tuple[tuple[ArrayPlace, ...], int, bytes]:
        """Return the places of the outputs, the bytes of the memory, and the answer to send."""
        shapes = [answer[place.name].shape for place in layout.outputs]
        if shapes == [place.shape for place in layout.outputs]:
            return layout.outputs, layout.end, layout.answer
        return self._placed(layout, shapes)

    def read_answer(self, layout: CallLayout, answer: bytes) -> tuple[tuple[ArrayPlace, ...], int]:
        """Return the places of the outputs, and the bytes of the memory."""
        if answer == layout.answer:
            return layout.outputs, layout.end
        _, *sizes = _unpacked(answer)
        shapes, first = [], 0
        for place in layout.outputs:
            shapes.append(tuple(sizes[first : first + len(place.shape)]))
            first += len(place.shape)
        return self._placed(layout, shapes)[:2]

    def _placed(self, layout: CallLayout, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[ArrayPlace, ...], int, bytes]:
        """Return what `answered` does, of outputs whose shapes have followed from values."""
        specs = [self.signature.outputs[self._position[place.name]] for place in layout.outputs]
        places, end = _places(specs, shapes, layout.outputs[0].start)
        return places, end, _answer(end, shapes)


def _answer(end: int, shapes: Iterable[tuple[int, ...]]) -> bytes:
    return _packed((end, *(size for shape in shapes for size in shape)))
